"""Measure held-out rows during supervised fine-tuning: loss, accuracy, and answers to a few of their prompts."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from posttrain.config import DataConfig, SystemsConfig
from posttrain.core import distributed
from posttrain.core.errors import DataError
from posttrain.core.files import numbered, write_json
from posttrain.core.image_tokens import beginning, image_spans, picture_keys
from posttrain.core.ragged import micro_batches
from posttrain.core.types import Sample
from posttrain.data.encoding import prompt_tokens
from posttrain.data.image_turns import without_images
from posttrain.models.language_model import LanguageModel
from posttrain.sampling.greedy import greedy
from posttrain.trainer.token_budget import token_budget

if TYPE_CHECKING:
    from posttrain.core.progress import Track
    from posttrain.data.sft_rows import Prepared
    from posttrain.trainer.policy import LoadedPolicy

log = logging.getLogger("posttrain")
FOLDER = "held_out"
"""Folder of a stage in which each measurement is kept, as step-NNNNNN.json."""


@dataclass(frozen=True, slots=True)
class RowScore:
    """Hold what a model makes of the loss tokens of one row.

    Attributes:
        nll: Sum of their negative log-likelihoods, each times the token's weight, in nats.
        hits: Sum of the weights of those that were the likeliest token.
        weight: Sum of their weights.
        tokens: Number of them.
    """

    nll: float
    hits: float
    weight: float
    tokens: int


class HeldOutMeasurement:
    """Measure the held-out rows of a stage; called with (steps done, progress), it returns numbers for metrics.jsonl.

    The loss is a mean over all loss tokens of the rows, as that of a training step is. Neither the random state nor the
    optimizer is touched. Each measurement is kept as a file: every row's loss, and the answers.
    """

    def __init__(
        self, config: Any, policy: LoadedPolicy, rows: Prepared, folder: Path, context: int | None, stops: Sequence[int]
    ) -> None:
        """Choose the prompts that are answered.

        Args:
            config: Settings of the stage (`SFTConfig`).
            policy: The model that is trained.
            rows: The held-out rows.
            folder: The stage's folder.
            context: The model's length in tokens. None: unknown.
            stops: Tokens that end an answer, besides the model's own.
        """
        self.config, self.model, self.tokenizer, self.stops = config, policy.policy, policy.tokenizer, stops
        self.samples = rows.samples
        self.folder = folder / FOLDER
        self.chosen: list[dict[str, Any]] = []
        self.prompts: list[list[int]] = []
        self.previews: list[list[str]] = []
        self.no_answers = self._choose_prompts(rows, context) if self.config.held_out_answers else ""

    def __call__(self, step: int, track: Track) -> dict[str, float]:
        track.phase("held-out rows")
        scores = score_rows(self.model, self.samples, self.config.systems)
        weight = math.fsum(s.weight for s in scores)
        loss, accuracy = (math.fsum(getattr(s, name) for s in scores) / weight for name in ("nll", "hits"))
        answers = self._answers() if self.prompts else []
        if distributed.is_main():
            self._keep(step, loss, accuracy, scores, answers)
        return {"held_out/loss": loss, "held_out/accuracy": accuracy}

    def _choose_prompts(self, rows: Prepared, context: int | None) -> str:
        """Choose the first prompts that can be answered; return why there is none, or ""."""
        of = self.config.held_out if isinstance(self.config.held_out, DataConfig) else self.config.data
        reason = "the held-out rows are texts without a prompt"
        for i in range(len(rows)):
            row = rows.rows[i]
            if not row["messages"]:
                continue
            try:
                tokens = before_answer(self.samples[i]) or prompt_tokens(row, self.tokenizer, of)
            except DataError as error:
                reason = str(error)
                continue
            if not tokens or (context is not None and len(tokens) >= context):
                reason = "the held-out prompts leave no room for an answer in the model's context"
                continue
            if any(tokens == other and picture_keys(tokens) == picture_keys(other) for other in self.prompts):
                continue
            self.chosen.append(row)
            self.prompts.append(tokens)
            self.previews.append([span.picture.preview() for span in image_spans(tokens)])
            if len(self.prompts) == self.config.held_out_answers:
                break
        expected = [len(self.tokenizer(str(row["completion"]))["input_ids"]) for row in self.chosen]
        self.longest = min(self.config.answer_tokens, 16 + 2 * max(expected, default=0))
        return "" if self.prompts else reason

    def _answers(self) -> list[dict[str, Any]]:
        """Return the model's greedy answers; none, with a warning, if it can't be sampled from (every rank must call)."""
        if not _room_for_whole_model(self.model):
            return self._give_up("the whole model does not fit beside its shards")
        with distributed.summon_full_params(self.model):
            answers = distributed.map_over_ranks(self.prompts, self._greedy)
        failed = next((a for a in answers if isinstance(a, str)), None)
        if failed is not None:
            return self._give_up(failed)
        return [
            {
                "prompt": row["prompt_text"]
                if len(row["messages"]) == 1
                else [without_images(m) for m in row["messages"]],
                "expected": row["completion"],
                "output": self.tokenizer.decode(answer, skip_special_tokens=True),
                **({"images": shown} if (shown := self.previews[i]) else {}),
            }
            for i, (row, answer) in enumerate(zip(self.chosen, answers, strict=True))
        ]

    def _greedy(self, prompts: list[list[int]]) -> list[list[int] | str]:
        """Return the tokens of each answer, or the reason why there is none."""
        try:
            return list(greedy(self.model, self.tokenizer, prompts, self.longest, self.stops)) if prompts else []
        except Exception as error:  # answers are for people to read: a model that can't be sampled from still trains
            return [f"{type(error).__name__}: {error}"] * len(prompts)

    def _give_up(self, reason: str) -> list[dict[str, Any]]:
        self.prompts, self.no_answers = [], reason
        log.warning("%s: held-out prompts are not answered: %s", self.config.name, reason)
        return []

    def _keep(
        self, step: int, loss: float, accuracy: float, scores: Sequence[RowScore], answers: list[dict[str, Any]]
    ) -> None:
        """Write the file of a measurement."""
        rows = [
            {"id": i, "source": sample.source, "nll": s.nll, "tokens": s.tokens}
            for i, (sample, s) in enumerate(zip(self.samples, scores, strict=True))
        ]
        value = {"step": step, "loss": loss, "accuracy": accuracy, "answers": answers, "no_answers": self.no_answers}
        keep_measurement(self.folder, step, {**value, "rows": rows})


def keep_measurement(folder: Path, step: int, value: dict[str, Any]) -> None:
    """Write the file of a measurement; those of later steps, which a killed process left, are deleted.

    Args:
        folder: Folder of the measurements.
        step: Steps that are done.
        value: What was measured.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for later, path in measurements(folder).items():
        if later > step:
            path.unlink()
    write_json(folder / f"step-{step:06d}.json", value)


