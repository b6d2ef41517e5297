"""The laboratory that writes reviews: what it reads, that the rest stays out, that it can be made and opened."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from posttrain.config import ModelConfig
from posttrain.data.rows import open_rows
from posttrain.data.sft_rows import prepare
from posttrain.lab.lab_settings import LabSettings
from posttrain.lab.make_lab import make_lab
from posttrain.lab.reviews_lab import ReviewsLab, reviews_data, reviews_tokenizer
from posttrain.models import loading as load

TINY = LabSettings(kind="reviews", steps=2, batch_size=4, width=16, layers=1, heads=2, measured=6)
TOKENIZER = reviews_tokenizer()


@pytest.fixture(scope="module")
def lab() -> ReviewsLab:
    return ReviewsLab(LabSettings(batch_size=1000), TOKENIZER)


def test_it_reads_every_review_once_a_pass_and_none_of_the_others(lab: ReviewsLab) -> None:
    read = lab.batch
    first = [tuple(s.tokens) for step in range(9) for s in read(step)]
    second = [tuple(s.tokens) for step in range(9, 18) for s in read(step)]
    assert len(first) == 9000 and sorted(first) == sorted(second) and first != second
    assert [tuple(s.tokens) for s in read(3)] == first[3000:4000]  # whatever was read before
    other = ReviewsLab(LabSettings(seed=1, batch_size=1000), TOKENIZER)
    other.samples = lab.samples  # tokenised once
    assert [tuple(s.tokens) for s in other.batch(0)] != first[:1000]
    others = [tuple(s.tokens) for s in prepare(reviews_data((9000, 10605)), TOKENIZER).samples]
    assert len(others) == 1605 and len(set(others) - set(first)) > 1590  # some reviews are there twice


def test_the_tokenizer_gives_every_review_back_with_its_end(lab: ReviewsLab) -> None:
    texts = set(open_rows(reviews_data((0, 10_605))).read(lambda row: f"Movie review: {row.row['text']}"))
    for sample in lab.batch(0)[:300]:
        assert sample.tokens[-1] == TOKENIZER.eos_token_id and TOKENIZER.decode(sample.tokens[:-1]) in texts
        assert list(sample.weights) == [0.0] + [1.0] * (len(sample.tokens) - 1) and len(sample.tokens) < 256
    assert len(TOKENIZER) == 4096 and len(TOKENIZER("Movie review:")["input_ids"]) <= 4


def test_it_is_made_measured_and_opened_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path))
    folder = load.lab_folder(3, "reviews")
    said = make_lab(TINY, folder, shown=False)
    assert json.loads((folder / "lab.json").read_text()) == said and said["settings"]["kind"] == "reviews"
    for name in ("lab:reviews:3", "lab:reviews:003"):
        assert load.resolve(name) == load.Resolved(str(folder), "folder")
    assert load.lab_folder(3) != folder
    _, tokenizer = load.load_model(ModelConfig(source="lab:reviews:3"))
    hf = AutoModelForCausalLM.from_pretrained(folder)
    total = tokens = size = 0.0
    for sample in prepare(reviews_data((9000, 9006)), tokenizer).samples:  # one by one, by transformers alone
        ids = torch.tensor([list(sample.tokens)])
        total += float(hf(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
        size += len(tokenizer.decode(ids[0, :-1]).encode()) + 1
    assert said["held_out_loss"] == pytest.approx(total / tokens, abs=2e-4)
    assert said["bits_per_byte"] == pytest.approx(total / size / math.log(2), abs=2e-4)
    assert "6 reviews" in ReviewsLab.describe(said)
