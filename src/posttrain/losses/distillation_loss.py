"""Divergences between a teacher's and a student's distributions: two output heads in one pass, never a T by V matrix.

Both heads go over the same N positions, a chunk at a time; the student's gradients are made on the way, as in
`linear_cross_entropy`. With p the teacher's distribution and q the student's, both at one temperature,

    forward KL                 sum p log(p / q)                           d / d z = q - p
    reverse KL                 sum q log(q / p) = D                       d / d z = q (log(q / p) - D)
    Jensen-Shannon, weight b   b KL(p | m) + (1 - b) KL(q | m)            d / d z = (1 - b) q (log(q / m) - KL(q | m))
        m = b p + (1 - b) q    (eq. 1 of GKD, arXiv 2306.13649, as TRL has it)
    skewed forward KL          KL(p | a p + (1 - a) q)                    (eq. 3 of DistiLLM, arXiv 2402.03898)
    skewed reverse KL          KL(q | a q + (1 - a) p)                    (eq. 6 there)

where z are the student's logits over the temperature. The temperature's square is not multiplied back.

The k likeliest tokens of a teacher alone make k + 1 classes: these tokens, and all others together (the tail). The
divergence is that of the two distributions over the classes, a lower bound of the whole one. Without its tail the
student would be rewarded for mass on tokens that the teacher never wrote down.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from posttrain.losses.argument_checks import require_all
from posttrain.losses.gradient_accumulation import place_of
from posttrain.losses.linear_logprobs import Head, HeadTerms, adapter_terms, chunk_rows, head_logits, through_cap

LEAST = -1e4
"""Log-probabilities are at least this: of no mass, and yet finite times nothing."""
LEAST_TAIL = math.log(1e-7)
"""Smallest log-probability of a teacher's tail: what rounding leaves of one."""
BLOCK_BYTES = {"cpu": 2 << 20}
"""Size of the logits whose divergence is computed together: on a CPU what stays in a core's cache."""

Divergence = Callable[[Tensor, Tensor], "Tensor | tuple[Tensor, Tensor]"]
"""(student's log-probabilities, teacher's), each (N, classes) -> the divergence at each position (N,).

It may return its derivative by the student's logits too (N, classes); else autograd makes it, chunk by chunk."""


@dataclass(frozen=True)
class TeacherHidden:
    """Hold a teacher's whole distributions, as hidden states and the head that makes logits of them."""

    hidden_N_H: Tensor
    head: Head

    def __len__(self) -> int:
        return len(self.hidden_N_H)


@dataclass(frozen=True)
class TeacherTop:
    """Hold the likeliest tokens of a teacher's distributions.

    Attributes:
        ids_N_K: Token ids, int64, the likeliest first. Places that are not used (log-probability -inf) have any id.
        logprobs_N_K: Their log-probabilities, the temperature applied, float32.
        tail_N: Log-probability of all other tokens together.
    """

    ids_N_K: Tensor
    logprobs_N_K: Tensor
    tail_N: Tensor

    def __len__(self) -> int:
        return len(self.ids_N_K)


Teacher = TeacherHidden | TeacherTop


