"""Reward models from pairs of answers: Bradley-Terry over the pairs of the global batch, alone or as an ensemble."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.config import ModelConfig
from posttrain.core import distributed
from posttrain.core.files import write_json, write_text
from posttrain.core.progress import Track
from posttrain.core.ragged import RaggedBatch
from posttrain.core.types import Sample
from posttrain.data.preference_rows import Pair
from posttrain.eval.calibration import judged_pairs
from posttrain.losses.reward_loss import bradley_terry, bradley_terry_metrics, centring, combine_members
from posttrain.methods.reward_model.pairwise import RewardModelConfig
from posttrain.methods.reward_model.scorer_training import Measured, leave_scorer, open_scorer, whole
from posttrain.models.classification_head import padding, score_index, scores_at
from posttrain.models.language_model import LanguageModel
from posttrain.rewards.reward_model_scorer import INDEX
from posttrain.trainer.loop import OnStep, permutation_batches, train
from posttrain.trainer.policy import save_atomically, summary
from posttrain.trainer.token_budget import token_budget
from posttrain.trainer.train_step import Learner, LossFunction

SAMPLED = 256
"""Training pairs that a reward's mean and standard deviation are taken of where nothing is held out."""
Scored = list[tuple[float, float]]
"""(reward of chosen, of rejected) of each held-out pair."""


