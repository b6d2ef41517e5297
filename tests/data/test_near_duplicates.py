"""Duplicates as a slow loop over all pairs finds them."""

import random

import numpy as np
import pytest

from posttrain.data import near_duplicates as module
from posttrain.data.near_duplicates import find_duplicates
from posttrain.data.text_similarity import words_of


def slow_shingles(text):
    words = words_of(text)
    return {tuple(words[k : k + 3]) for k in range(max(1, len(words) - 2))} if words else set()


def jaccard(a, b):
    return len(a & b) / len(a | b) if a | b else 0.0


def slow_duplicates(texts, threshold):
    """Return the kept texts: each is compared with all kept ones before it."""
    shingles = [slow_shingles(text) for text in texts]
    kept = []
    for number, text in enumerate(texts):
        same = text in texts[:number]
        if not same and all(jaccard(shingles[number], shingles[k]) < threshold for k in kept):
            kept.append(number)
    return kept


def family(rng, size):
    """Return texts with few words between them, so that many pairs lie near the threshold."""
    vocabulary = [f"w{k}" for k in range(300)]
    texts = []
    while len(texts) < size:
        if texts and rng.random() < 0.6:
            words = rng.choice(texts).split()
            for _ in range(rng.randrange(4)):
                words[rng.randrange(len(words))] = rng.choice(vocabulary)
            texts.append(" ".join(words))
        else:
            texts.append(" ".join(rng.choices(vocabulary, k=rng.randrange(1, 60))))
    return texts


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 1.0])
def test_keeps_what_a_slow_loop_over_all_pairs_keeps(threshold):
    texts = family(random.Random(3), 200)
    found = find_duplicates(texts, threshold)
    assert np.flatnonzero(found.kept).tolist() == slow_duplicates(texts, threshold)
    for number in np.flatnonzero(~found.kept).tolist():
        original = int(found.of[number])
        assert original < number and found.kept[original]
        similarity = jaccard(slow_shingles(texts[number]), slow_shingles(texts[original]))
        assert found.exact[number] == (texts[number] == texts[original])
        assert found.similarity[number] == pytest.approx(similarity, abs=1e-6)


def test_texts_in_parts_are_duplicates_only_if_every_part_is():
    rng = random.Random(7)
    contexts, questions = family(rng, 30), family(rng, 30)
    rows = [(rng.choice(contexts), rng.choice(questions), rng.choice(["yes", "no", ""])) for _ in range(200)]
    found = find_duplicates(rows)
    shingles = [[slow_shingles(part) for part in row] for row in rows]
    kept = []
    for number in range(len(rows)):
        near = [
            all(a == b or jaccard(a, b) >= 0.8 for a, b in zip(shingles[number], shingles[k], strict=True))
            for k in kept
        ]
        if not any(near):
            kept.append(number)
    assert np.flatnonzero(found.kept).tolist() == kept and 20 < len(kept) < 190
    assert find_duplicates([("a b c", "x"), ("x", "a b c"), ("A b c", "X")]).of.tolist() == [-1, -1, 0]
    with pytest.raises(ValueError, match="expected 2 parts"):
        find_duplicates([("a", "b"), ("a",)])


def test_case_and_punctuation_do_not_count_and_arithmetic_does():
    texts = [
        "What is 12 + 30?",
        "what is 12+30",
        "What is 12 - 30?",
        "What is 12 + 31?",
        "",
        "",
        "!!",
        "été là",
        "ÉTÉ, LÀ",
    ]
    found = find_duplicates(texts)
    assert found.of.tolist() == [-1, 0, -1, -1, -1, 4, -1, -1, 7]
    assert found.exact.tolist() == [False] * 5 + [True] + [False] * 3
    assert found.stats == {"texts": 9, "exact": 1, "near": 2, "crowded": 0}


def test_a_copy_of_a_near_duplicate_points_to_the_kept_text():
    first = " ".join(f"w{k}" for k in range(40))
    second = first.replace("w20", "other")
    found = find_duplicates(iter([first, second, second]))
    assert found.of.tolist() == [-1, 0, 0]
    assert not found.exact.any() and found.similarity[2] == found.similarity[1] > 0.8


def test_many_similar_texts_that_are_kept_are_counted_where_not_all_are_compared(monkeypatch):
    monkeypatch.setattr(module, "COMPARED", 5)
    common = " ".join(f"w{k}" for k in range(30))
    texts = [f"{common} {' '.join(f'own{i}x{k}' for k in range(12))}" for i in range(40)]
    found = find_duplicates(texts)
    assert found.kept.all() and found.crowded > 0


def test_result_is_the_same_in_any_division_into_batches(monkeypatch):
    texts = family(random.Random(5), 150)
    whole = find_duplicates(texts)
    monkeypatch.setattr("posttrain.data.word_hashes.BATCH_LETTERS", 100)
    assert find_duplicates(texts).of.tolist() == whole.of.tolist()


def test_nothing_and_thresholds_out_of_range():
    assert len(find_duplicates([]).of) == 0
    for threshold in (0.0, 0.49, 1.01):
        with pytest.raises(ValueError, match="from 0.5 to 1"):
            find_duplicates(["a"], threshold)
