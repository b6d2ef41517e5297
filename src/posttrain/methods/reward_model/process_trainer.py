"""Process reward models: at the end of each step of a chain, how likely it is to end right (arXiv 2312.08935)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.config import ModelConfig
from posttrain.core import distributed
from posttrain.core.errors import ModelError
from posttrain.core.files import read_lines, write_json, write_text
from posttrain.core.progress import Track
from posttrain.core.ragged import RaggedBatch
from posttrain.core.types import Sample
from posttrain.data.process_rows import PreparedChains
from posttrain.data.prompts import RenderedPrompt
from posttrain.eval.calibration import judged_steps
from posttrain.losses.reward_loss import step_logits, step_loss, step_metrics
from posttrain.methods.reward_model.monte_carlo import Labeller, labelled
from posttrain.methods.reward_model.process import ProcessRewardConfig, RolloutLabelsConfig
from posttrain.methods.reward_model.scorer_training import Measured, leave_scorer, open_scorer
from posttrain.models.classification_head import has_head, scores_at
from posttrain.models.language_model import LanguageModel, verify
from posttrain.models.loading import load_model, load_tokenizer
from posttrain.rewards.stack import RewardStack
from posttrain.sampling.engine import LocalSampler
from posttrain.trainer.loop import OnStep, permutation_batches, train
from posttrain.trainer.policy import summary
from posttrain.trainer.stage import Functions
from posttrain.trainer.token_budget import token_budget
from posttrain.trainer.train_step import Learner


def label(
    config: ProcessRewardConfig,
    model: ModelConfig,
    questions: Sequence[RenderedPrompt],
    held_out: Sequence[RenderedPrompt],
    folder: Path,
    seed: int,
    functions: Functions | None = None,
) -> tuple[PreparedChains, PreparedChains]:
    """Chains of the questions and of the held-out ones, labelled by Monte Carlo, kept in `folder`/labels.

    The model is both what writes the chains and what the process reward model is made of; as a policy it is opened
    only where something is left to label.
    """
    labels = config.labels
    assert isinstance(labels, RolloutLabelsConfig)
    if distributed.world() > 1:
        raise ModelError("chains are labelled in one process so far; start it without torchrun")
    if has_head(model, "token"):
        raise ModelError(f"{model.source} is a process reward model, which writes no chains: start from a policy")
    parts = {"train": questions, "held_out": held_out}
    files = {name: folder / "labels" / f"{name}.jsonl" for name in parts}
    if any(len(read_lines(files[name])) < len(part) for name, part in parts.items()):
        _label_all(config, labels, model, parts, files, seed, functions)
    tokenizer = load_tokenizer(model)
    train, rest = (
        labelled(read_lines(files[name]), part, tokenizer) if part else PreparedChains([])
        for name, part in parts.items()
    )
    return train, rest


def _label_all(
    config: ProcessRewardConfig,
    labels: RolloutLabelsConfig,
    model: ModelConfig,
    parts: dict[str, Sequence[RenderedPrompt]],
    files: dict[str, Path],
    seed: int,
    functions: Functions | None,
) -> None:
    """The policy and the judge, opened for as long as they are needed."""
    hf, tokenizer = load_model(model)
    policy = LanguageModel(hf).eval().requires_grad_(False)
    verify(policy)
    sampler = LocalSampler(policy, tokenizer, **labels.sampler.limits())
    with RewardStack(labels.rewards, functions) as rewards:
        for i, (name, part) in enumerate(parts.items()):
            # Held-out problems come from a stream of their own, whatever the number of those before.
            labeller = Labeller(labels, config.separator, sampler, tokenizer, rewards, seed + 500_009 * i)
            if part:
                labeller.label(part, files[name], f"{config.name}, labels" + (", held out" if i else ""))


def run_process_reward(
    config: ProcessRewardConfig,
    model: ModelConfig,
    chains: PreparedChains,
    held_out: PreparedChains,
    folder: Path,
    *,
    seed: int = 0,
    on_step: OnStep | None = None,
    index: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train on `chains`; the result is `folder`/reward_model, a folder that transformers opens, with what is measured
    on `held_out` in `folder`/held_out.json and held_out/.

    index: what is kept beside the model to score as in training. Goes on from the newest checkpoint in `folder` where
    there is one. Returns what the manifest says of the stage.
    """
    opened = open_scorer(config, model, "token", seed)
    policy, budget = opened.policy, token_budget(config.systems, opened.policy)
    samples, rest = chains.samples, held_out.samples
    batch_at, steps = permutation_batches(samples, config.batch_size, config.epochs, seed, config.max_steps)
    learner = Learner(policy, config.optimizer, config.systems, steps)

    def measure(step: int, track: Track) -> dict[str, float]:
        track.phase("held-out chains")
        when = "before" if step == 0 else "after"
        judged = _measured(policy, rest, budget, opened.tokenizer, folder / "held_out" / f"{when}.jsonl")
        names = {"accuracy": "accuracy", "low": "accuracy_low", "high": "accuracy_high", "auc": "auc"}
        return {f"held_out_{names[n]}": judged[n] for n in names if judged[n] is not None}

    result = train(
        learner,
        Measured(learner, batch_at, chain_loss, measure if rest else None, config.measure_every),
        folder,
        checkpoint_every=config.checkpoint_every,
        keep=config.keep_checkpoints,
        title=config.name,
        on_step=on_step,
        epoch_of=lambda step: step * config.batch_size / len(samples),
        shown=("loss", "accuracy", "held_out_accuracy"),
    )
    out = summary(result, opened) | {"labels": chains.stats}
    if rest:
        measured: dict[str, Any] = {"kind": "process_reward"}
        for when in ("before", "after"):
            measured[when] = judged_steps(read_lines(folder / "held_out" / f"{when}.jsonl"))
        if distributed.is_main():
            write_json(folder / "held_out.json", measured)
        short = ("chains", "steps", "accuracy", "low", "high", "auc", "first_error")
        out["held_out"] = {when: {n: measured[when][n] for n in short} for when in ("before", "after")}
    members = [{"folder": "."}]
    kept = {"kind": "process_reward", "members": members, "chat": True, "separator": config.separator, **(index or {})}
    leave_scorer(opened, config, model, "token", folder / "reward_model", seed, kept)
    return out


