"""The learner: one optimizer step from one global batch, the same however it is split.

Micro-batches by token budget, ranks and shared prefixes change the order of floating-point sums and nothing else:
the denominator is the global batch's, known before the first forward pass.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from posttrain.config import OptimizerConfig, SystemsConfig
from posttrain.core import distributed
from posttrain.core.errors import NonFiniteError
from posttrain.core.image_tokens import image_spans
from posttrain.core.ragged import BatchImages, RaggedBatch, micro_batches
from posttrain.core.types import Sample
from posttrain.losses.gradient_accumulation import added_in_place
from posttrain.models.language_model import LanguageModel
from posttrain.models.model_types import decoder_layers
from posttrain.models.router_loss import Routing, add_up
from posttrain.models.sequence_parallel import check_divisible, sliced, summed
from posttrain.models.vision import zero_of_pictures
from posttrain.trainer.optimizer import Optimizer, lr_at
from posttrain.trainer.token_budget import token_budget

LossFunction = Callable[[LanguageModel, RaggedBatch, float], tuple[Tensor, dict[str, Tensor]]]
"""(model, micro-batch, global denominator) -> (this micro-batch's share of the loss, scalar tensors for metrics).

The denominator is the sum of the global batch's weights. Loss and metrics come divided by it (or by another number of
the whole batch, where a method has its own): the learner only adds them up over micro-batches and ranks. Of a metric
whose name ends with `_max` the largest is taken instead. A loss must not read a tensor's value (`.item()`, `float`,
`bool`): on a GPU that waits for the device; the learner reads all of a step's numbers at once, at its end."""

NOTHING_TRAINED = (
    "a step changes nothing: no parameter that is trained takes part in the loss of its rows. Tower and projector of a "
    "vision model need rows with images"
)


def shard_model(model: LanguageModel, dtype: torch.dtype) -> None:
    """Shard a model over all ranks, in place; its critic computes in float32. dtype: that all else computes in."""
    exact = [] if model.value is None else [model.value]
    distributed.shard(model.float(), decoder_layers(model.base), dtype, model.device, exact)
    # FSDP learns from its first pass which module is the root, and a sampler's goes through parts alone.
    with distributed.summon_full_params(model), torch.no_grad():
        batch = model.pack([Sample([0, 0], [0.0, 1.0])])
        model(batch, "logprobs", batch.rows[0][-1:])


@dataclass(frozen=True)
class StepResult:
    """Hold what one step did. `metrics` holds only what is the same in every run of the same recipe."""

    metrics: dict[str, float]
    seconds: float
    tokens: int
    computed_tokens: int
    micro_batches: int
    timing: dict[str, Any] = field(default_factory=dict)
    """What else timings.jsonl gets."""


