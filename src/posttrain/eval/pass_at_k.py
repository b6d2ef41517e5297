"""Value of k completions of a question when N >= k were sampled: pass@k, votes, the best by a score.

Each is the mean over all subsets of size k of the N, so that one set of samples gives the whole curve, and a curve's
points differ by k alone and not by which completions were drawn. A choice between equals is even: its mean is taken.

Letters besides those of `posttrain.core.types`: N completions of one question, K asked sizes of subset. ``right_N``
is 1 where a completion is right and 0 where not (anything between is a chance of being right).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import comb

import torch
from torch import Tensor

EXACT = 15_000
"""Subsets of one size that a weighted vote goes through one by one; of more, so many are drawn."""


def pass_at_k(right_N: Tensor, ks: Sequence[int]) -> Tensor:
    """Chance that k of the N completions hold a right one, without bias.

    1 - C(n - c, k) / C(n, k) = 1 - prod_{i = n-c+1}^{n} (1 - k / i), c of n being right.
    Source: arXiv 2107.03374, eq. 1; the product as in its figure 3, which no binomial overflows.

    right_N: zeros and ones. Returns float64 of shape K. Degenerate: c = 0 gives 0; n - c < k gives 1. Raises ValueError
    for k outside 1 to N, or other values than 0 and 1.
    """
    n = _check(right_N, ks)
    if not ((right_N == 0) | (right_N == 1)).all():
        raise ValueError("pass@k counts what is right: expected zeros and ones in right_N")
    right = int(right_N.sum())
    factors = torch.arange(n - right + 1, n + 1, dtype=torch.float64)
    return torch.stack([1 - (1 - k / factors).clamp(min=0).prod() for k in ks])


def best_of_k(scores_N: Tensor, right_N: Tensor, ks: Sequence[int]) -> Tensor:
    """Compute the mean accuracy of the completion with the highest score among k of the N.

    sum over scores s of [C(n_{<=s}, k) - C(n_{<s}, k)] / C(n, k) * (mean of right_N among those of score s), where
    n_{<=s} completions score s at most: the largest order statistic of a draw without replacement. One of equals is
    taken at random. Source: best of n as in arXiv 2110.14168 section 4.1 and 2009.01325; the estimator is that of eq. 1
    of arXiv 2107.03374 with more than two values. Equal scores give mean(right_N) at every k.

    Args:
        scores_N: Any numbers, -inf for a completion that could not be scored.
        right_N: 1 if right, else 0.
        ks: Sizes of subset.

    Returns:
        float64 of shape K.

    Raises:
        ValueError: k is outside 1 to N, shapes differ, or a score is NaN.
    """
    n = _check(right_N, ks)
    _same(scores_N, right_N)
    right, out = right_N.double(), torch.zeros(len(ks), dtype=torch.float64)
    for score in scores_N.unique():
        equal = scores_N == score
        up_to, below = int((scores_N <= score).sum()), int((scores_N < score).sum())
        chance = [_share(up_to, n, k) - _share(below, n, k) for k in ks]
        out += torch.tensor(chance, dtype=torch.float64) * right[equal].mean()
    return out


def majority_of_k(answer_N: Tensor, right_N: Tensor, ks: Sequence[int]) -> Tensor:
    """Compute the mean accuracy of the most frequent answer among k of the N (self-consistency).

    sum over answers a and counts j >= 1 of P(a has j of the k, no other has more) * E[1 / (1 + number of others that
    have j)] * (mean of right_N in a), the counts being multivariate hypergeometric: exact, by a polynomial product in
    (completions drawn, answers tied). One of tied answers is taken at random. Source: arXiv 2203.11171 (section 2,
    unweighted). k = 1 is the mean of right_N if every completion has an answer; without any answer: 0.

    Args:
        answer_N: Equal integers for equal answers; negative: no answer, and no vote.
        right_N: 1 if right, else 0.
        ks: Sizes of subset.

    Returns:
        float64 of shape K.

    Raises:
        ValueError: k is outside 1 to N, or shapes differ.
    """
    n = _check(right_N, ks)
    _same(answer_N, right_N)
    voting = answer_N >= 0
    answers = answer_N[voting].unique().tolist()
    sizes = [int((answer_N == a).sum()) for a in answers]
    means = [float(right_N[answer_N == a].double().mean()) for a in answers]
    out, silent = torch.zeros(len(ks), dtype=torch.float64), n - int(voting.sum())
    for j in range(1, max(sizes, default=0) + 1):
        for a, size in enumerate(sizes):
            if size < j or means[a] == 0:
                continue
            # [x, t]: ways in which the others and those without an answer fill x places, t answers having j as well.
            ways = torch.zeros(n + 1, n // j + 1, dtype=torch.float64)
            ways[: silent + 1, 0] = torch.tensor([float(comb(silent, i)) for i in range(silent + 1)])
            for b, other in enumerate(sizes):
                if b != a:
                    ways = _joined(ways, other, j)
            even = (ways / torch.arange(1, ways.shape[1] + 1)).sum(1)
            for i, k in enumerate(ks):
                if j <= k:
                    out[i] += means[a] * comb(size, j) * even[k - j] / comb(n, k)
    return out


def weighted_vote_of_k(
    answer_N: Tensor, weight_N: Tensor, right_N: Tensor, ks: Sequence[int], draws: int = EXACT
) -> Tensor:
    """Compute the mean accuracy of the answer whose completions have the largest sum of weights among k of the N.

    argmax over a of sum_{i: answer i is a} w_i. Source: arXiv 2206.02336, eq. 5 (weights: a verifier's probabilities);
    2203.11171 section 3.4 compares. Every subset is visited if there are at most `draws` of a size; otherwise `draws`
    are drawn, the same ones each time, and their mean is off by at most 0.5 / sqrt(draws) on one question. One answer
    of equal sums is taken at random, and any one of its completions.

    Args:
        answer_N: As in `majority_of_k`.
        weight_N: Finite numbers; a negative one counts against its answer.
        right_N: 1 if right, else 0.
        ks: Sizes of subset.
        draws: Most subsets of one size.

    Returns:
        float64 of shape K.

    Raises:
        ValueError: k is outside 1 to N, shapes differ, or weights are not finite.
    """
    n = _check(right_N, ks)
    _same(answer_N, right_N)
    _same(weight_N, right_N)
    if not weight_N.isfinite().all():
        raise ValueError("weights of a vote must be finite: give 0 to what could not be scored")
    answers = answer_N[answer_N >= 0].unique()
    if not len(answers):
        return torch.zeros(len(ks), dtype=torch.float64)
    of_NA = (answer_N[:, None] == answers).double()
    weight_NA, right_NA = of_NA * weight_N.double()[:, None], of_NA * right_N.double()[:, None]
    out = []
    for k in ks:
        subsets = _subsets(n, k, draws)
        present = subsets @ of_NA
        sums = (subsets @ weight_NA).masked_fill(present == 0, -torch.inf)
        top = sums.amax(1, keepdim=True)
        # Sums of the same weights in another order differ in their last bits, and are a tie all the same.
        won = (sums >= top - 1e-9 * top.abs().clamp(min=1)) & (present > 0)
        accuracy = torch.where(present > 0, (subsets @ right_NA) / present.clamp(min=1), torch.zeros_like(present))
        out.append(((accuracy * won).sum(1) / won.sum(1).clamp(min=1)).mean())
    return torch.stack(out)


def _joined(ways: Tensor, size: int, j: int) -> Tensor:
    """The product with one more answer of `size` completions: fewer than j of it, or j, which ties."""
    out = torch.zeros_like(ways)
    length = ways.shape[0]
    for i in range(min(size, j) + 1):
        part = comb(size, i) * ways[: length - i]
        if i < j:
            out[i:] += part
        else:
            out[i:, 1:] += part[:, :-1]
    return out


def _subsets(n: int, k: int, draws: int) -> Tensor:
    """Subsets of size k of n places, as rows of zeros and ones: all of them, or `draws` of them, ever the same."""
    count = comb(n, k)
    if count <= draws:
        places = torch.tensor(list(combinations(range(n), k))).reshape(count, k)
    else:
        generator = torch.Generator().manual_seed(1000 * n + k)
        places = torch.rand(draws, n, generator=generator).argsort(1)[:, :k]
    return torch.zeros(len(places), n, dtype=torch.float64).scatter_(1, places, 1.0)


def _share(m: int, n: int, k: int) -> float:
    """C(m, k) / C(n, k), by integers: no overflow, no rounding but the last."""
    return comb(m, k) / comb(n, k)


def _check(right_N: Tensor, ks: Sequence[int]) -> int:
    if right_N.ndim != 1 or not len(right_N):
        raise ValueError(f"expected the completions of one question, shape N, got {tuple(right_N.shape)}")
    n = len(right_N)
    if not ks or any(not 1 <= k <= n for k in ks):
        raise ValueError(f"expected sizes from 1 to the {n} completions there are, got {list(ks)}")
    return n


def _same(values_N: Tensor, right_N: Tensor) -> None:
    if values_N.shape != right_N.shape:
        raise ValueError(f"expected one number a completion, {tuple(right_N.shape)}, got {tuple(values_N.shape)}")
    if values_N.is_floating_point() and values_N.isnan().any():
        raise ValueError("NaN among the numbers of completions: leave out, or give -inf (0 as a weight)")