def before_answer(sample: Sample) -> list[int]:
    """Return the tokens before the last answer: what the model reads when it answers, as the row was encoded.

    Empty if the sample has no loss, or if the loss begins with the first token that can have one: then the weights tell
    nothing about where the answer begins.
    """
    end = max((i for i, weight in enumerate(sample.weights) if weight), default=0)
    start = next((i for i in range(end, -1, -1) if not sample.weights[i]), -1) + 1
    return beginning(sample.tokens, start) if start > 1 else []


def measurements(folder: Path) -> dict[int, Path]:
    """Return the files of a stage's measurements by step, ascending."""
    return numbered(folder, "step-", ".json")


@torch.no_grad()
def score_rows(model: LanguageModel, samples: Sequence[Sample], systems: SystemsConfig) -> list[RowScore]:
    """Compute the loss of each row; the ranks share the rows, and every rank must call and gets all scores.

    Args:
        model: The model, sharded or not.
        samples: The rows.
        systems: Settings of micro-batches.
    """
    lengths = getattr(samples, "lengths", None)  # of rows that lie on a disk, which are read when they are scored
    lengths = [len(s) for s in samples] if lengths is None else lengths.tolist()
    plan = micro_batches([n + model.inserted for n in lengths], token_budget(systems, model))
    rank, world = (distributed.rank(), distributed.world()) if distributed.world() > 1 else (0, 1)
    own: dict[int, RowScore] = {}
    training = model.training
    model.eval()
    try:
        for first in range(0, len(plan), world):
            # Every rank makes as many passes (FSDP gathers in step); a spare one repeats the first.
            numbers = plan[first + rank] if first + rank < len(plan) else plan[0]
            own |= zip(numbers, _score(model, [samples[i] for i in numbers], systems), strict=True)
    finally:
        model.train(training)
    scores: dict[int, RowScore] = {}
    for part in distributed.all_gather_object(own):
        scores |= part
    return [scores[i] for i in range(len(samples))]


def _score(model: LanguageModel, samples: list[Sample], systems: SystemsConfig) -> list[RowScore]:
    batch = model.pack(samples, systems.share_prefixes)
    targets = batch.targets_N
    _, nll_N, hits_N = model(batch, "cross_entropy", targets)
    nll_T, hits_T = (torch.zeros(batch.total, dtype=torch.float64) for _ in range(2))
    nll_T[targets.cpu()], hits_T[targets.cpu()] = nll_N.double().cpu(), hits_N.double().cpu()
    out = []
    for row, sample in zip(batch.rows, samples, strict=True):
        weights = torch.tensor(list(sample.weights), dtype=torch.float64)
        nll, hits = (float((values_T[row.cpu()] * weights).sum()) for values_T in (nll_T, hits_T))
        out.append(RowScore(nll, hits, float(weights.sum()), int((weights != 0).sum())))
    return out


def _room_for_whole_model(model: LanguageModel) -> bool:
    """Return True if every rank's GPU has room for the whole model; on a CPU, and on one rank, it has."""
    if distributed.world() == 1 or model.device.type != "cuda":
        return True
    needed = sum(p.numel() for p in model.parameters()) * 2.5  # bytes: 16-bit weights, and some for keys and values
    return min(distributed.all_gather_object(torch.cuda.mem_get_info(model.device)[0])) > needed