def _measured(
    policy: LanguageModel, samples: Sequence[Sample], budget: int, tokenizer: Any, path: Path
) -> dict[str, Any]:
    """Scores of the held-out steps, written chain by chain, and what they come to."""
    found = scores_at(policy, [s.tokens for s in samples], [s.meta["ends"] for s in samples], budget)
    items = []
    for i, (s, numbers) in enumerate(zip(samples, found, strict=True)):
        scores = step_logits(numbers).sigmoid().tolist()
        edges = [int(s.meta["shared"]), *(e + 1 for e in s.meta["ends"])]
        texts = [tokenizer.decode(list(s.tokens[a:b])) for a, b in zip(edges, edges[1:], strict=False)]
        prompt = tokenizer.decode(list(s.tokens[: edges[0]]))
        judged = {"scores": scores, "targets": s.meta["targets"]}
        items.append({"id": i, "source": s.source, **judged, "prompt": prompt, "steps": texts})
    if distributed.is_main():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(json.dumps(i, ensure_ascii=False) + "\n" for i in items))
    return judged_steps(items)


def chain_loss(model: LanguageModel, batch: RaggedBatch, steps: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean over the batch's labelled steps (the denominator is their number) of cross-entropy at their ends."""
    device = batch.tokens_T.device
    where, targets = list[Tensor](), list[float]()
    for row, s in zip(batch.rows, batch.samples, strict=True):
        where.append(row[torch.tensor(s.meta.get("ends", []), dtype=torch.long, device=device)])
        targets += s.meta.get("targets", [])
    logits = step_logits(model(batch, "scores", torch.cat(where)))
    wanted = torch.tensor(targets, dtype=logits.dtype, device=device)
    losses = step_loss(logits, wanted)
    return losses.sum() / steps, {n: v.double() / steps for n, v in step_metrics(logits, wanted).items()}
