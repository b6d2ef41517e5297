"""Where steps end, chains as the learner takes them, and rows that come with labels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from posttrain.config import DataConfig
from posttrain.core.errors import DataError
from posttrain.data.process_rows import StepChain, chain_samples, read_step_chains, split_steps
from posttrain.models.tiny_model import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


@pytest.mark.parametrize(
    ("text", "separator", "steps"),
    [
        ("a\nb\nc", "\n", ["a\n", "b\n", "c"]),
        ("a\n\n\nb\n", "\n", ["a\n\n\n", "b\n"]),
        ("\n \na\n \nb", "\n", ["\n \na\n \n", "b"]),
        ("one. two. ", ". ", ["one. ", "two. "]),
        ("a\n\nb\nc", "\n\n", ["a\n\n", "b\nc"]),
        ("just one", "\n", ["just one"]),
        (" \n\n ", "\n", []),
        ("", "\n", []),
        ("a\n  ", "\n", ["a\n  "]),
    ],
)
def test_steps_by_hand(text: str, separator: str, steps: list[str]) -> None:
    spans = split_steps(text, separator)
    assert [text[a:b] for a, b in spans] == steps
    if spans:
        assert "".join(steps) == text  # nothing lost, nothing twice


def test_a_chain_has_weight_at_the_ends_of_its_labelled_steps() -> None:
    """Bytes are tokens here: prompt "ab" is 2 of them, the steps end at 2 + 2 - 1, + 3, + 1."""
    (sample,) = chain_samples([StepChain([10, 11], ["x\n", "yy\n", "z"], [1.0, None, 0.25], 7, "f:1")], TOKENIZER)
    assert len(sample) == 8 and TOKENIZER.decode(list(sample.tokens[2:])) == "x\nyy\nz"
    assert [i for i, w in enumerate(sample.weights) if w] == [3, 7]
    assert sample.meta == {"ends": [3, 7], "targets": [1.0, 0.25], "group": 7, "shared": 2}
    with pytest.raises(ValueError, match=r"2 steps and labels \[None, None\]"):
        chain_samples([StepChain([1], ["a", "b"], [None, None], 0)], TOKENIZER)


def test_rows_with_labels(tmp_path: Path) -> None:
    rows = [
        {"prompt": "2+2?", "steps": ["2+2=4", "so 4"], "labels": [True, 0.5]},
        {"prompt": [{"role": "user", "content": "2+2?"}], "completions": ["5\n", "no"], "labels": [False, None]},
        {"prompt": "1?", "steps": ["1"], "labels": [1]},
    ]
    path = tmp_path / "steps.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    read = read_step_chains(DataConfig(source=str(path)), TOKENIZER, "\n", context=200)
    texts = [TOKENIZER.decode(list(s.tokens)) for s in read.samples]
    asked = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert texts[:2] == [asked + "2+2=4\nso 4", asked + "5\nno"]
    assert [s.meta["targets"] for s in read.samples] == [[1.0, 0.5], [0.0], [1.0]]
    assert [s.meta["group"] for s in read.samples] == [0, 0, 1]
    assert read.stats["used"] == 3 and read.stats["loss_tokens"] == 4


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "steps": ["x", " "], "labels": [1, 1]}, "expected a list of texts, none empty"),
        ({"prompt": "a", "steps": ["x"], "labels": [1, 0]}, r"expected one for each of the 1 steps \(found 2\)"),
        ({"prompt": "a", "steps": ["x"], "labels": [-1]}, "label out of range: it is -1"),
        ({"prompt": "a", "steps": ["x"], "labels": [None]}, "no step has a label"),
        ({"steps": ["x"], "labels": [1]}, "missing field 'prompt'"),
        ({"prompt": "a", "steps": ["x" * 300], "labels": [1]}, r"too long \(\d+ tokens, and the limit is 200\)"),
    ],
)
def test_bad_rows_are_said(row: dict[str, object], reason: str, tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    path.write_text(json.dumps({"prompt": "ok", "steps": ["y"], "labels": [1]}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=f"steps.jsonl:2: .*{reason}"):
        read_step_chains(DataConfig(source=str(path)), TOKENIZER, "\n", context=200)
    skipped = read_step_chains(DataConfig(source=str(path), on_bad_row="skip"), TOKENIZER, "\n", context=200)
    assert len(skipped.samples) == 1 and sum(skipped.stats["dropped"].values()) == 1
