"""Ratings, thumbs and choices into pairs: strengths worked out by hand; what is wrong is said by row."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain.config.feedback import CandidatesConfig, PairsConfig, RatingsConfig, ThumbsConfig
from posttrain.core.errors import DataError
from posttrain.data.comparisons import AnswerPair, Candidate, choose_pairs, labelled_row, preference_share
from posttrain.data.human_feedback import Answers, read_answers

KINDS = {"ratings": RatingsConfig, "pairs": PairsConfig, "candidates": CandidatesConfig, "thumbs": ThumbsConfig}


def read(
    tmp_path: Path, kind: str, rows: list[dict[str, Any]], data: dict[str, Any] | None = None, **more: Any
) -> Answers:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return read_answers(KINDS[kind].model_validate({"data": {"source": str(path), **(data or {})}, **more}))


def rated(*values: float, named: bool = False, **more: Any) -> Candidate:
    return Candidate("x", ratings=dict(zip("abcdefgh", values, strict=False)), named=named, **more)


def test_shares_by_hand() -> None:
    """(3, 1) over (2, 1): pairs 3>2, 3>1, 1<2, 1=1 → (1 + 1 + 0 + 1/2) / 4."""
    assert preference_share(rated(3, 1), rated(2, 1)) == pytest.approx(0.625)
    assert preference_share(rated(2, 1), rated(3, 1)) == pytest.approx(0.375)
    # The same people rated both: each is compared with himself. 3>2, 1=1.
    assert preference_share(rated(3, 1, named=True), rated(2, 1, named=True)) == pytest.approx(0.75)
    # Means 1 and 0, spreads 3 and 4: Phi(1/5) = 0.579260
    one, two = Candidate("x", mean=1.0, spread=3.0), Candidate("y", mean=0.0, spread=4.0)
    assert preference_share(one, two) == pytest.approx(0.5792597, abs=1e-6)
    assert preference_share(Candidate("x", mean=1.0), Candidate("y", mean=0.0)) == 1.0
    with pytest.raises(ValueError, match="no rating"):
        preference_share(one, Candidate("z"))


def test_the_normal_approximation_is_near_the_share_of_raters() -> None:
    """The movie reviews, by their ratings and by mean and spread alone: the same pairs, almost the same strengths."""
    data = {"source": "packaged:movie_reviews.tsv", "prompt": "Write.", "completion": "{text}"}
    data |= {"shuffle_seed": 1, "rows": [0, 400]}
    both = [
        read_answers(RatingsConfig(data=data, pairs_per_prompt=300, **how))
        for how in ({"ratings": "ratings"}, {"mean": "mean_rating", "spread": "std"})
    ]
    by = [{p.source: p for p in a.pairs} for a in both]
    shared = by[0].keys() & by[1].keys()
    assert len(shared) > 280
    gaps = [abs((by[0][s].human or 0) - (by[1][s].human or 0)) for s in shared]
    assert max(gaps) < 0.15 and float(np.mean(gaps)) < 0.03
    assert all(by[0][s].margin == pytest.approx(by[1][s].margin, abs=1e-3) for s in shared)
    raters = both[0].raters
    assert raters["units"] == 400 and 15 <= raters["ratings_per_unit"] <= 29
    assert 0.7 < raters["alpha"]["interval"] < 0.9 and raters["alpha"]["nominal"] < raters["alpha"]["ordinal"]
    assert 0.8 < raters["mean_probability"] < 0.9


def test_several_raters_in_every_form(tmp_path: Path) -> None:
    """A list, text, a mapping by rater, and one rating a row: the same two answers, (3, 1) against (2, 1)."""
    lists = [{"prompt": "p", "completion": c, "r": r} for c, r in (("a", [3, 1]), ("b", "2,1"))]
    (pair,) = read(tmp_path, "ratings", lists, ratings="r").pairs
    assert (pair.a, pair.b, pair.human, pair.margin) == ("a", "b", pytest.approx(0.625), 0.5)
    named = [{"prompt": "p", "completion": c, "r": r} for c, r in (("a", {"x": 3, "y": 1}), ("b", {"x": 2, "y": 1}))]
    assert read(tmp_path, "ratings", named, ratings="r").pairs[0].human == pytest.approx(0.75)
    long = [
        {"prompt": "p", "completion": c, "r": r, "who": w}
        for c, r, w in (("a", 3, "x"), ("b", 2, "x"), ("a", 1, "y"), ("b", 1, "y"))
    ]
    answers = read(tmp_path, "ratings", long, ratings="r", rater="who")
    assert answers.pairs[0].human == pytest.approx(0.75) and answers.raters["units"] == 2
    assert read(tmp_path, "ratings", long, ratings="r").pairs[0].human == pytest.approx(0.625)
    row = labelled_row(answers.pairs[0], 0.75, 0.5)
    assert row["chosen"] == "a" and row["probability"] == 0.75 and row["margin"] == 0.5
    turned = labelled_row(AnswerPair("p", "a", "b"), 0.25, -0.5)
    assert (turned["chosen"], turned["rejected"], turned["probability"], turned["margin"]) == ("b", "a", 0.75, 0.5)


def test_choices_of_several_people_become_one_pair(tmp_path: Path) -> None:
    """Three of four chose x: 0.75, margin 0.5; who chose does not depend on the order in the file."""
    rows = [{"prompt": "p", "chosen": c, "rejected": r} for c, r in ("xy", "yx", "xy", "xy")]
    answers = read(tmp_path, "pairs", [*rows, {"prompt": "q", "chosen": "u", "rejected": "v", "probability": 0.8}])
    first, second = answers.pairs
    assert (first.a, first.b, first.human, first.margin) == ("x", "y", 0.75, 0.5)
    assert second.human == pytest.approx(0.8) and answers.raters["units"] == 1
    hh = {"chosen": "\n\nHuman: hi\n\nAssistant: yes", "rejected": "\n\nHuman: hi\n\nAssistant: no"}
    (pair,) = read(tmp_path, "pairs", [hh]).pairs
    assert (pair.prompt, pair.a, pair.b, pair.human) == ("hi", "no", "yes", 0.0)


def test_thumbs(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "completion": c, "label": v}
        for c, v in (("a", True), ("a", "up"), ("a", "down"), ("b", 0), ("c", 1), ("c", "bad"))
    ]
    answers = read(tmp_path, "thumbs", rows)
    assert [(t["completion"], t["label"], t["ratings"]) for t in answers.thumbs] == [("a", True, 3), ("b", False, 1)]
    assert answers.thumbs[0]["probability"] == pytest.approx(2 / 3)
    assert answers.stats["dropped"]["as many up as down"] == 1
    # a (2/3 up) over b (0): two of three raters of a are above b's, one equal: (1 + 1 + 1/2) / 3
    assert next(p for p in answers.pairs if p.b == "b").human == pytest.approx(2.5 / 3)


def test_candidates(tmp_path: Path) -> None:
    row = {"prompt": "p", "completions": ["one", {"response": "two", "score": 3}, {"text": "three", "score": 1}]}
    answers = read(tmp_path, "candidates", [row])
    assert [(p.a, p.b, p.human) for p in answers.pairs] == [
        ("one", "two", None),
        ("one", "three", None),
        ("two", "three", 1.0),
    ]


TURNS = [{"role": "user", "content": "p"}]
BAD = {
    "pairs": [
        ({"prompt": "p", "chosen": "x", "rejected": " x"}, "the two answers are equal"),
        ({"prompt": "p", "chosen": "x", "rejected": " "}, "the rejected answer is empty"),
        ({"prompt": "p", "chosen": "p", "rejected": "x"}, "the answer is the prompt again"),
        ({"prompt": "p", "chosen": "x", "rejected": None}, "missing field 'rejected'"),
        ({"prompt": "p", "chosen": "x", "rejected": "y", "probability": 1.5}, "probability is 1.5, expected 0 to 1"),
        (
            {"chosen": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "x"}],
             "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "y"}]},
            "the prompts don't match",
        ),
        ({"prompt": " ", "chosen": "x", "rejected": "y"}, "empty prompt"),
        ({"prompt": "p", "chosen": "x", "rejected": [*TURNS, {"role": "assistant", "content": "y"}]}, "one answer is"),
        (
            {"prompt": "q", "chosen": [*TURNS, {"role": "assistant", "content": "x"}],
             "rejected": [*TURNS, {"role": "assistant", "content": "y"}]},
            "the prompts don't match",
        ),
        (
            {"chosen": [*TURNS, {"role": "assistant", "content": "x"}, {"role": "user", "content": "so?"}],
             "rejected": [*TURNS, {"role": "assistant", "content": "x"}, {"role": "user", "content": "and?"}]},
            "the last turn is not the assistant's",
        ),
    ],
    "ratings": [
        ({"prompt": "p", "completion": "", "r": [1]}, "empty answer"),
        ({"prompt": "", "completion": "x", "r": [1]}, "empty prompt"),
        ({"prompt": "p", "completion": "p", "r": [1]}, "the answer is the prompt again"),
        ({"prompt": "p", "completion": "x", "r": []}, "no rating in 'r'"),
        ({"prompt": "p", "completion": "x", "r": "1,good"}, "r is 'good', expected a number"),
        ({"prompt": "p", "completion": "x", "r": "1,inf"}, "r is 'inf', expected a number"),
    ],
    "thumbs": [({"prompt": "p", "completion": "x", "label": "maybe"}, "label out of range: it is 'maybe'")],
    "candidates": [
        ({"prompt": "p", "completions": "x"}, "completions: expected a list of answers"),
        ({"prompt": "p", "completions": ["x", "y", ""]}, "empty answer"),  # nor are the others of the row used
    ],
}  # fmt: skip
GOOD: dict[str, list[dict[str, Any]]] = {
    "pairs": [{"prompt": "p", "chosen": "g", "rejected": "h"}],
    "ratings": [{"prompt": "p", "completion": c, "r": [n]} for n, c in enumerate("gh")],
    "thumbs": [{"prompt": "p", "completion": c, "label": n} for n, c in enumerate("gh")],
    "candidates": [{"prompt": "p", "completions": ["g", "h"]}],
}


@pytest.mark.parametrize(
    ("kind", "row", "reason"), [(k, *case) for k, cases in BAD.items() for case in cases], ids=lambda v: str(v)[:24]
)
def test_bad_rows_are_said_by_row_or_left_out_and_counted(
    kind: str, row: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    more = {"ratings": "r"} if kind == "ratings" else {}
    with pytest.raises(DataError, match=rf"rows.jsonl:{len(GOOD[kind]) + 1}: {reason}"):
        read(tmp_path, kind, [*GOOD[kind], row], **more)
    answers = read(tmp_path, kind, [*GOOD[kind], row], {"on_bad_row": "skip"}, **more)
    assert sum(answers.stats["dropped"].values()) == 1 and len(answers.pairs) == 1
    assert reason in answers.stats["bad_rows"][0]["reason"]


def test_pairs_that_teach_nothing_are_counted(tmp_path: Path) -> None:
    """A tie; within min_margin; means 1 and 0.75 with most pairs of ratings the other way."""
    rows = [
        {"prompt": p, "completion": c, "r": r}
        for p, c, r in (
            ("tie", "a", [1, 3]), ("tie", "b", [2, 2]),
            ("near", "a", [1]), ("near", "b", [1.1]),
            ("odd", "a", [4, 0, 0, 0]), ("odd", "b", [0, 1, 1, 1]),
            ("fine", "a", [4]), ("fine", "b", [1]), ("alone", "a", [1]),
        )
    ]  # fmt: skip
    answers = read(tmp_path, "ratings", rows, ratings="r", min_margin=0.2)
    assert [p.prompt for p in answers.pairs] == ["fine"]
    assert {"source": "rows.jsonl:1 rows.jsonl:2", "reason": "tie"} in answers.stats["left_out"]
    assert len(answers.stats["left_out"]) == 4
    assert answers.stats["dropped"] == {
        "tie": 1, "within min_margin": 1, "means and raters disagree": 1, "a prompt's only answer": 1,
    }  # fmt: skip
    with pytest.raises(DataError, match="no pair comes out of 2 rows \\(1 tie\\)"):
        read(tmp_path, "ratings", rows[:2], ratings="r")
    with pytest.raises(DataError, match="no column 'stars'; the columns are"):
        read(tmp_path, "ratings", rows, ratings="stars")


def test_drawn_pairs_use_every_answer_alike() -> None:
    rng = np.random.default_rng(0)
    pairs = choose_pairs(40, 60, rng)
    assert len(pairs) == len(set(pairs)) == 60 and all(i < j for i, j in pairs)
    uses = Counter(n for pair in pairs for n in pair)
    assert set(uses.values()) <= {2, 3, 4} and len(uses) == 40
    assert choose_pairs(4, 0, rng) == choose_pairs(4, 6, rng) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    assert choose_pairs(1, 5, rng) == []
