"""pass@k, votes and best of k: numbers worked out by hand, and a loop over every subset."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations

import pytest
import torch

from posttrain.eval.pass_at_k import best_of_k, majority_of_k, pass_at_k, weighted_vote_of_k

T = torch.tensor


def exact(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_pass_at_k_by_hand() -> None:
    # n = 4, c = 1: 1/4; 1 - C(3,2)/C(4,2) = 1 - 3/6; 1 - C(3,3)/C(4,3) = 1 - 1/4; 1
    torch.testing.assert_close(pass_at_k(T([0, 1, 0, 0]), [1, 2, 3, 4]), exact([0.25, 0.5, 0.75, 1.0]))
    # n = 5, c = 2: 2/5; 1 - C(3,2)/C(5,2) = 1 - 3/10; 1 - C(3,3)/C(5,3) = 1 - 1/10; 1; 1
    torch.testing.assert_close(pass_at_k(T([1, 0, 0, 1, 0]), [1, 2, 3, 4, 5]), exact([0.4, 0.7, 0.9, 1.0, 1.0]))
    assert pass_at_k(T([0, 0, 0]), [1, 3]).tolist() == [0.0, 0.0]
    assert pass_at_k(T([1, 1, 1]), [1, 3]).tolist() == [1.0, 1.0]
    # 1 - C(190,100)/C(200,100) = 1 - prod_{i=191}^{200} (100 - (200 - i)) / i
    share = Fraction(1)
    for i in range(191, 201):
        share *= Fraction(i - 100, i)
    value = pass_at_k(T([1] * 10 + [0] * 190), [100])[0].item()
    assert value == pytest.approx(float(1 - share), abs=1e-14)


def test_best_of_k_by_hand() -> None:
    # Scores 3 > 2 > 1, right: the middle one. Of pairs {3,2}, {3,1}, {2,1} the best is right in the last alone.
    torch.testing.assert_close(best_of_k(T([1.0, 3.0, 2.0]), T([0, 0, 1]), [1, 2, 3]), exact([1 / 3, 1 / 3, 0.0]))
    # Two share the top, one of them right: {a,b}: 1/2; {a,c}: 1; {b,c}: 0. All three: 1/2.
    torch.testing.assert_close(best_of_k(T([5.0, 5.0, -1.0]), T([1, 0, 0]), [1, 2, 3]), exact([1 / 3, 0.5, 0.5]))
    assert best_of_k(T([0.0, 0.0]), T([1, 0]), [1, 2]).tolist() == [0.5, 0.5]
    # What could not be scored is taken last.
    assert best_of_k(T([-torch.inf, 0.0]), T([1, 0]), [1, 2]).tolist() == [0.5, 0.0]


def test_majority_of_k_by_hand() -> None:
    # Answers a a b, a right. Pairs: aa: 1; ab, ab: 1/2 each -> 2/3. Three: a.
    torch.testing.assert_close(majority_of_k(T([0, 0, 1]), T([1, 1, 0]), [1, 2, 3]), exact([2 / 3, 2 / 3, 1.0]))
    # a b c, a right: any pair ties, 2 of 3 pairs hold a: 2/3 * 1/2; all three: 1/3.
    torch.testing.assert_close(majority_of_k(T([0, 1, 2]), T([1, 0, 0]), [1, 2, 3]), exact([1 / 3, 1 / 3, 1 / 3]))
    # a, b, none; a right. Pairs: ab: 1/2; a-: 1; b-: 0. All: 1/2. One: 1/3.
    torch.testing.assert_close(majority_of_k(T([0, 1, -1]), T([1, 0, 0]), [1, 2, 3]), exact([1 / 3, 0.5, 0.5]))
    # The wrong answer is more frequent: right less and less often. a a b b b: k = 5 gives b.
    assert majority_of_k(T([0, 0, 1, 1, 1]), T([1, 1, 0, 0, 0]), [5]).tolist() == [0.0]
    assert majority_of_k(T([-1, -1]), T([0, 0]), [1, 2]).tolist() == [0.0, 0.0]


def test_weighted_vote_by_hand() -> None:
    # a: 1 + 1, b: 3, a right. Pairs: aa: 1; ab, ab: b wins. All: b (3 > 2).
    vote = weighted_vote_of_k(T([0, 0, 1]), T([1.0, 1.0, 3.0]), T([1, 1, 0]), [1, 2, 3])
    torch.testing.assert_close(vote, exact([2 / 3, 1 / 3, 0.0]))
    # b: 2 ties with a's 1 + 1 when all vote.
    vote = weighted_vote_of_k(T([0, 0, 1]), T([1.0, 1.0, 2.0]), T([1, 1, 0]), [3])
    assert vote.tolist() == [0.5]
    # 0.1 + 0.2 and 0.3 are a tie too, whatever binary fractions make of them.
    vote = weighted_vote_of_k(T([0, 0, 1]), T([0.1, 0.2, 0.3], dtype=torch.float64), T([1, 1, 0]), [3])
    assert vote.tolist() == [0.5]
    # A negative weight counts against its answer, and what has no answer never wins.
    vote = weighted_vote_of_k(T([0, 1, -1]), T([-1.0, -2.0, 9.0]), T([1, 0, 0]), [3])
    assert vote.tolist() == [1.0]


def one_by_one(kind: str, answers: list[int], scores: list[float], right: list[int], k: int) -> float:
    """The definition: every subset, every winner of it."""
    total, subsets = Fraction(0), list(combinations(range(len(right)), k))
    for subset in subsets:
        if kind == "best":
            top = max(scores[i] for i in subset)
            winners = [i for i in subset if scores[i] == top]
            total += Fraction(sum(right[i] for i in winners), len(winners))
            continue
        sums: dict[int, Fraction] = {}
        for i in subset:
            if answers[i] >= 0:
                sums[answers[i]] = sums.get(answers[i], Fraction(0)) + (1 if kind == "vote" else Fraction(scores[i]))
        tied = [a for a in sums if sums[a] == max(sums.values())]
        for a in tied:
            members = [i for i in subset if answers[i] == a]
            total += Fraction(sum(right[i] for i in members), len(members)) / len(tied)
    return float(total / len(subsets))


@pytest.mark.parametrize("seed", range(8))
def test_every_subset_gone_through_by_a_slow_loop(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    n = 9
    answers = torch.randint(-1, 4, (n,), generator=g)
    scores = torch.randint(-2, 3, (n,), generator=g).double()
    right = torch.randint(0, 2, (n,), generator=g)  # not a function of the answer: a judge may read more than that
    ks = list(range(1, n + 1))
    args = answers.tolist(), scores.tolist(), right.tolist()
    for kind, got in (
        ("best", best_of_k(scores, right, ks)),
        ("vote", majority_of_k(answers, right, ks)),
        ("weighted", weighted_vote_of_k(answers, scores, right, ks)),
    ):
        torch.testing.assert_close(got, exact([one_by_one(kind, *args, k) for k in ks]))


def test_relations_that_must_hold() -> None:
    g = torch.Generator().manual_seed(3)
    answers, right = torch.randint(0, 5, (40,), generator=g), torch.zeros(40)
    right[answers == 2] = 1
    ks = [1, 2, 7, 40]
    # The judge as its own scorer is pass@k; a constant score ranks nothing; equal weights are the plain vote.
    torch.testing.assert_close(best_of_k(right, right, ks), pass_at_k(right, ks))
    torch.testing.assert_close(best_of_k(torch.ones(40), right, ks), exact([right.mean().item()] * 4))
    plain = majority_of_k(answers, right, ks)
    weighted = weighted_vote_of_k(answers, torch.full((40,), 0.3), right, ks)
    torch.testing.assert_close(weighted[[0, 1, 3]], plain[[0, 1, 3]])
    assert abs(weighted[2] - plain[2]) < 0.02  # C(40, 7) subsets are drawn from
    assert weighted[2] == weighted_vote_of_k(answers, torch.full((40,), 0.3), right, ks)[2]
    assert float(plain[0]) == pytest.approx(right.mean().item())


@pytest.mark.parametrize("ks", [[], [0], [4]])
def test_sizes_that_can_t_be_had_are_refused(ks: list[int]) -> None:
    for function in (pass_at_k, lambda r, k: best_of_k(r, r, k), lambda r, k: majority_of_k(r, r, k)):
        with pytest.raises(ValueError, match="from 1 to the 3 completions"):
            function(T([1, 0, 1]), ks)


def test_numbers_that_can_t_be_used_are_refused() -> None:
    with pytest.raises(ValueError, match="zeros and ones"):
        pass_at_k(T([0.5, 1.0]), [1])
    with pytest.raises(ValueError, match="NaN"):
        best_of_k(T([torch.nan, 1.0]), T([1, 0]), [1])
    with pytest.raises(ValueError, match="one number a completion"):
        majority_of_k(T([1]), T([1, 0]), [1])
    with pytest.raises(ValueError, match="finite"):
        weighted_vote_of_k(T([0, 1]), T([torch.inf, 1.0]), T([1, 0]), [1])
