"""Reward models from pairs of answers: Bradley-Terry over the pairs of the global batch, alone or as an ensemble."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from posttrain.core import distributed
from posttrain.core.files import link_or_copy, read_object, write_json, write_lines
from posttrain.data.stored_pairs import pair_sizes
from posttrain.eval.calibration import judged_pairs
from posttrain.losses.reward_loss import bradley_terry, bradley_terry_metrics, centring, combine_members
from posttrain.methods.reward_model.scorer_stage import ScorerStage
from posttrain.models.classification_head import padding, score_index, scores_at
from posttrain.rewards.reward_model_scorer import INDEX, Member
from posttrain.rewards.score_template import scoring_tokenizer
from posttrain.trainer.loop import BatchTrainer, OnStep
from posttrain.trainer.policy import LoadedPolicy, save_atomically
from posttrain.trainer.token_budget import token_budget
from posttrain.trainer.train_step import Learner, LossFunction

if TYPE_CHECKING:
    from posttrain.config import ModelConfig, SystemsConfig
    from posttrain.core.progress import Track
    from posttrain.core.ragged import RaggedBatch
    from posttrain.core.types import Sample
    from posttrain.data.preference_rows import Pair
    from posttrain.methods.reward_model.pairwise import RewardModelConfig, RewardModelStage
    from posttrain.models.language_model import LanguageModel
    from posttrain.trainer.stage import StageRun

UNMEASURED_PAIRS = 256
"""Training pairs from which a reward's mean and standard deviation are taken if nothing is held out."""
PairScores = list[tuple[float, float]]
"""(reward of chosen, of rejected) of each pair."""


def train_members(
    stage: RewardModelStage, model: ModelConfig, folder: Path, seed: int, on_step: OnStep | None
) -> dict[str, Any]:
    """Train the members of an ensemble in turn and save them together as `folder`/reward_model.

    Args:
        stage: The stage, its pairs read.
        model: The model to start from.
        folder: The stage's folder; held_out.json and held_out/ get what is measured.
        seed: Seed of the first member.
        on_step: Called after each step of the first member.

    Returns:
        The stage's entry in the manifest.
    """
    config, members = stage.config, folder / "members"
    if distributed.is_main():
        members.mkdir(parents=True, exist_ok=True)
    records = []
    for k in range(config.members):
        member = RewardModelMember(stage, k, members)
        if not member.record.exists() or not (members / str(k)).is_dir():
            work = folder if k == 0 else folder / f"member-{k}"
            member.run(model, work, seed + 1_000_003 * k, on_step if k == 0 else None)
        records.append(read_object(member.record))
    measured = _save_held_out(config, stage.held_out, records, folder) if stage.held_out else {}

    def write(work: Path) -> None:
        if not distributed.is_main():
            return
        entries = []
        for k, record in enumerate(records):
            name = "." if config.members == 1 else str(k)
            shutil.copytree(members / str(k), work / name, copy_function=link_or_copy)
            entries.append({"folder": name, "mean": record["mean"], "std": record["std"]})
        write_json(work / INDEX, _index(config, entries, records[0]["first"]))

    save_atomically(folder / "reward_model", write)
    if distributed.is_main():
        shutil.rmtree(members)
    out: dict[str, Any] = {**records[0]["account"], "members": config.members}
    for name in ("steps", "skipped_steps", "seconds", "tokens"):
        out[name] = sum(r["account"][name] for r in records)
    return out | ({"held_out": measured} if measured else {})


def _index(config: RewardModelConfig, members: list[dict[str, Any]], first: list[int]) -> dict[str, Any]:
    settings = {"chat": config.data.chat, "system": config.data.system, "first": first}
    return {"kind": "reward_model", "members": members, **settings}


