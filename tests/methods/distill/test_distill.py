"""Distillation as a stage: the right loss, teachers of every kind, nothing that depends on how the work is split."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from posttrain.config import ModelConfig
from posttrain.core.errors import DataError, ModelError
from posttrain.core.files import read_lines
from posttrain.core.types import Sample
from posttrain.methods.distill.distill_settings import DistillConfig
from posttrain.methods.distill.distill_stage import Distill
from posttrain.methods.distill.teacher_answers import Spelling, TeacherPrompt, student_rows
from posttrain.methods.distill.teacher_model import LocalTeacher, check_same_tokens
from posttrain.models.loading import load_tokenizer
from posttrain.models.tiny_model import tiny_model, tiny_tokenizer
from posttrain.runs.registry import prepare_stage
from posttrain.trainer.loop import Stopped
from posttrain.trainer.stage import StageContext
from tests.data.tokenizers import merging

MODEL = ModelConfig(source="tiny:llama")
TOKENIZER = load_tokenizer(MODEL)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of another test is known; the compiled kernels are."""
    from posttrain.core.files import cache_folder
    from posttrain.methods.distill import teacher_answers, teacher_model

    assert cache_folder()
    for module in (teacher_answers, teacher_model):
        monkeypatch.setattr(module, "cache_folder", lambda: tmp_path / "cache")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [{"prompt": f"say {i}", "completion": "abc"[i % 3] * (i % 5 + 1)} for i in range(12)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def stage_of(rows: Path, **changes: Any) -> Distill:
    base: dict[str, Any] = {"method": "distill", "data": {"source": str(rows)}, "batch_size": 4, "max_steps": 3}
    base |= {"teacher": {"source": "tiny:qwen2"}, "checkpoint_every": 1, "held_out_answers": 0}
    base |= {"optimizer": {"lr": 0.01, "schedule": "constant", "warmup": 0}}
    stage = prepare_stage(DistillConfig.model_validate(base | changes), StageContext(TOKENIZER, 2048))
    assert isinstance(stage, Distill)
    return stage


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return read_lines(folder / "metrics.jsonl")


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def run(stage: Distill, folder: Path, seed: int = 3) -> list[dict[str, Any]]:
    folder.mkdir(parents=True, exist_ok=True)
    stage.run(MODEL, folder, seed)
    return metrics_of(folder)


def slow_kl(samples: list[Sample], student: Any, teacher: Any) -> float:
    """The mean forward KL of all loss tokens, by transformers' own forward passes, a row at a time."""
    total = count = 0.0
    for s in samples:
        with torch.no_grad():
            q, p = (
                m(input_ids=torch.tensor([list(s.tokens)])).logits[0].double().log_softmax(-1)
                for m in (student, teacher)
            )
        for place, weight in enumerate(s.weights):
            if weight:
                total += float((p[place - 1].exp() * (p[place - 1] - q[place - 1])).sum())
                count += 1
    return total / count


@pytest.mark.parametrize("cache", [4096, 0])
def test_the_loss_of_a_step_is_that_of_transformers_own_passes(rows: Path, tmp_path: Path, cache: float) -> None:
    """All rows in one step; with the numbers made before, and in the step; no matter how it is split."""
    stage = stage_of(rows, batch_size=12, max_steps=1, teacher_cache_mb=cache)
    expected = slow_kl(list(stage.rows), tiny_model("llama"), tiny_model("qwen2"))
    (made,) = run(stage, tmp_path / "a")
    assert made["loss"] == pytest.approx(expected, rel=1e-5) and made["divergence"] == pytest.approx(expected, rel=1e-5)
    split = {"tokens_per_micro_batch": 60, "share_prefixes": False}
    (other,) = run(stage_of(rows, batch_size=12, max_steps=1, teacher_cache_mb=cache, systems=split), tmp_path / "b")
    assert other["loss"] == pytest.approx(made["loss"], rel=1e-5)
    assert other["grad_norm"] == pytest.approx(made["grad_norm"], rel=1e-4)
    assert (tmp_path / "cache").exists() == bool(cache)


def test_kept_numbers_are_used_again(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run computes nothing, to the same weights; top-k numbers and other temperatures are others."""
    changes: dict[str, Any] = {"top_k": 5, "temperature": 2.0, "divergence": "reverse_kl", "held_out": 0.2}
    first = run(stage_of(rows, **changes), tmp_path / "a")
    assert first[0]["step"] == 0 and 0 < first[0]["held_out/loss"] and "held_out/cross_entropy" in first[0]
    with monkeypatch.context() as patch:
        patch.setattr(LocalTeacher, "numbers", None)
        assert run(stage_of(rows, **changes), tmp_path / "b") == first
    a, b = weights_of(tmp_path / "a"), weights_of(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)
    before = len(list((tmp_path / "cache").rglob("*.npy")))
    run(stage_of(rows, **{**changes, "temperature": 1.0}), tmp_path / "c")
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 2 * before
    damaged = next((tmp_path / "cache").rglob("*.npy"))
    damaged.write_bytes(damaged.read_bytes()[:200])  # cut by a full disk: it is made again
    assert run(stage_of(rows, **changes), tmp_path / "d") == first


ON_POLICY = {
    "on_policy": 0.6,
    "group_size": 2,
    "sampler": {"max_tokens": 9},
    "divergence": {"name": "jsd", "beta": 0.2},
}
TAUGHT = {"teacher_text": True, "answers": 2, "teacher_sampler": {"max_tokens": 80, "temperature": 1.0}}


@pytest.mark.parametrize(
    "changes",
    [ON_POLICY, TAUGHT, {"cross_entropy": 0.5}, {"on_policy": 1.0, "sampler": {"max_tokens": 5}, "adapter": {"r": 2}}],
    ids=["on-policy", "teacher's text", "fixed rows", "on-policy, lora"],
)
def test_a_stopped_stage_ends_in_the_same_weights(changes: dict[str, Any], rows: Path, tmp_path: Path) -> None:
    whole = run(stage_of(rows, **changes), tmp_path / "whole")

    def stop(step: int, *_: Any) -> None:
        if step == 2:
            raise Stopped("stopped")

    folder = tmp_path / "stopped"
    folder.mkdir()
    with pytest.raises(Stopped):
        stage_of(rows, **changes).run(MODEL, folder, 3, stop)
    assert run(stage_of(rows, **changes), folder) == whole
    a, b = weights_of(tmp_path / "whole"), weights_of(folder)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert all(math.isfinite(m["loss"]) for m in whole)


def test_on_policy_shares_and_splits(rows: Path, tmp_path: Path) -> None:
    """0.6 of 4 rows are 2 or 3, in each step its own; what a step computes does not depend on the micro-batches."""
    made = run(stage_of(rows, **ON_POLICY, max_steps=6), tmp_path / "a")
    assert {m["on_policy"] for m in made} <= {0.5, 0.75}
    assert all(1 <= m["completions/mean_length"] <= 9 for m in made)
    split = {"tokens_per_micro_batch": 30}
    other = run(stage_of(rows, **ON_POLICY, max_steps=1, systems=split), tmp_path / "b")
    assert other[0]["loss"] == pytest.approx(made[0]["loss"], rel=1e-5)
    assert other[0]["grad_norm"] == pytest.approx(made[0]["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mixtral", "gemma2"])
def test_a_student_that_is_its_own_teacher_learns_nothing(kind: str, rows: Path, tmp_path: Path) -> None:
    """teacher: start, tied and untied heads, biases, a mixture, a soft cap: divergence 0, and full agreement."""
    stage = stage_of(rows, teacher="start", max_steps=1, on_policy=0.5, sampler={"max_tokens": 4})
    folder = tmp_path / "a"
    folder.mkdir()
    stage.run(ModelConfig(source=f"tiny:{kind}"), folder, 0)
    (made,) = metrics_of(folder)
    assert made["divergence"] == pytest.approx(0, abs=1e-6) and made["agreement"] == pytest.approx(1)


def test_learning_moves_the_student_to_the_teacher(rows: Path, tmp_path: Path) -> None:
    made = run(stage_of(rows, max_steps=12, batch_size=12, teacher={"source": "tiny:gpt2"}), tmp_path / "a")
    assert made[-1]["divergence"] < 0.7 * made[0]["divergence"]


def test_a_vocabulary_that_is_padded(rows: Path, tmp_path: Path) -> None:
    """The teacher's head has rows that are no tokens: as without them."""
    teacher = tiny_model("qwen2")
    teacher.save_pretrained(tmp_path / "plain")
    teacher.resize_token_embeddings(272)
    teacher.save_pretrained(tmp_path / "padded")
    for name in ("plain", "padded"):
        TOKENIZER.save_pretrained(tmp_path / name)
    a, b = (run(stage_of(rows, teacher=str(tmp_path / n)), tmp_path / f"run-{n}") for n in ("plain", "padded"))
    assert [m["loss"] for m in a] == pytest.approx([m["loss"] for m in b], rel=1e-6)


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with another tokenizer, which ends its answers."""
    folder = tmp_path_factory.mktemp("stranger")
    tokenizer = merging("llama3")
    tokenizer.save_pretrained(folder)
    tiny_model("llama", len(tokenizer)).save_pretrained(folder)
    return folder


def test_another_tokenizer_is_for_text(stranger: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="another tokenizer.*teacher_text: true, divergence: null"):
        stage_of(rows, teacher=str(stranger))
    teacher_sampler = {"max_tokens": 40, "stop": ["o"]}
    changes = {"teacher": str(stranger), "teacher_text": True, "divergence": None, "teacher_sampler": teacher_sampler}
    made = run(stage_of(rows, **changes), tmp_path / "a")
    assert all(m["loss"] > 0 and "divergence" not in m for m in made)
    written = read_lines(tmp_path / "a" / "teacher.jsonl")
    assert len(written) == 12 and {w["finish"] for w in written} <= {"end", "stop", "length"}


def test_answers_become_the_student_s_rows() -> None:
    prompt = TeacherPrompt([1, 7], [9], {"messages": []}, "rows:1")
    answers = [
        {"text": "ab", "finish": "end"},
        {"text": "cut", "finish": "length"},
        {"text": " ", "finish": "end"},
        {"text": "a" * 30, "finish": "end"},
    ]
    made = student_rows([prompt], [answers], TOKENIZER, 2, 20, same_tokens=False)
    (sample,) = made.samples
    assert TOKENIZER.decode(sample.tokens[2:-1]) == "ab" and sample.tokens[-1] == 2
    assert list(sample.weights) == [0, 0, 1, 1, 1]
    left_out = {"cut at the longest length": 1, "empty": 1, "longer than the student's context": 1}
    assert dict(made.counts) == left_out
    with pytest.raises(DataError, match="none of the teacher's 1 answers.*1 cut"):
        student_rows([prompt], [answers[1:2]], TOKENIZER, 2, None, same_tokens=False)


def test_spelling_of_a_server_s_tokens() -> None:
    spelling = Spelling(TOKENIZER)
    a, b = TOKENIZER("ab")["input_ids"]
    tops = [["a", {"a": -0.1, "nobody's": -3.0, "b": -2.5}], [f"token_id:{b}", {f"token_id:{b}": -0.2}]]
    assert spelling.read([a, b], tops) == [{a: -0.1, b: -2.5}, {b: -0.2}]
    assert spelling.read([a], tops[:1] * 3) is None and spelling.read([b, b], tops) is None


def test_tokens_that_the_teacher_lacks_are_refused(rows: Path, tmp_path: Path) -> None:
    student = tiny_tokenizer()
    student.add_tokens(["<think>"])
    check_same_tokens(student, TOKENIZER, "t")  # the others are the same
    config = {"method": "distill", "data": {"source": str(rows)}, "teacher": "tiny:qwen2", "max_steps": 1}
    stage = prepare_stage(DistillConfig.model_validate(config), StageContext(student, 2048))
    stage.rows = [Sample([5, 259, 6], [0.0, 1.0, 1.0], "rows:7")]  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="rows:7: token 259 is not one of the teacher's"):
        stage.run(ModelConfig(source="tiny:llama", add_tokens=["<think>"]), tmp_path, 0)


def test_a_divergence_from_outside(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_divergence.py").write_text(
        "def total_variation(student, teacher, *, power: float = 1.0):\n"
        "    return ((student.exp() - teacher.exp()).abs() ** power).sum(-1) / 2\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    divergence = {"name": "my_divergence:total_variation", "power": 2.0}
    made = run(stage_of(rows, divergence=divergence, max_steps=1), tmp_path / "a")
    assert 0 < made[0]["loss"] < 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": {}}, "either a model .* or behind a server"),
        ({"data": None}, "give data .* or problems"),
        ({"data": None, "problems": {"kind": "lab"}}, "problems have no answers"),
        ({"divergence": None}, "use method: sft"),
        ({"divergence": None, "teacher_text": True, "on_policy": 0.5}, "on_policy needs a divergence"),
        ({"divergence": None, "teacher_text": True, "top_k": 3}, "top_k is for a divergence"),
        ({"divergence": {"name": "jsd", "beta": 1.0}}, "beta"),
        ({"divergence": "hinge"}, "hinge"),
        ({"answers": 2}, "answers would do nothing"),
        ({"group_size": 2}, "group_size would do nothing"),
        ({"teacher_text": True, "on_policy": 1.0}, "no answer of the teacher"),
        ({"teacher": {"server": {"model": "m"}}}, "of what it writes itself"),
        ({"teacher": {"server": {"model": "m"}}, "teacher_text": True}, "20 likeliest"),
        (
            {"teacher": {"server": {"model": "m"}}, "teacher_text": True, "top_k": 5, "temperature": 2.0},
            "temperature 1",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    base: dict[str, Any] = {"method": "distill", "data": {"source": "x.jsonl"}, "teacher": "tiny:llama"}
    with pytest.raises(ValidationError, match=message):
        DistillConfig.model_validate(base | changes)


def test_the_student_opens_in_transformers(rows: Path, tmp_path: Path) -> None:
    run(stage_of(rows, max_steps=1), tmp_path / "a")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "model").config.model_type == "llama"
