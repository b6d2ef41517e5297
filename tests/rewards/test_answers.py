"""Answers as models write them, in `answers.txt`, each with the verdict that a person gives it.

``python tests/rewards/test_answers.py`` prints both error rates of each reward.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from posttrain.config.rewards import RewardConfig
from posttrain.rewards.reward import build_reward

Row = tuple[str, int, str]


def read_answers() -> dict[str, list[Row]]:
    """Return (label, verdict, answer) by the section's title: a reward, and its options."""
    out: dict[str, list[Row]] = defaultdict(list)
    title = ""
    for line in Path(__file__).with_name("answers.txt").read_text(encoding="utf-8").split("\n"):
        if line.startswith("## "):
            title = line[3:]
        elif " | " in line and title and not line.startswith("# "):
            label, verdict, answer = (line + " ").split(" | ", 2)
            out[title].append((label, int(verdict), answer.removesuffix(" ").replace("⏎", "\n")))
    return out


ANSWERS = read_answers()


def errors_of(title: str) -> tuple[list[Row], list[Row]]:
    """Return the right answers that get nothing, and the wrong ones that are paid."""
    kind, _, options = title.partition(": ")
    reward: Any = build_reward(TypeAdapter(RewardConfig).validate_python({"kind": kind}), {})
    missed, paid = [], []
    for row in ANSWERS[title]:
        label, verdict, answer = row
        given = reward(answer, {"answer": label, "choices": options.split(" | ") if options else None})
        if given != verdict:
            (missed if verdict else paid).append(row)
    return missed, paid


@pytest.mark.parametrize("title", ANSWERS)
def test_every_answer_gets_the_verdict_of_a_person(title: str) -> None:
    assert len(ANSWERS[title]) > 100
    assert errors_of(title) == ([], [])


def main() -> None:
    """Print both error rates of each reward."""
    for title, rows in ANSWERS.items():
        missed, paid = errors_of(title)
        right = sum(verdict for _, verdict, _ in rows)
        print(f"{title}: {len(missed)} of {right} right answers get 0, {len(paid)} of {len(rows) - right} wrong ones 1")
        for row in missed + paid:
            print("   ", row)


if __name__ == "__main__":
    sys.exit(main())