class RewardModelMember(ScorerStage):
    """Train one reward model and save it as members/NUMBER, with what was measured in members/NUMBER.json."""

    layout = "sequence"

    def __init__(self, stage: RewardModelStage, number: int, members: Path) -> None:
        config = stage.config
        title = config.name if config.members == 1 else f"{config.name}, member {number + 1} of {config.members}"
        # The name is only the title of the progress line: names of stages may hold no spaces.
        super().__init__(config.model_copy(update={"name": title}), stage.context)
        self.rows, self.held_out, self.out = stage.rows, stage.held_out, members / str(number)
        self.data = stage.data
        self.record, self.before = members / f"{number}.json", members / f"{number}.before.json"
        self.after: PairScores = []

    def folder_of_model(self, run: StageRun) -> Path:
        return self.out

    def trainer(self, policy: LoadedPolicy, run: StageRun) -> BatchTrainer:
        config, pad = self.config, padding(policy.policy)
        self.score = partial(score_pairs, policy.policy, budget=token_budget(config.systems, policy.policy))
        batch_at, steps = run.batches(self.rows, config)

        def samples_at(step: int) -> list[Sample]:
            pairs: Any = batch_at(step)
            return [s for i, p in enumerate(pairs) for s in scored_samples(p, i, pad, config.labels == "hard")]

        systems = with_room_for(config.systems, policy.policy, pair_sizes(self.rows))
        learner, measure = (
            Learner(policy.policy, config.optimizer, systems, steps),
            self.measure if self.held_out else None,
        )
        return BatchTrainer(
            learner, samples_at, bradley_terry_loss(config), measure, settings=config, folder=run.folder
        )

    def measure(self, step: int, track: Track) -> dict[str, float]:
        """Score the held-out pairs."""
        track.phase("held-out pairs")
        self.after = self.score(self.held_out)
        if step == 0 and distributed.is_main():
            write_json(self.before, self.after)
        judged = judged_pairs(held_out_items(self.held_out, self.after))
        numbers = {f"held_out/{n}": judged[n] for n in ("accuracy", "loss", "margin") if n in judged}
        interval = {f"held_out/accuracy_{n}": judged[n] for n in ("low", "high") if n in judged}
        return numbers | interval | {"held_out/calibration_error": judged["calibration"]["error"]}

    def save(self, policy: LoadedPolicy, run: StageRun) -> None:
        if self.held_out and (self.config.keep_best or not self.after):  # of another step than the last, or resumed
            self.after = self.score(self.held_out)
        rewards = torch.tensor(self.after or self.score(self.rows[:UNMEASURED_PAIRS]), dtype=torch.float64)
        self.moments = {"mean": float(rewards.mean()), "std": float(rewards.std(correction=0))}
        data, model = self.config.data, policy.policy
        member = Member(model, policy.tokenizer, data.chat, data.system)
        tokenizer, self.first = scoring_tokenizer(policy.tokenizer, data.chat, data.system, member.answer)
        self.index = _index(self.config, [{"folder": ".", **self.moments}], self.first)
        super().save(replace(policy, tokenizer=tokenizer), run)

    def run(self, model: ModelConfig, folder: Path, seed: int, on_step: OnStep | None = None) -> dict[str, Any]:
        account = super().run(model, folder, seed, on_step)
        if distributed.is_main():
            scores = {"before": read_object(self.before, list), "after": self.after} if self.held_out else {}
            write_json(self.record, {**self.moments, "first": self.first, "account": account, **scores})
        distributed.barrier()
        return account


def with_room_for(systems: SystemsConfig, model: LanguageModel, sizes: Sequence[int]) -> SystemsConfig:
    """Return settings whose micro-batches have room for the largest pair, which is not split.

    Args:
        systems: The stage's settings.
        model: The model that is trained.
        sizes: Tokens of each pair.
    """
    return systems.model_copy(update={"tokens_per_micro_batch": max(token_budget(systems, model), *sizes, 1)})


def scored_samples(pair: Pair, number: int, pad: int | None, hard: bool = False) -> list[Sample]:
    """Return both answers of a pair, each with half of its weight on the token at which the head is read.

    Args:
        pair: The pair; its prompt is computed once.
        number: Number in the batch, by which the loss finds the two.
        pad: Padding token of the model.
        hard: The chosen answer counts as better with probability 1.
    """
    out, p = [], 1.0 if hard else pair.probability
    for side, sample in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        at = score_index(sample.tokens, pad)
        weights = [0.5 * (i == at) for i in range(len(sample))]
        meta = {"group": number, "shared": pair.prompt, "side": side, "at": at}
        out.append(replace(sample, weights=weights, meta={**meta, "margin": pair.margin, "p": p}))
    return out


