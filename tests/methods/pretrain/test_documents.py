"""Documents are cut without loss of a token, mixed with general text at its share, and read from text files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from posttrain.config import DataConfig, ModelConfig, OptimizerConfig, SystemsConfig
from posttrain.core.epoch_order import RowWeights
from posttrain.core.errors import DataError
from posttrain.core.types import Sample
from posttrain.data.readers import find_sources
from posttrain.data.text_documents import (
    TokenStream,
    cut_document,
    document_numbers,
    document_sizes,
    mixed_batches,
    piece_bytes,
    prepare_documents,
)
from posttrain.data.text_files import text_files
from posttrain.models.language_model import LanguageModel
from posttrain.models.loading import load_tokenizer
from posttrain.models.tiny_model import tiny_model
from posttrain.recipe.machine_checks import check_machine
from posttrain.runs.inputs import find_inputs
from posttrain.trainer.train_step import Learner

TOKENIZER = load_tokenizer(ModelConfig(source="tiny:llama"))


def test_a_document_is_cut_with_context() -> None:
    weights = [0.0, *[1.0] * 6]
    assert cut_document(range(10, 17), weights, 4, 1) == [
        ([10, 11, 12, 13], [0, 1, 1, 1]),
        ([13, 14, 15, 16], [0, 1, 1, 1]),
    ]
    assert cut_document(range(10, 17), weights, 5, 2)[1:] == [([13, 14, 15, 16], [0, 0, 1, 1])]
    assert cut_document([7, 8], [0.0, 1.0], 4, 3) == [([7, 8], [0, 1])]


@pytest.mark.parametrize("length,overlap", [(2, 1), (5, 1), (8, 3), (8, 7)])
def test_every_token_is_trained_once(length: int, overlap: int) -> None:
    for size in range(2, 40):
        pieces = cut_document(range(size), [0.0, *[1.0] * (size - 1)], length, overlap)
        trained = [t for tokens, weights in pieces for t, w in zip(tokens, weights, strict=True) if w]
        assert trained == list(range(1, size))
        assert all(len(t) <= length and len(t) == len(w) and any(w) for t, w in pieces)


def test_text_files_and_folders_are_documents(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "b").mkdir(parents=True)
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n%\n\n%\nthree\n")
    (folder / "b" / "c.md").write_text("# four\n")
    (folder / ".hidden.txt").write_text("no")
    (folder / "bad.txt").write_bytes(b"\xff\xff")
    assert [p.name for p in text_files(folder)] == ["a.txt", "c.md", "bad.txt"]
    (source,) = find_sources(DataConfig(source=str(folder), separator="%"))
    found = list(source.scan())
    assert [f.row["text"] for f in found[:3]] == ["one\ntwo", "three", "# four"]  # type: ignore[index]
    assert "UTF-8" in str(found[3].row) and [f.number for f in found] == [1, 2, 3, 4]
    assert [source.rows.row_at(f.position) for f in found[:3]] == [f.row for f in found[:3]]
    before = source.hash
    (folder / "a.txt").write_text("other")
    (again,) = find_sources(DataConfig(source=str(folder)))
    assert again.hash != before
    with pytest.raises(DataError, match="changed after it was opened"):
        source.check_unchanged()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"or a folder with \.txt or \.md files"):
        find_sources(DataConfig(source=str(tmp_path / "empty")))


def test_recipes_check_and_hash_folders(tmp_path: Path) -> None:
    import posttrain

    (tmp_path / "texts").mkdir()
    stage = {"method": "pretrain", "data": {"source": str(tmp_path / "texts")}}
    recipe = posttrain.Recipe.model_validate({"name": "r", "model": {"source": "tiny:llama"}, "stages": [stage]})
    with pytest.raises(posttrain.core.errors.RecipeError, match=r"folder with \.txt or \.md files"):
        check_machine(recipe)
    (tmp_path / "texts" / "a.md").write_text("text")
    check_machine(recipe)
    first = find_inputs(recipe, {})[str(tmp_path / "texts")]
    (tmp_path / "texts" / "a.md").write_text("another")
    assert find_inputs(recipe, {})[str(tmp_path / "texts")] != first


def documents(tmp_path: Path, texts: list[str], length: int, overlap: int = 1):  # type: ignore[no-untyped-def]
    path = tmp_path / "texts.txt"
    path.write_text("\n%\n".join(texts), encoding="utf-8")
    data = DataConfig(source=str(path), separator="%")
    return prepare_documents(data, TOKENIZER, context=2048, length=length, overlap=overlap)


def test_pieces_know_their_documents_and_bytes(tmp_path: Path) -> None:
    texts = ["é" * 30, "short", "another of many letters"]
    found = documents(tmp_path, texts, 16)
    encoded = [TOKENIZER(t, add_special_tokens=False)["input_ids"] for t in texts]
    numbers = document_numbers(found.samples)
    assert len(found) > 3 and sorted(set(numbers)) == [0, 1, 2]
    for i, ids in enumerate(encoded):
        pieces = [found.samples[int(n)] for n in np.flatnonzero(numbers == i)]
        trained = [t for p in pieces for t, w in zip(p.tokens, p.weights, strict=True) if w]
        assert trained == [*ids, TOKENIZER.eos_token_id]  # from the first token of the text to the end of the document
    sizes, tokens = document_sizes(found.samples)
    assert sizes.tolist() == [60, 5, 23] and tokens.tolist() == [len(ids) + 1 for ids in encoded]
    assert np.bincount(numbers, piece_bytes(found.samples)) == pytest.approx([60, 5, 23])
    assert found.stats["used"] == 3 and found.stats["bytes"] == 88
    with pytest.raises(DataError, match="sequence_length is 4096"):
        documents(tmp_path, texts, 4096)


def test_a_packed_batch_has_the_gradients_of_documents_alone(tmp_path: Path) -> None:
    samples = list(documents(tmp_path, ["one two", "a longer document of words", "one two three"], 12, 3).samples)
    packed, alone = LanguageModel(tiny_model("llama")), tiny_model("llama")
    Learner.step(_no_update(packed), samples)
    total = sum(sum(s.weights) for s in samples)
    for s in samples:  # transformers' own forward, a sequence at a time
        logits = alone(input_ids=torch.tensor([list(s.tokens)])).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, torch.tensor(list(s.tokens[1:])), reduction="none")
        (losses @ torch.tensor(list(s.weights[1:])) / total).backward()
    theirs = dict(alone.named_parameters())
    for name, p in packed.hf.named_parameters():
        torch.testing.assert_close(p.grad, theirs[name].grad, atol=2e-5, rtol=1e-4)


def _no_update(model: LanguageModel) -> Learner:
    """A learner whose step leaves the gradients."""
    learner = Learner(model, OptimizerConfig(max_grad_norm=0), SystemsConfig(), 1)
    learner.optimizer.step = lambda lr: None  # type: ignore[method-assign]
    return learner


def stream(seed: int, sizes: list[int], weights: RowWeights | None = None) -> TokenStream:
    lengths = np.array(sizes)
    return TokenStream(lengths, lengths - 1, seed, weights)


def test_general_text_has_its_share_of_every_stretch() -> None:
    rng = np.random.default_rng(0)
    domain = stream(1, rng.integers(2, 40, 300).tolist())
    general = stream(2, rng.integers(2, 40, 50).tolist())
    arguments = {"budget": 128, "epochs": 2.0, "max_steps": None}
    batches = mixed_batches(domain, general, 0.25, **arguments)  # type: ignore[arg-type]
    again = mixed_batches(domain, general, 0.25, **arguments)  # type: ignore[arg-type]
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))
    numbers = np.concatenate(batches)
    assert np.bincount(numbers[numbers >= 0]).tolist() == [2] * 300  # two epochs of the domain
    counts = np.bincount(-1 - numbers[numbers < 0], minlength=50)
    assert counts.max() - counts.min() <= 1  # general text is repeated evenly
    lengths = np.array([domain.lengths[n] if n >= 0 else general.lengths[-1 - n] for n in numbers])
    sums = [sum(lengths[i] for i in range(s, s + len(b))) for s, b in zip(_starts(batches), batches, strict=True)]
    assert max(sums) <= 128 and min(sums[:-1]) > 128 - 40
    tokens = np.cumsum(lengths - 1)
    share = np.cumsum(np.where(numbers < 0, lengths - 1, 0))
    assert np.abs(share - 0.25 * tokens).max() <= 39  # off by no more than a piece, anywhere


def _starts(batches: list[np.ndarray]) -> np.ndarray:
    return np.cumsum([0, *map(len, batches[:-1])])


def test_batches_of_a_number_of_steps() -> None:
    domain = stream(3, [5, 4, 9], RowWeights(np.array([0, 0, 1]), [2.0, 1.0]))
    batches = mixed_batches(domain, None, 0.0, budget=10, epochs=1.0, max_steps=20)
    assert len(batches) == 20 and all(domain.lengths[b].sum() <= 10 for b in batches)
    epoch = np.concatenate(mixed_batches(domain, None, 0.0, budget=10, epochs=1.0, max_steps=None))
    assert sorted(epoch) == [0, 0, 1, 1, 2]
    assert [len(b) for b in mixed_batches(stream(0, [50]), None, 0.0, budget=10, epochs=2.0, max_steps=None)] == [1, 1]


def test_chats_are_documents_too(tmp_path: Path) -> None:
    """Rows with a chat are rendered, and all of their tokens carry loss."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "2 + 2?", "completion": "4"}\n')
    found = prepare_documents(DataConfig(source=str(path)), TOKENIZER, context=2048, length=64, overlap=1)
    sample: Sample = found.samples[0]
    assert sum(sample.weights) == len(sample) - 1 and found.stats["bytes"] == len("2 + 2?4")
