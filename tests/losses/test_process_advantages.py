"""Process supervision by hand, and against a loop."""

from __future__ import annotations

import pytest
import torch

from posttrain.losses.process_advantages import Relative, at_last_tokens, from_steps_on, relative_steps


def long(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.long)


# Group 0: completion 0 with steps 1, 0; completion 1 with steps 1, 1, 1. Group 1: completion 2 with one step.
SCORES = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 3.0], dtype=torch.float64)
GROUP, COMPLETION = long(0, 0, 0, 0, 0, 1), long(0, 0, 1, 1, 1, 2)


def test_relative_by_hand() -> None:
    # Group 0 has mean 4/5 and variance (4 * 0.04 + 0.64) / 4 = 0.2.
    s = 0.2**0.5 + 1e-4
    group = relative_steps(SCORES, GROUP, COMPLETION, "group")
    assert group.tolist() == pytest.approx([0.2 / s, -0.8 / s, 0.2 / s, 0.2 / s, 0.2 / s, 0])
    centred = relative_steps(SCORES, GROUP, COMPLETION, "centred")
    assert centred.tolist() == pytest.approx([0.2, -0.8, 0.2, 0.2, 0.2, 0])
    # Of completion 0 the others have mean 1; of completion 1 they have mean 1/2; completion 2 has no others.
    others = relative_steps(SCORES, GROUP, COMPLETION, "leave_one_out")
    assert others.tolist() == pytest.approx([0, -1, 0.5, 0.5, 0.5, 0])
    # All six: mean 7/6.
    batch = relative_steps(SCORES, GROUP, COMPLETION, "batch")
    assert batch.tolist() == pytest.approx([-1 / 6, -7 / 6, -1 / 6, -1 / 6, -1 / 6, 11 / 6])


def test_tokens_by_hand() -> None:
    # Two completions of 5 and 3 tokens; the first's steps end at tokens 1 and 3, the second's at its first token.
    sequence = long(0, 0, 0, 0, 0, 1, 1, 1)
    values, last = torch.tensor([0.5, -2.0, 3.0]), long(1, 3, 5)
    assert at_last_tokens(values, last, sequence).tolist() == [0, 0.5, 0, -2, 0, 3, 0, 0]
    assert from_steps_on(values, last, sequence).tolist() == [-1.5, -1.5, -2, -2, 0, 3, 0, 0]
    both = at_last_tokens(values, long(1, 1, 5), sequence)
    assert both.tolist() == [0, -1.5, 0, 0, 0, 3, 0, 0]


def test_degenerate_cases() -> None:
    empty = torch.zeros(0, dtype=torch.float64)
    for kind in ("group", "centred", "leave_one_out", "batch"):
        assert relative_steps(empty, long(), long(), kind).shape == (0,)
        equal = torch.full((7,), 0.1, dtype=torch.float64)
        got = relative_steps(equal, long(0, 0, 0, 0, 0, 1, 1), long(0, 0, 1, 1, 1, 2, 2), kind)
        assert not got.any(), kind  # exactly 0
    assert from_steps_on(empty, long(), long(0, 0)).tolist() == [0, 0]
    with pytest.raises(ValueError, match="one score, group and completion a step"):
        relative_steps(SCORES, GROUP[:2], COMPLETION, "group")
    with pytest.raises(ValueError, match="last tokens must be from 0 to 1, and are up to 2"):
        from_steps_on(torch.ones(1), long(2), long(0, 0))


@pytest.mark.parametrize("kind", ["group", "centred", "leave_one_out", "batch"])
def test_a_slow_loop(kind: Relative) -> None:
    g = torch.Generator().manual_seed(3)
    lengths = [int(n) for n in torch.randint(1, 12, (9,), generator=g)]
    sequence = long(*[i for i, n in enumerate(lengths) for _ in range(n)])
    steps = []  # (completion, group, last token within it, score)
    for i, n in enumerate(lengths):
        for t in range(n):
            if i != 4 and float(torch.rand((), generator=g)) < 0.4:
                steps.append((i, i // 3, t, float(torch.rand((), generator=g, dtype=torch.float64))))
    starts = [sum(lengths[:i]) for i in range(9)]
    order = torch.randperm(len(steps), generator=g).tolist()
    chosen = [steps[j] for j in order]
    scores = torch.tensor([s[3] for s in chosen], dtype=torch.float64)
    completion, group = long(*[s[0] for s in chosen]), long(*[s[1] for s in chosen])
    got = relative_steps(scores, group, completion, kind)
    flat = from_steps_on(got, long(*[starts[s[0]] + s[2] for s in chosen]), sequence)

    def expected(step: tuple[int, int, int, float]) -> float:
        mates = [s for s in steps if s[1] == step[1]] if kind != "batch" else steps
        if kind == "leave_one_out":
            mates = [s for s in mates if s[0] != step[0]]
        values = [s[3] for s in mates]
        mean = sum(values) / len(values)
        spread = (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5 + 1e-4 if kind == "group" else 1
        return (step[3] - mean) / spread

    at = 0
    for i, n in enumerate(lengths):
        for t in range(n):
            slow = sum(expected(s) for s in steps if s[0] == i and s[2] >= t)
            assert float(flat[at]) == pytest.approx(slow, abs=1e-12)
            at += 1