def bradley_terry_loss(config: RewardModelConfig) -> LossFunction:
    """Return the mean over the batch's pairs (the denominator is their number) of Bradley-Terry's loss and centring."""

    def loss(model: LanguageModel, batch: RaggedBatch, pairs: float) -> tuple[Tensor, dict[str, Tensor]]:
        device = batch.tokens_T.device
        where = torch.stack([row[s.meta.get("at", 0)] for row, s in zip(batch.rows, batch.samples, strict=True)])
        rewards = model(batch, "scores", where)[:, 0]
        sides: dict[Any, dict[str, int]] = {}
        for i, s in enumerate(batch.samples):
            if "at" in s.meta:  # else a pass that only keeps ranks in step
                sides.setdefault(s.meta["group"], {})[s.meta["side"]] = i
        both = list(sides.values())
        chosen, rejected = (
            rewards[torch.tensor([p[side] for p in both], dtype=torch.long, device=device)]
            for side in ("chosen", "rejected")
        )
        about = [batch.samples[p["chosen"]].meta for p in both]
        margins = torch.tensor([config.margin_scale * a["margin"] for a in about], device=device)
        probabilities = torch.tensor([a["p"] for a in about], device=device)
        losses = bradley_terry(chosen, rejected, margins, probabilities)
        if config.centring:
            losses = losses + centring(chosen, rejected, config.centring)
        metrics = bradley_terry_metrics(chosen, rejected)
        metrics["score"] = metrics.pop("reward")
        return losses.sum() / pairs, {name: value.double() / pairs for name, value in metrics.items()}

    return loss


def score_pairs(model: LanguageModel, pairs: Sequence[Pair], budget: int) -> PairScores:
    """Return the rewards of both answers of each pair.

    Args:
        model: The reward model.
        pairs: The pairs.
        budget: Tokens of a forward pass.
    """
    pad, tokens = padding(model), [s.tokens for p in pairs for s in (p.chosen, p.rejected)]
    scores = [float(s[0, 0]) for s in scores_at(model, tokens, [[score_index(t, pad)] for t in tokens], budget)]
    return list(zip(scores[::2], scores[1::2], strict=True))


def held_out_items(pairs: Sequence[Pair], scores: PairScores) -> list[dict[str, Any]]:
    """Return held-out pairs with their rewards, as `judged_pairs` takes them."""
    return [
        {
            "chosen": c,
            "rejected": r,
            "probability": p.probability,
            "chosen_tokens": len(p.chosen) - p.prompt,
            "rejected_tokens": len(p.rejected) - p.prompt,
        }
        for p, (c, r) in zip(pairs, scores, strict=True)
    ]


def _save_held_out(
    config: RewardModelConfig, pairs: Sequence[Pair], records: Sequence[dict[str, Any]], folder: Path
) -> dict[str, Any]:
    """Write each held-out pair with its rewards before and after, and held_out.json; return the latter's main numbers.

    An ensemble's reward is the mean of its members' rewards, each centred on the member's mean.
    """
    summary: dict[str, Any] = {"kind": "reward_model", "members": config.members}
    for when in ("before", "after"):
        scores = torch.tensor([r[when] for r in records], dtype=torch.float64)  # members, pairs, 2
        centred = scores - scores.mean((1, 2), keepdim=True) if config.members > 1 else scores
        joined = combine_members(centred.flatten(1)).view(-1, 2).tolist()
        items = held_out_items(pairs, joined)
        summary[when] = judged_pairs(items)
        if config.members > 1:
            each = [judged_pairs(held_out_items(pairs, r[when])).get("accuracy") for r in records]
            spread = centred.flatten(1).std(0, correction=0)
            summary[when] |= {"members": each, "spread": float(spread.mean())}
        if not distributed.is_main():
            continue
        rows = []
        for i, (p, item) in enumerate(zip(pairs, items, strict=True)):
            each_one = {"each": scores[:, i].tolist()} if config.members > 1 else {}
            names = {"prompt": "prompt_text", "chosen_text": "completion", "rejected_text": "rejected"}
            texts = {ours: p.row.get(name) for ours, name in names.items()}
            rows.append({"id": i, "source": p.source, **item, **each_one, **texts})
        (folder / "held_out").mkdir(exist_ok=True)
        write_lines(folder / "held_out" / f"{when}.jsonl", rows)
    if distributed.is_main():
        write_json(folder / "held_out.json", summary)
    short = ("pairs", "accuracy", "low", "high", "loss", "margin")
    return {when: {n: summary[when][n] for n in short if n in summary[when]} for when in ("before", "after")}
