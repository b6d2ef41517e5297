"""Process reward models: at the end of each step of a chain, how likely it is to end right (arXiv 2312.08935)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from posttrain.core import distributed
from posttrain.core.errors import ModelError
from posttrain.core.files import read_lines, write_json, write_lines
from posttrain.data.process_rows import PreparedChains
from posttrain.eval.calibration import judged_steps
from posttrain.losses.reward_loss import step_logits, step_loss, step_metrics
from posttrain.methods.reward_model.monte_carlo import Labeller, labelled_chains
from posttrain.models.classification_head import has_head, scores_at
from posttrain.models.loading import load_tokenizer
from posttrain.rewards.reward_log import LOG
from posttrain.rewards.stack import RewardStack
from posttrain.sampling.frozen_sampler import open_sampler
from posttrain.trainer.loop import BatchTrainer
from posttrain.trainer.token_budget import token_budget
from posttrain.trainer.train_step import Learner

if TYPE_CHECKING:
    from posttrain.config import ModelConfig
    from posttrain.core.progress import Track
    from posttrain.core.ragged import RaggedBatch
    from posttrain.core.types import Sample
    from posttrain.data.prompts import PromptSet
    from posttrain.methods.reward_model.process import ProcessRewardConfig
    from posttrain.models.language_model import LanguageModel
    from posttrain.trainer.policy import LoadedPolicy
    from posttrain.trainer.stage import Functions, StageRun


def label_prompts(
    config: ProcessRewardConfig,
    model: ModelConfig,
    prompts: PromptSet,
    held_out: PromptSet | None,
    folder: Path,
    seed: int,
    functions: Functions | None,
) -> tuple[PreparedChains, PreparedChains]:
    """Sample chains of the prompts and label them by Monte Carlo; they are stored in `folder`/labels.

    Args:
        config: Settings of the stage.
        model: The policy that writes the chains, loaded only if something is missing.
        prompts: Prompts to train on.
        held_out: Prompts to measure on. None: none.
        folder: The stage's folder.
        seed: Seeds sampling.
        functions: Rewards that live in this program.

    Returns:
        Labelled chains to train on and to measure on.

    Raises:
        ModelError: The stage runs under torchrun, or the model is a process reward model.
    """
    labels: Any = config.labels
    if distributed.world() > 1:
        raise ModelError("chains are labelled in one process so far; start it without torchrun")
    if has_head(model, "token"):
        raise ModelError(f"{model.source} is a process reward model, which writes no chains: start from a policy")
    parts = {"train": prompts.items, "held_out": held_out.items if held_out else []}
    files = {name: folder / "labels" / f"{name}.jsonl" for name in parts}
    if any(len(read_lines(files[name])) < len(part) for name, part in parts.items()):
        sampler = open_sampler(model, labels.sampler)
        with RewardStack(labels.rewards, functions, log=folder / LOG) as rewards:
            for i, (name, part) in enumerate(parts.items()):
                # Held-out problems have a random stream that does not depend on the number of training problems.
                labeller = Labeller(labels, config.separator, sampler, rewards, seed + 500_009 * i)
                if part:
                    labeller.label(part, files[name], f"{config.name}, labels" + (", held out" if i else ""))
    tokenizer = load_tokenizer(model)
    train, rest = (
        labelled_chains(read_lines(files[name]), part, tokenizer) if part else PreparedChains([])
        for name, part in parts.items()
    )
    return train, rest


def process_trainer(
    config: ProcessRewardConfig,
    policy: LoadedPolicy,
    samples: Sequence[Sample],
    held_out: Sequence[Sample],
    run: StageRun,
) -> BatchTrainer:
    """Return the trainer over labelled chains.

    Args:
        config: Settings of the stage.
        policy: The model under its head.
        samples: Chains to train on.
        held_out: Chains to measure on; their scores are written to held_out/. Empty: nothing is measured.
        run: Folder and seed of the stage.
    """
    batch_at, steps = run.batches(samples, config)
    learner = Learner(policy.policy, config.optimizer, config.systems, steps)
    budget = token_budget(config.systems, policy.policy)

    def measure(step: int, track: Track) -> dict[str, float]:
        track.phase("held-out chains")
        items = _score_chains(policy, held_out, budget)
        if distributed.is_main():
            path = run.folder / "held_out" / f"{'after' if step else 'before'}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_lines(path, items)
        judged = judged_steps(items)
        names = {"accuracy": "accuracy", "low": "accuracy_low", "high": "accuracy_high", "auc": "auc"}
        return {f"held_out/{names[n]}": judged[n] for n in names if judged[n] is not None}

    return BatchTrainer(learner, batch_at, chain_loss, measure if held_out else None, config.measure_every)


def save_held_out(folder: Path) -> dict[str, Any]:
    """Write `folder`/held_out.json from the scores in held_out/, and return its main numbers."""
    measured = {when: judged_steps(read_lines(folder / "held_out" / f"{when}.jsonl")) for when in ("before", "after")}
    if distributed.is_main():
        write_json(folder / "held_out.json", {"kind": "process_reward", **measured})
    short = ("chains", "steps", "accuracy", "low", "high", "auc", "first_error")
    return {when: {n: numbers[n] for n in short} for when, numbers in measured.items()}


def _score_chains(policy: LoadedPolicy, samples: Sequence[Sample], budget: int) -> list[dict[str, Any]]:
    """Return each chain with the scores of its steps."""
    logits = scores_at(policy.policy, [s.tokens for s in samples], [s.meta["ends"] for s in samples], budget)
    items = []
    for i, (s, steps) in enumerate(zip(samples, logits, strict=True)):
        edges = [int(s.meta["shared"]), *(e + 1 for e in s.meta["ends"])]
        prompt, *texts = (
            policy.tokenizer.decode(list(s.tokens[a:b])) for a, b in zip([0, *edges], edges, strict=False)
        )
        judged = {"scores": step_logits(steps).sigmoid().tolist(), "targets": s.meta["targets"]}
        items.append({"id": i, "source": s.source, **judged, "prompt": prompt, "steps": texts})
    return items


def chain_loss(model: LanguageModel, batch: RaggedBatch, steps: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the mean over the batch's labelled steps of cross-entropy at their ends.

    Args:
        model: The model under its head.
        batch: Chains.
        steps: Number of labelled steps of the whole batch.

    Returns:
        The loss, and sums of metrics over `steps`.
    """
    device = batch.tokens_T.device
    where, targets = list[Tensor](), list[float]()
    for row, s in zip(batch.rows, batch.samples, strict=True):
        where.append(row[torch.tensor(s.meta.get("ends", []), dtype=torch.long, device=device)])
        targets += s.meta.get("targets", [])
    logits = step_logits(model(batch, "scores", torch.cat(where)))
    labels = torch.tensor(targets, dtype=logits.dtype, device=device)
    losses = step_loss(logits, labels)
    return losses.sum() / steps, {n: v.double() / steps for n, v in step_metrics(logits, labels).items()}
