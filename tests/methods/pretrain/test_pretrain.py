"""Continued pretraining: what it measures of general text and of the domain, its warning, and resuming."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import posttrain
from posttrain.config import ModelConfig
from posttrain.core.files import read_lines
from posttrain.methods.pretrain.pretrain_settings import PretrainConfig
from posttrain.methods.pretrain.pretrain_stage import Pretrain
from posttrain.methods.pretrain.retention import compare_documents
from posttrain.models.loading import load_tokenizer
from posttrain.runs.registry import prepare_stage
from posttrain.trainer.stage import StageContext

MODEL = ModelConfig(source="tiny:llama")
TOKENIZER = load_tokenizer(MODEL)
GENERAL = [f"The {a} {b} is near the {c}." for a in ("old", "new") for b in ("house", "tree") for c in "xyzuvw"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "domain.txt").write_text("\n\n".join(f"{'0123456789'[i % 10] * 30} {i} {i * i}" for i in range(40)))
    (folder / "general.txt").write_text("\n\n".join(GENERAL))
    return folder


def settings(texts: Path, **changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {"method": "pretrain", "data": {"source": str(texts / "domain.txt"), "separator": ""}}
    base |= {"sequence_length": 24, "batch_size": 6, "max_steps": 6, "checkpoint_every": 2, "evaluate_every": 3}
    base |= {"optimizer": {"lr": 0.01, "schedule": "wsd", "warmup": 1}, "held_out": 0.2}
    return base | changes


def stage_of(texts: Path, **changes: Any) -> Pretrain:
    stage = prepare_stage(PretrainConfig.model_validate(settings(texts, **changes)), StageContext(TOKENIZER, 2048))
    assert isinstance(stage, Pretrain)
    return stage


def general(texts: Path) -> dict[str, Any]:
    return {"source": str(texts / "general.txt"), "separator": ""}


def test_forgetting_is_measured_and_told(texts: Path, tmp_path: Path) -> None:
    """A model that knows general text, trained on digits alone: worse on it, better on them; named everywhere."""
    learn = settings(texts, name="learn", data=general(texts), held_out=None, retention=False, max_steps=14)
    learn |= {"optimizer": {"lr": 0.02, "schedule": "constant"}, "checkpoint_every": 99}
    recipe = posttrain.Recipe.model_validate(
        {"name": "r", "model": {"source": "tiny:llama"}, "stages": [learn, settings(texts, retention=general(texts))]}
    )
    printed = io.StringIO()
    result = posttrain.run(recipe, tmp_path / "run", console=Console(file=printed, width=200))
    first, second = json.loads((result.folder / "manifest.json").read_text())["stages"]
    found = second["retention"]
    assert "retention" not in first and found["general"]["documents"] == len(GENERAL)
    assert found["general"]["change"]["low"] > 0 > found["domain"]["change"]["high"]
    assert "replay: {data:" in found["warning"] and found["warning"] in printed.getvalue()
    page = result.report.read_text()
    assert 'id="retention"' in page and "has become less likely" in page
    assert json.loads((result.folder / "stages" / "1-pretrain" / "retention.json").read_text()) == found
    # The figures are those of transformers' own forward, a document at a time.
    model = AutoModelForCausalLM.from_pretrained(result.model, dtype=torch.float32)
    nats = sum(_nats(model, text) for text in GENERAL)
    bits = nats / math.log(2) / sum(len(text.encode()) for text in GENERAL)
    assert found["general"]["after"]["bits_per_byte"] == pytest.approx(bits, rel=1e-4)
    records = read_lines(result.folder / "stages" / "1-pretrain" / "metrics.jsonl")
    assert [r["step"] for r in records if "general/loss" in r] == [0, 3, 6]
    assert {c["task"] for c in result.comparison} == {"pretrain-held_out"}


def _nats(model: Any, text: str) -> float:
    """The text in pieces of 24 tokens, each after the first with the token before it as context."""
    ids = [TOKENIZER.eos_token_id, *TOKENIZER(text, add_special_tokens=False)["input_ids"], TOKENIZER.eos_token_id]
    if TOKENIZER(text)["input_ids"][0] == TOKENIZER.bos_token_id:
        ids[0] = TOKENIZER.bos_token_id
    total = 0.0
    for start in range(0, len(ids) - 1, 23):
        part = torch.tensor([ids[start : start + 24]])
        with torch.no_grad():
            logits = model(input_ids=part).logits[0, :-1].double()
        total += float(torch.nn.functional.cross_entropy(logits, part[0, 1:], reduction="sum"))
    return total


def test_a_killed_run_with_replay_ends_in_the_same_bits(texts: Path, tmp_path: Path) -> None:
    replay = {"data": general(texts), "share": 0.3}

    def kill(step: int, *_: Any) -> None:
        if step == 5:
            raise RuntimeError("killed")

    done = stage_of(texts, replay=replay, adapter={"r": 2}).run(MODEL, tmp_path / "whole", 1)
    with pytest.raises(RuntimeError):
        stage_of(texts, replay=replay, adapter={"r": 2}).run(MODEL, tmp_path / "killed", 1, kill)
    stage_of(texts, replay=replay, adapter={"r": 2}).run(MODEL, tmp_path / "killed", 1)
    a, b = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    metrics, again = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("whole", "killed"))
    assert metrics == again and done["steps"] == 6
    loss = sum(m["loss_tokens"] for m in metrics[1:])
    assert sum(m["replay_share"] * m["loss_tokens"] for m in metrics[1:]) / loss == pytest.approx(0.3, abs=0.04)
    assert done["retention"]["general"]["text"] == "held out of the replay data"
    assert done["epochs"] == metrics[-1]["epoch"] > 0


def test_training_bits_are_those_of_the_bytes(texts: Path, tmp_path: Path) -> None:
    """Short documents: in a whole epoch the bytes of all steps are those of the documents."""
    stage = stage_of(texts, max_steps=None, sequence_length=64, held_out=None, retention=False, evaluate_every=None)
    done = stage.run(MODEL, tmp_path, 0)
    metrics = read_lines(tmp_path / "metrics.jsonl")
    sizes = [m["loss"] * m["loss_tokens"] / math.log(2) / m["bits_per_byte"] for m in metrics]
    assert sum(sizes) == pytest.approx(stage.trained.stats["bytes"])
    assert "retention" not in done and metrics[-1]["epoch"] == 1.0


def test_a_hold_out_divides_the_bytes(texts: Path) -> None:
    documents = (texts / "domain.txt").read_text().split("\n\n")
    stage = stage_of(texts, retention=False)
    assert stage.held_out is not None and stage.held_out.stats["used"] > 1
    for part in (stage.trained, stage.held_out):
        chosen = [documents[row - 1] for row in {int(part.place(i).rpartition(":")[2]) for i in range(len(part))}]
        size = sum(len(text.encode()) for text in chosen)
        tokens = sum(len(TOKENIZER(text, add_special_tokens=False)["input_ids"]) + 1 for text in chosen)  # and the end
        expected = {"used": len(chosen), "samples": len(part), "bytes": size, "loss_tokens": tokens}
        assert part.stats == part.stats | expected | {"tokens_per_byte": pytest.approx(tokens / size)}


def test_the_default_general_text_and_its_lack(texts: Path, caplog: pytest.LogCaptureFixture) -> None:
    stage = stage_of(texts)
    assert stage.general is not None and stage.general.stats["used"] == 200
    assert not caplog.records
    reviews = {"source": "packaged:movie_reviews.tsv", "layout": "text", "columns": {"text": "text"}, "rows": [0, 30]}
    assert stage_of(texts, data=reviews).general is None
    assert "what is forgotten is not measured" in caplog.text


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"overlap": 24}, "overlap is 24, and sequence_length 24"),
        ({"data": {"source": "x.txt", "loss_on": "assistant"}}, "data.loss_on is assistant"),
        ({"replay": {"data": {"source": "x.txt"}, "share": 1.0}}, "less than 1"),
        ({"optimizer": {"decay": 0.5}}, "decay is for schedule: wsd"),
    ],
)
def test_wrong_settings_are_named(texts: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PretrainConfig.model_validate(settings(texts, **changes))


def test_changes_by_hand() -> None:
    """Bytes are shared by tokenizers: 8 nats over 4 bytes become 4 nats, in half of the tokens."""
    before = [{"nll": 4 * math.log(2), "tokens": 4, "bytes": 2}] * 2
    after = [{"nll": 2 * math.log(2), "tokens": 2, "bytes": 2}] * 2
    found = compare_documents(before, after)
    assert found["before"] == pytest.approx({"nats_per_token": math.log(2), "bits_per_byte": 2, "tokens_per_byte": 2})
    assert found["after"] == pytest.approx({"nats_per_token": math.log(2), "bits_per_byte": 1, "tokens_per_byte": 1})
    assert [found["change"][k] for k in ("value", "low", "high")] == pytest.approx([-1, -1, -1])