def run_reward_model(
    config: RewardModelConfig,
    model: ModelConfig,
    pairs: Sequence[Pair],
    held_out: Sequence[Pair],
    folder: Path,
    *,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> dict[str, Any]:
    """Train on `pairs`; the result is `folder`/reward_model, a folder that transformers opens (members 0, 1, ... of an
    ensemble in folders of their own), with what is measured on `held_out` in `folder`/held_out.json and held_out/.

    Goes on from the newest checkpoint in `folder` where there is one; on_step hears of the first member. Returns what
    the manifest says of the stage.
    """
    if distributed.is_main():
        (folder / "members").mkdir(parents=True, exist_ok=True)
    records = []
    for k in range(config.members):
        record = folder / "members" / f"{k}.json"
        if not record.exists() or not (folder / "members" / str(k)).is_dir():
            _member(config, model, pairs, held_out, folder, k, seed, on_step if k == 0 else None)
        records.append(json.loads(record.read_text()))
    measured = _held_out(config, held_out, records, folder) if held_out else {}

    def write(work: Path) -> None:
        if not distributed.is_main():
            return
        for k in range(config.members):
            target = work if config.members == 1 else work / str(k)
            shutil.copytree(folder / "members" / str(k), target, copy_function=_link)
        entries = [
            {"folder": "." if config.members == 1 else str(k), "mean": r["mean"], "std": r["std"]}
            for k, r in enumerate(records)
        ]
        settings = {"chat": config.data.chat, "system": config.data.system}
        write_json(work / INDEX, {"kind": "reward_model", "members": entries, **settings})

    save_atomically(folder / "reward_model", write)
    if distributed.is_main():
        shutil.rmtree(folder / "members")
    out: dict[str, Any] = {**records[0]["account"], "members": config.members}
    for name in ("steps", "skipped_steps", "seconds", "tokens"):
        out[name] = sum(r["account"][name] for r in records)
    return out | ({"held_out": measured} if measured else {})


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _member(
    config: RewardModelConfig,
    model: ModelConfig,
    pairs: Sequence[Pair],
    held_out: Sequence[Pair],
    folder: Path,
    k: int,
    seed: int,
    on_step: OnStep | None,
) -> None:
    """Train member k; leave it in members/k, and what was measured in members/k.json."""
    seed = seed + 1_000_003 * k
    work = folder if k == 0 else folder / f"member-{k}"
    opened = open_scorer(config, model, "sequence", seed)
    policy, pad = opened.policy, padding(opened.policy)
    at, steps = permutation_batches(pairs, config.batch_size, config.epochs, seed, config.max_steps)  # type: ignore[arg-type]
    budget = token_budget(config.systems, policy)
    systems = whole(config.systems, policy, [len(p.chosen) + len(p.rejected) - p.prompt for p in pairs])
    learner = Learner(policy, config.optimizer, systems, steps)
    every = config.held_out.every if config.held_out is not None else 0
    before, after = folder / "members" / f"{k}.before.json", Scored()

    def measure(step: int, track: Track) -> dict[str, float]:
        track.phase("held-out pairs")
        found = score_pairs(policy, held_out, pad, budget)
        if step == 0 and distributed.is_main():
            write_json(before, found)
        after[:] = found
        judged = judged_pairs(items_of(held_out, found))
        numbers = {f"held_out_{n}": judged[n] for n in ("accuracy", "loss", "margin") if n in judged}
        interval = {f"held_out_accuracy_{n}": judged[n] for n in ("low", "high") if n in judged}
        return numbers | interval | {"held_out_calibration_error": judged["calibration"]["error"]}

    def batch_at(step: int) -> list[Sample]:
        batch: Any = at(step)
        return [s for i, pair in enumerate(batch) for s in pair_samples(pair, i, pad, config.labels == "hard")]

    result = train(
        learner,
        Measured(learner, batch_at, pair_loss(config), measure if held_out else None, every),
        work,
        checkpoint_every=config.checkpoint_every,
        keep=config.keep_checkpoints,
        title=config.name if config.members == 1 else f"{config.name}, member {k + 1} of {config.members}",
        on_step=on_step,
        epoch_of=lambda step: step * config.batch_size / len(pairs),
        shown=("loss", "accuracy", "held_out_accuracy"),
    )
    if held_out and not after:  # gone on with behind the last step
        after[:] = score_pairs(policy, held_out, pad, budget)
    rewards = after or score_pairs(policy, pairs[:SAMPLED], pad, budget)
    flat = torch.tensor(rewards, dtype=torch.float64).flatten()
    kept = {"mean": float(flat.mean()), "std": float(flat.std(correction=0)), "account": summary(result, opened)}
    if distributed.is_main():
        kept |= {"before": json.loads(before.read_text()), "after": after} if held_out else {}
        write_json(folder / "members" / f"{k}.json", kept)
    entry = {"folder": ".", "mean": kept["mean"], "std": kept["std"]}
    settings = {"chat": config.data.chat, "system": config.data.system}
    index = {"kind": "reward_model", "members": [entry], **settings}
    leave_scorer(opened, config, model, "sequence", folder / "members" / str(k), seed, index)


def pair_samples(pair: Pair, number: int, pad: int | None, hard: bool = False) -> list[Sample]:
    """Both answers of a pair as the learner takes them: half its weight each, on the token at which the head is read.

    number: the pair's in its batch, by which the loss finds the two; a prompt of the pair is computed once. hard: the
    answer that is more likely the better one counts as better for certain.
    """
    out, p = [], 1.0 if hard else pair.probability
    for side, sample in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        at = score_index(sample.tokens, pad)
        weights = [0.5 * (i == at) for i in range(len(sample))]
        meta = {"group": number, "shared": pair.prompt, "side": side, "at": at}
        out.append(replace(sample, weights=weights, meta={**meta, "margin": pair.margin, "p": p}))
    return out


def pair_loss(config: RewardModelConfig) -> LossFunction:
    """The mean over the batch's pairs (the denominator is their number) of Bradley-Terry's loss and the centring."""

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


def score_pairs(model: LanguageModel, pairs: Sequence[Pair], pad: int | None, budget: int) -> Scored:
    """Rewards of both answers of each pair."""
    samples = [s for p in pairs for s in (p.chosen, p.rejected)]
    found = scores_at(model, [s.tokens for s in samples], [[score_index(s.tokens, pad)] for s in samples], budget)
    numbers = [float(f[0, 0]) for f in found]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def items_of(pairs: Sequence[Pair], scores: Scored) -> list[dict[str, Any]]:
    """Held-out pairs with their rewards, as `judged_pairs` takes them."""
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


def _held_out(
    config: RewardModelConfig, pairs: Sequence[Pair], records: Sequence[dict[str, Any]], folder: Path
) -> dict[str, Any]:
    """Write every held-out pair with its rewards, before and after, and what they come to; return the latter in short.

    An ensemble's reward is the mean of its members' after each was centred on its own mean.
    """
    summary: dict[str, Any] = {"kind": "reward_model", "members": config.members}
    for when in ("before", "after"):
        scores = torch.tensor([r[when] for r in records], dtype=torch.float64)  # members, pairs, 2
        centred = scores - scores.mean((1, 2), keepdim=True) if config.members > 1 else scores
        joined = combine_members(centred.flatten(1)).view(-1, 2).tolist()
        items = items_of(pairs, joined)
        summary[when] = judged_pairs(items)
        if config.members > 1:
            each = [judged_pairs(items_of(pairs, r[when])).get("accuracy") for r in records]
            spread = centred.flatten(1).std(0, correction=0)
            summary[when] |= {"members": each, "spread": float(spread.mean())}
        if not distributed.is_main():
            continue
        lines = []
        for i, (p, item) in enumerate(zip(pairs, items, strict=True)):
            said = {"prompt": p.row.get("prompt_text"), "chosen_text": p.row.get("completion")}
            each_one = {"each": scores[:, i].tolist()} if config.members > 1 else {}
            told = {"id": i, "source": p.source, **item, **each_one, **said, "rejected_text": p.row.get("rejected")}
            lines.append(json.dumps(told, ensure_ascii=False) + "\n")
        (folder / "held_out").mkdir(exist_ok=True)
        write_text(folder / "held_out" / f"{when}.jsonl", "".join(lines))
    if distributed.is_main():
        write_json(folder / "held_out.json", summary)
    short = ("pairs", "accuracy", "low", "high", "loss", "margin")
    return {when: {n: summary[when][n] for n in short if n in summary[when]} for when in ("before", "after")}