def forward_kl(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Compute KL(p | q) and its derivative: the student covers all that the teacher may write."""
    p = teacher.exp()
    return p.mul(teacher - student).sum(-1), student.exp().sub_(p)


def reverse_kl(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Compute KL(q | p) and its derivative: the student keeps to what the teacher finds likely."""
    q, ratio = student.exp(), student - teacher
    value = q.mul(ratio).sum(-1)
    return value, ratio.sub_(value[:, None]).mul_(q)


def jensen_shannon(student: Tensor, teacher: Tensor, beta: float = 0.5) -> tuple[Tensor, Tensor]:
    """Compute the Jensen-Shannon divergence with weight `beta` in (0, 1) of the teacher, and its derivative.

    Near 0 it is beta times the forward KL, near 1 (1 - beta) times the reverse KL.

    Args:
        student: Log-probabilities (N, classes).
        teacher: Likewise.
        beta: The weight.
    """
    p, q = teacher.exp(), student.exp()
    log_m = torch.lerp(q, p, beta).log_().clamp_(min=LEAST)
    of_teacher = p.mul_(teacher - log_m).sum(-1)
    ratio = torch.sub(student, log_m, out=log_m)
    of_student = (q * ratio).sum(-1)
    value = beta * of_teacher + (1 - beta) * of_student
    return value, ratio.sub_(of_student[:, None]).mul_(q).mul_(1 - beta)


def skewed_forward_kl(student: Tensor, teacher: Tensor, alpha: float = 0.1) -> tuple[Tensor, Tensor]:
    """Compute KL(p | alpha p + (1 - alpha) q) and its derivative; alpha 0 is the forward KL.

    Args:
        student: Log-probabilities (N, classes).
        teacher: Likewise.
        alpha: Part of the teacher in the mixture.
    """
    p, q = teacher.exp(), student.exp()
    m = torch.lerp(q, p, alpha)
    value = p.mul(teacher - m.log().clamp_(min=LEAST)).sum(-1)
    # d / d q_v = -(1 - a) p_v / m_v; where neither has mass there is nothing to move
    slope = p.div_(m.clamp_(min=torch.finfo(m.dtype).tiny)).mul_(alpha - 1)
    return value, slope.sub_(q.mul(slope).sum(-1, keepdim=True)).mul_(q)


def skewed_reverse_kl(student: Tensor, teacher: Tensor, alpha: float = 0.1) -> tuple[Tensor, Tensor]:
    """Compute KL(q | alpha q + (1 - alpha) p) and its derivative; alpha 0 is the reverse KL.

    Args:
        student: Log-probabilities (N, classes).
        teacher: Likewise.
        alpha: Part of the student in the mixture.
    """
    p, q = teacher.exp(), student.exp()
    m = torch.lerp(p, q, alpha)
    ratio = student - m.log().clamp_(min=LEAST)
    value = q.mul(ratio).sum(-1)
    # d / d q_v = log(q_v / m_v) + 1 - a q_v / m_v, of which the 1 falls out
    slope = ratio.addcdiv_(q, m.clamp_(min=torch.finfo(m.dtype).tiny), value=-alpha)
    return value, slope.sub_(q.mul(slope).sum(-1, keepdim=True)).mul_(q)


def truncated_head(head: Head, size: int) -> Head:
    """Return the head of the first `size` tokens: what is left of two vocabularies that are padded differently."""
    if size >= len(head.weight_V_H):
        return head
    rows = head.rows
    if rows is not None:
        kept = rows[0] < size
        rows = rows[0][kept], rows[1][kept]
    low_rank = tuple((a, b[:size], factor) for a, b, factor in head.low_rank)
    bias = None if head.bias_V is None else head.bias_V[:size]
    return replace(head, weight_V_H=head.weight_V_H[:size], bias_V=bias, low_rank=low_rank, rows=rows)


def top_logprobs(hidden_N_H: Tensor, head: Head, k: int, temperature: float = 1.0) -> TeacherTop:
    """Compute the k likeliest tokens of each position and the mass of the others, a chunk of logits at a time.

    Args:
        hidden_N_H: Hidden states.
        head: The output head.
        k: Number of tokens, fewer than the vocabulary has.
        temperature: Divides the logits.

    Raises:
        ValueError: There are not more tokens than k.
    """
    vocabulary = len(head.weight_V_H)
    if not 0 < k < vocabulary:
        raise ValueError(f"top_k is {k}, and the vocabulary has {vocabulary} tokens: take less, or all (null)")
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    with torch.no_grad():
        for i in range(0, max(1, len(hidden_N_H)), chunk_rows(vocabulary, hidden_N_H.device)):
            z = head_logits(hidden_N_H[i : i + chunk_rows(vocabulary, hidden_N_H.device)], head, temperature)
            lse = z.logsumexp(-1, keepdim=True)
            values, ids = z.topk(k, -1)
            tail = z.scatter_(1, ids, -math.inf).logsumexp(-1)
            parts.append((ids, values - lse, tail - lse[:, 0]))
    ids, logprobs, tails = (torch.cat(x) for x in zip(*parts, strict=True))
    return TeacherTop(ids, logprobs, tails)


class _Distillation(torch.autograd.Function):
    """(those of `HeadTerms`, teacher, ...) -> (sum of c_n D_n, D_n, agreement); gradients made in forward."""

    @staticmethod
    def forward(ctx, *inputs):  # type: ignore[no-untyped-def]
        terms, (teacher, coefficients, divergence, scale, softcap, temperature) = HeadTerms(*inputs[:7]), inputs[7:]
        hidden, weight, needed = terms.hidden, terms.weight, ctx.needs_input_grad[:6]
        values = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        same = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
        gradients = terms.gradients(needed)
        rows = chunk_rows(len(weight), hidden.device)
        block = max(1, BLOCK_BYTES.get(hidden.device.type, 1 << 62) // (4 * len(weight)))
        for i in range(0, len(hidden), rows):
            s = slice(i, i + rows)
            z = terms.logits(s, scale, softcap, temperature, None)
            raw = z.clone() if softcap is not None and any(needed) else None
            y = head_logits(teacher.hidden_N_H[s], teacher.head, temperature) if _whole(teacher) else None
            for j in range(0, len(z), block):
                b = slice(j, j + block)
                at = slice(i + j, min(i + j + block, i + len(z)))
                given = y[b] if y is not None else TeacherTop(*(x[at] for x in _parts(teacher)))
                values[at], same[at] = _block(z[b], given, divergence)
                z[b].mul_(coefficients[at, None])
            if any(needed):
                terms.push(through_cap(z, raw, scale, softcap, temperature), s, gradients)
        ctx.gradients, ctx.weight = gradients, weight
        ctx.dtypes = [None if x is None else x.dtype for x in inputs[:6]]
        ctx.mark_non_differentiable(values, same)
        return (values.double() * coefficients.double()).sum().float(), values, same

    @staticmethod
    def backward(ctx, d_loss, _values, _same):  # type: ignore[no-untyped-def]
        if ctx.gradients is None:
            raise RuntimeError("distillation_loss keeps its gradients for one backward pass; call it again")
        gradients, ctx.gradients, weight, ctx.weight = ctx.gradients, None, ctx.weight, None
        place = None if gradients[1] is None else place_of(weight)
        if place is not None:
            place.addcmul_(gradients[1], d_loss)
            gradients[1] = None
        for d in gradients:
            if d is not None:
                d.mul_(d_loss)
        finished = (None if d is None else d.to(dtype) for d, dtype in zip(gradients, ctx.dtypes, strict=True))
        return *finished, *(None,) * 7


def _whole(teacher: Teacher) -> bool:
    return isinstance(teacher, TeacherHidden)


def _parts(teacher: TeacherTop) -> tuple[Tensor, Tensor, Tensor]:
    return teacher.ids_N_K, teacher.logprobs_N_K, teacher.tail_N


def _block(z: Tensor, teacher: Tensor | TeacherTop, divergence: Divergence) -> tuple[Tensor, Tensor]:
    """Return (divergences, agreement) of a few positions, and put their derivative by z in its place.

    Args:
        z: The student's logits.
        teacher: The teacher's logits, or its likeliest tokens.
        divergence: The divergence.
    """
    if isinstance(teacher, Tensor):
        same = z.argmax(-1) == teacher.argmax(-1)
        student, given = z.log_softmax(-1).clamp_(min=LEAST), teacher.log_softmax(-1).clamp_(min=LEAST)
        value, d = with_derivative(divergence, student, given)
        z.copy_(d)
        return value, same
    ids, logprobs, tail = _parts(teacher)
    same = z.argmax(-1) == ids[:, 0]
    lse = z.logsumexp(-1, keepdim=True)
    own = z.gather(1, ids).sub_(lse)
    unused = logprobs == -math.inf
    own.masked_fill_(unused, -math.inf)
    z.scatter_(1, torch.where(unused, ids[:, :1], ids), -math.inf)
    rest = z.logsumexp(-1, keepdim=True)
    student = torch.cat([own, rest - lse], 1).clamp_(min=LEAST)
    given = torch.cat([logprobs, tail[:, None].clamp(min=LEAST_TAIL)], 1).clamp_(min=LEAST)
    value, d = with_derivative(divergence, student, given)
    z.sub_(rest).exp_().mul_(d[:, -1:])  # the tail's tokens share its derivative by their part of its mass
    z.scatter_add_(1, ids, d[:, :-1].masked_fill(unused, 0.0))
    return value, same


def with_derivative(divergence: Divergence, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return a divergence and its derivative by the student's logits, by autograd if it has none of its own.

    Args:
        divergence: The divergence.
        student: Log-probabilities (N, classes).
        teacher: Likewise.

    Raises:
        ValueError: The divergence returns something else than a number for each position.
    """
    with torch.no_grad():
        made = divergence(student, teacher)
    value, d = made if isinstance(made, tuple) else (made, None)
    if value.shape != student.shape[:1]:
        raise ValueError(
            f"a divergence returned the shape {tuple(value.shape)} for {len(student)} positions: it has to return "
            "one number for each"
        )
    if d is None:
        with torch.enable_grad():
            leaf = student.detach().requires_grad_()
            again = divergence(leaf.log_softmax(-1), teacher)
            assert isinstance(again, Tensor)
            (d,) = torch.autograd.grad(again.sum(), leaf)
    return value, d


def distillation_loss(
    hidden_N_H: Tensor,
    head: Head,
    teacher: Teacher,
    coefficients_N: Tensor,
    divergence: Divergence = forward_kl,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute sum_n c_n D(p_n, q_n), with its gradients chunk by chunk on the way. One backward pass only.

    Of vocabularies of different sizes, whose heads are padded differently, the tokens that both have are compared: the
    others are left out of both distributions. N = 0 gives loss 0.

    Args:
        hidden_N_H: The student's hidden states.
        head: The student's output head.
        teacher: What the teacher says at the same positions.
        coefficients_N: What each position counts, its share of the global denominator included.
        divergence: The divergence at each position.
        temperature: Divides the logits of both. The numbers of a `TeacherTop` were made with it.

    Returns:
        (loss, values_N, same_N): the scalar; for metrics the divergence at each position, and whether both find the
            same token likeliest (not differentiable).

    Raises:
        ValueError: The temperature is not positive, or the teacher has other positions, or tokens that the student
            lacks.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, and is {temperature}")
    if len(teacher) != len(hidden_N_H):
        raise ValueError(f"{len(hidden_N_H)} positions of the student, and {len(teacher)} of the teacher")
    if isinstance(teacher, TeacherHidden):
        size = min(len(head.weight_V_H), len(teacher.head.weight_V_H))
        head, teacher = truncated_head(head, size), replace(teacher, head=truncated_head(teacher.head, size))
    else:
        size, ids = len(head.weight_V_H), teacher.ids_N_K
        require_all((ids >= 0) & (ids < size), lambda: f"the teacher names token {int(ids.max())} of {size}")
    terms = hidden_N_H, head.weight_V_H, head.bias_V, *adapter_terms(hidden_N_H, head)
    settings = teacher, coefficients_N.detach().float(), divergence, head.scale, head.softcap, temperature
    return _Distillation.apply(*terms, *settings)  # type: ignore[no-any-return]
