"""Making a laboratory, much too small to be any good."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.config import DataConfig, ModelConfig
from posttrain.core.errors import ModelError
from posttrain.data.prompt_sources import RowPrompts
from posttrain.lab.lab_settings import LabSettings
from posttrain.lab.make_lab import make_lab
from posttrain.lab.sums_lab import check_answers
from posttrain.models import loading as load
from posttrain.models.language_model import LanguageModel
from tests.data.tables import load_prompt_rows

TINY = LabSettings(
    steps=3, batch_size=8, width=16, layers=1, heads=2, train_problems=20, held_out_problems=10, measured=8
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lab") / "made" / "here"
    make_lab(TINY, folder, shown=False)
    return folder


def test_transformers_opens_it(folder: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == model.config.eos_token_id
    assert tokenizer.chat_template is None
    ids = tokenizer("1+2+3+4=", return_tensors="pt")
    assert set(ids) == {"input_ids", "attention_mask"}
    assert model.generate(**ids, max_new_tokens=4, do_sample=False).shape[1] > ids["input_ids"].shape[1]
    assert {p.name for p in folder.parent.iterdir()} == {folder.name}  # nothing half-made lies about


def test_lab_json_and_problems(folder: Path) -> None:
    said = json.loads((folder / "lab.json").read_text())
    assert said["settings"]["steps"] == 3
    assert said["parameters"] == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters())
    assert {"greedy", "greedy_by_style", "sampled", "mixed", "seconds"} <= set(said)
    for name, count in (("problems", 20), ("held_out", 10)):
        data = DataConfig(source=str(folder / f"{name}.jsonl"), chat=False)
        rows = load_prompt_rows(RowPrompts.Config(data=data))
        assert len(rows) == count
        assert all(eval(r["prompt"].removesuffix("=")) == int(r["answer"]) for r in rows)


def test_the_same_settings_make_the_same_weights(folder: Path, tmp_path: Path) -> None:
    make_lab(TINY, tmp_path / "again", shown=False)
    a, b = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (folder, tmp_path / "again"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_only_a_laboratory_is_replaced(folder: Path, tmp_path: Path) -> None:
    make_lab(TINY, tmp_path / "one", shown=False)
    make_lab(TINY, tmp_path / "one", shown=False)
    assert [p.name for p in tmp_path.iterdir()] == ["one"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("kept")
    with pytest.raises(ModelError, match="no laboratory"):
        make_lab(TINY, tmp_path / "mine", shown=False)
    assert (tmp_path / "mine" / "file").read_text() == "kept"


def test_lab_sources(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path))
    load.lab_folder(7).parent.mkdir(parents=True)
    load.lab_folder(7).symlink_to(folder)
    assert load.resolve("lab:7") == load.Resolved(str(load.lab_folder(7)), "folder")
    model, tokenizer = load.load_model(ModelConfig(source="lab:7"))
    assert model.config.hidden_size == 16
    with pytest.raises(ModelError, match="lab:SEED"):
        load.resolve("lab:seven")


def test_answers_are_judged_by_their_last_line_and_must_end(folder: Path) -> None:
    """A model whose head is made to say one token alone: what it says after an opening is known."""
    hf, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rows = [{"prompt": "1+1+1+1=", "answer": "4"}, {"prompt": "1+1+1+2=", "answer": "5"}]
    policy = LanguageModel(hf)

    def always(token: int) -> None:
        with torch.no_grad():  # the last norm's output is its weight times a unit vector: a single direction is left
            hf.model.norm.weight.zero_()
            hf.lm_head.bias = torch.nn.Parameter(torch.nn.functional.one_hot(torch.tensor(token), len(tokenizer)) * 9.0)

    four = tokenizer("4")["input_ids"][0]
    always(four)
    assert check_answers(policy, tokenizer, rows) == [[False], [False]]  # 444..., which never ends
    always(tokenizer.eos_token_id)
    assert check_answers(policy, tokenizer, rows) == [[False], [False]]  # nothing