class Learner:
    """Take optimizer steps on global batches. Its whole state goes in and out of a checkpoint."""

    max_skipped = 5
    """Non-finite steps in a row before the run stops."""

    def __init__(
        self,
        model: LanguageModel,
        optimizer: OptimizerConfig,
        systems: SystemsConfig,
        total_steps: int,
        rates: Mapping[str, float] | None = None,
    ) -> None:
        self.model, self.systems, self.total_steps = model, systems, total_steps
        self.device = model.device
        self.steps_done = 0
        self.skipped = 0
        self.skipped_in_a_row = 0
        check_divisible(model.base.config.model_type, model.ragged)
        model.train()
        token_budget(systems, model)  # chosen before the optimizer takes its memory, and before ranks share weights
        layers = decoder_layers(model.base)
        if systems.activation_checkpointing:
            model.checkpoint_layers(layers)
        if systems.compile:
            for layer in layers:
                layer.compile(dynamic=True)
        if distributed.world() > 1:
            shard_model(model, next(model.parameters()).dtype)
        inside = {id(p) for layer in layers for p in layer.parameters()}
        matrices = [name for name, p in model.named_parameters() if id(p) in inside]
        self.optimizer = Optimizer(model.named_parameters(), optimizer, rates, matrices)

    def step(self, samples: Sequence[Sample], loss: LossFunction | None = None) -> StepResult:
        """Take one step on a global batch (the same list on every rank).

        Samples without any weight cost nothing. A non-finite loss or gradient leaves the weights as they are, and is
        counted; after `max_skipped` in a row NonFiniteError is raised. A batch without any weight makes no step.
        """
        began = time.perf_counter()
        loss = cross_entropy if loss is None else loss
        useful = [s for s in samples if any(s.weights)]
        denominator = float(sum(math.fsum(s.weights) for s in useful))
        split, rounds = self._split(useful)
        made: list[tuple[str, Tensor]] = []
        computed, reached = 0, False
        # Every rank makes as many passes (FSDP gathers in step); a spare one repeats a sample at weight 0.
        spare = [[_weightless(s)] for s in useful[:1]] * (rounds - len(split))
        chosen = [[useful[j] for j in m] for m in split] + spare
        routing = self._count_routing(chosen)
        shown = self._one_picture(useful) if distributed.world() > 1 else None
        self.optimizer.begin()
        for mine in chosen:
            batch = self._pack(mine)
            computed += batch.total if batch.part is None else batch.part.size
            with self.model.routings() as routings:
                value, metrics = loss(self.model, batch, denominator)
            if self.model.router_loss is not None:
                own = next(r for r in reversed(routings) if r.probabilities_E.requires_grad)
                share = self.model.router_loss.share(own, own if routing is None else routing)
                metrics["router_loss"] = summed(batch.part, share)
                value = value + self.model.router_loss.coefficient * metrics["router_loss"]
            if batch.images is None and shown is not None:
                zero = zero_of_pictures(self.model.base, shown)
                value = value if zero is None else value + zero
            with added_in_place(self.optimizer.places):
                if value.requires_grad:  # not of rows of text while the projector of a vision model is trained alone
                    # FSDP averages over ranks; the loss's denominator is global already.
                    (value * distributed.world()).backward()
            made += [(name, number.detach()) for name, number in {"loss": value, **metrics}.items()]
            reached = reached or value.requires_grad
        if useful and not reached:
            warnings.warn(NOTHING_TRAINED, stacklevel=2)
        norms = self.optimizer.gradient_norms()
        # The only place where a step waits for the device.
        numbers = _to_host([number for _, number in made] + list(norms.values()))
        totals = _reduced([name for name, _ in made], numbers[: len(made)])
        record = self._update(totals, dict(zip(norms, numbers[len(made) :], strict=True)), bool(useful))
        tokens = sum(len(s) for s in samples)
        record.update(tokens=tokens, loss_tokens=denominator)
        return StepResult(record, time.perf_counter() - began, tokens, computed, rounds)

    def _pack(self, samples: Sequence[Sample]) -> RaggedBatch:
        """Pack a micro-batch, of which this process computes all or, with sequence parallel, a slice."""
        return sliced(self.model.pack(list(samples), self.systems.share_prefixes), self.model.backend.tile)

    def _one_picture(self, samples: Sequence[Sample]) -> BatchImages | None:
        """Return the pictures of the first sample that has some; None: all are text."""
        with_pictures = next((s for s in samples if image_spans(s.tokens)), None)
        return None if with_pictures is None else self.model.pack([with_pictures]).images

    def _count_routing(self, chosen: Sequence[Sequence[Sample]]) -> Routing | None:
        """Count, over the whole step, how often routers choose each expert; only for a loss that needs it beforehand.

        That costs one more forward pass, unless the step is a single micro-batch.
        """
        if self.model.router_loss is None or not chosen or (len(chosen) == 1 and distributed.world() == 1):
            return None
        found: list[Routing] = []
        with torch.no_grad():
            for mine in chosen:
                with self.model.routings() as routings:
                    self.model(self._pack(mine), "hidden")
                found += routings
        own = add_up(found)
        parts = distributed.all_gather_object([own.counts_E.cpu(), own.probabilities_E.cpu(), own.rows_.cpu()])
        counts, probabilities, rows = (torch.stack(p).sum(0).to(self.device) for p in zip(*parts, strict=True))
        return Routing(counts, probabilities, rows)

    def _split(self, samples: Sequence[Sample]) -> tuple[list[list[int]], int]:
        """Return this rank's micro-batches, and how many passes every rank makes.

        Ranks that compute micro-batches together have the same ones, with the budget of all of them.
        """
        together = distributed.sequence_parallel()
        world, budget = distributed.world() // together, token_budget(self.systems, self.model) * together
        units = _units(samples, budget, self.model.inserted)
        shares: list[list[int]] = [[] for _ in range(world)]
        loads = [0] * world
        for u in sorted(range(len(units)), key=lambda u: (-units[u][0], u)):
            lightest = loads.index(min(loads))
            shares[lightest].append(u)
            loads[lightest] += units[u][0]
        plans = [
            [
                sorted(i for k in m for i in units[share[k]][1])
                for m in micro_batches([units[u][0] for u in share], budget)
            ]
            for share in shares
        ]
        return plans[distributed.rank() // together if world > 1 else 0], max(len(p) for p in plans)

    def _update(self, totals: dict[str, float], norms: dict[str, float], any_useful: bool) -> dict[str, float]:
        """Clip and step, or skip what is not finite."""
        lr = lr_at(self.steps_done, self.total_steps, self.optimizer.config)
        norm = self.optimizer.clip(norms)
        finite = math.isfinite(norm) and math.isfinite(totals.get("loss", 0.0))
        if finite and any_useful:
            self.optimizer.step(lr)
            self.skipped_in_a_row = 0
        else:
            self.optimizer.clear()
        if not finite:
            self.skipped += 1
            self.skipped_in_a_row += 1
        self.steps_done += 1
        if self.skipped_in_a_row >= self.max_skipped:
            raise NonFiniteError(
                f"loss or gradient was not finite in {self.skipped_in_a_row} steps in a row (last: loss "
                f"{totals.get('loss')}, gradient norm {norm}), up to step {self.steps_done}. The weights are those "
                "before them. Try a lower optimizer.lr, longer optimizer.warmup, a smaller optimizer.max_grad_norm, or "
                "model.dtype=float32; posttrain inspect shows what the rows of these steps look like"
            )
        record = {k: v for k, v in totals.items() if k == "loss"}
        record.update(grad_norm=norm, lr=lr, skipped=0 if finite else 1)
        record.update({k: v for k, v in totals.items() if k != "loss"})
        return record

    def check_weights(self) -> None:
        """Raise NonFiniteError if the weights are not finite: the loss that shows it is the one of the next step."""
        broken = self.optimizer.not_finite()
        if broken:
            raise NonFiniteError(
                f"after step {self.steps_done} {len(broken)} of {len(self.optimizer.parameters)} trained weights hold "
                f"values that are not finite (the first: {broken[0]}), and none of them is kept. Checkpoints from "
                "before are intact. Try a lower optimizer.lr, longer optimizer.warmup, or model.dtype=float32"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return all state that the next step depends on.

        Tensors (loaded in place) and, under 'numbers', plain values.
        """
        numbers = {"steps_done": self.steps_done, "skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}
        if self.model.token_budget is not None:
            numbers["token_budget"] = self.model.token_budget
        return {"tensors": self.optimizer.state_dict(), "numbers": numbers}

    def load_state_dict(self, numbers: dict[str, Any]) -> None:
        """Restore the plain values, after the tensors of `state_dict()` were overwritten in place."""
        self.steps_done, self.skipped = int(numbers["steps_done"]), int(numbers["skipped"])
        self.skipped_in_a_row = int(numbers["skipped_in_a_row"])
        # Another amount of memory may be free now; with another budget sums would round otherwise.
        self.model.token_budget = numbers.get("token_budget", self.model.token_budget)
        self.optimizer.update_parameters()


def _to_host(numbers: Sequence[Tensor]) -> list[float]:
    """Return scalars as Python floats, fetched from the device at once."""
    if not numbers:
        return []
    exact = torch.float32 if numbers[0].device.type == "mps" else torch.float64  # MPS has no float64
    return torch.stack([number.to(exact) for number in numbers]).tolist()  # type: ignore[no-any-return]


def _reduced(names: Sequence[str], numbers: Sequence[float]) -> dict[str, float]:
    """Reduce metrics over micro-batches and ranks: sums, or the largest where the name ends with `_max`."""
    own: dict[str, float] = {}
    for name, number in zip(names, numbers, strict=True):
        own[name] = number if name not in own else _joined(name, own[name], number)
    totals: dict[str, float] = {}
    # Ranks that compute micro-batches together have the same numbers; one that has no sample with loss may lack some.
    for part in distributed.all_gather_object(own)[:: distributed.sequence_parallel()]:
        for name, number in part.items():
            totals[name] = number if name not in totals else _joined(name, totals[name], number)
    return dict(sorted(totals.items()))


def _joined(name: str, one: float, other: float) -> float:
    return max(one, other) if name.endswith("_max") else one + other


def cross_entropy(model: LanguageModel, batch: RaggedBatch, denominator: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute supervised fine-tuning's loss: sum of w_t * -log p(y_t | before) / denominator, with the accuracy's sum.

    Args:
        model: The model.
        batch: A micro-batch.
        denominator: Sum of the global batch's weights.
    """
    targets = batch.targets_N
    weights = batch.weights_T[targets]
    loss, _, hits = model(batch, "cross_entropy", targets, weights / denominator)
    return loss, {"token_accuracy": (hits * weights).sum() / denominator}


def _units(samples: Sequence[Sample], budget: int, inserted: int = 0) -> list[tuple[int, list[int]]]:
    """Return (tokens to compute, samples) of what stays together in a micro-batch.

    Samples that name the same ``group`` in their meta share their first ``shared`` tokens, computed once: they stay
    together up to the budget, or all of them, whatever it is, if they are marked ``whole`` (a pair of answers). Any
    other sample is alone.

    Args:
        samples: The samples.
        budget: Most tokens of a group that is not ``whole``.
        inserted: Number of virtual tokens inside each sample.
    """
    units: list[tuple[int, list[int]]] = []
    newest: dict[Any, int] = {}
    for i, sample in enumerate(samples):
        group, size = sample.meta.get("group"), len(sample) + inserted
        more = size - int(sample.meta.get("shared", 0))
        at = newest.get(group) if group is not None else None
        if at is not None and (units[at][0] + more <= budget or sample.meta.get("whole")):
            units[at] = (units[at][0] + more, [*units[at][1], i])
            continue
        if group is not None:
            newest[group] = len(units)
        units.append((size, [i]))
    return units


def _weightless(sample: Sample) -> Sample:
    """Return the same tokens without loss: a pass that keeps ranks in step and adds nothing."""
    return Sample(sample.tokens, [0.0] * len(sample), sample.source)
