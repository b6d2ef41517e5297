"""Verifiable instructions: answers, what they follow, and IFEval's four shares (arXiv 2311.07911)."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from posttrain.config.rewards import RewardsConfig, read_reward
from posttrain.eval.item_pictures import item_pictures
from posttrain.eval.sampled_tasks import in_chunks
from posttrain.rewards.instruction_following import import_checkers, verifiable_instructions
from posttrain.rewards.stack import RewardStack
from posttrain.sampling.engine import LocalSampler
from posttrain.sampling.protocol import Request

if TYPE_CHECKING:
    from posttrain.core.progress import Track
    from posttrain.data.prompts import RenderedPrompt
    from posttrain.eval.evaluation_tasks import Chunk, EvaluationItems, EvaluationRun
    from posttrain.eval.ifeval_evaluation import IFEvalTask

MODES = ("strict", "loose")


def ifeval_chunks(run: EvaluationRun, task: IFEvalTask.Config) -> Iterator[Chunk]:
    """Sample an answer to each prompt, and check it.

    Raises:
        LabelError: A row has no instructions that can be checked. Nothing was sampled.
    """
    classes = import_checkers().classes
    names = [verifiable_instructions(p.problem, classes).instruction_id_list for p in run.data.items]
    terms = [read_reward({"kind": "ifeval", "name": mode, "mode": mode, "credit": "share"}) for mode in MODES]
    rewards = run.until.enter_context(RewardStack(RewardsConfig(terms=terms), run.functions, log=run.log))
    sampler = LocalSampler(run.model, run.tokenizer, **task.sampler.options())

    def compute(prompts: Mapping[int, RenderedPrompt], seeds: np.ndarray, track: Track) -> EvaluationItems:
        asked = [Request(p.tokens, 1, int(seeds[i]), p.problem) for i, p in prompts.items()]
        groups = sampler.sample(asked, task.sampler, track.counter("sampling", len(asked), 16))
        track.phase("checking")
        answers = [group.rollouts[0] for group in rewards(groups).groups]
        return [ifeval_item(i, p, a, names[i]) for (i, p), a in zip(prompts.items(), answers, strict=True)]

    return in_chunks(run, 1, 13, compute)


def ifeval_item(number: int, prompt: RenderedPrompt, answer: Any, names: Sequence[str]) -> dict[str, Any]:
    """Return a prompt with its answer and the shares of its instructions that the answer follows.

    Args:
        number: Number of the prompt.
        prompt: The prompt.
        answer: Its answer, with the rewards strict and loose.
        names: Its instructions.
    """
    shares = {mode: answer.rewards.get(mode) for mode in MODES}
    return {
        "id": number,
        "source": str(prompt.problem.get("source", "")),
        "prompt": prompt.text,
        "expected": ", ".join(names),
        "output": answer.text,
        "correct": shares["strict"] == 1.0,
        "instructions": len(names),
        **shares,
        "finish": answer.finish,
        **({"failed": True} if None in shares.values() else {}),
        **item_pictures(number, prompt.tokens),
    }


def ifeval_shares(items: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the shares of prompts and of instructions that are followed, and of answers that were cut off.

        prompt = mean over prompts of [all followed]     instruction = sum of those followed / sum of all

    A prompt whose check failed counts as one that is not followed.

    Args:
        items: At least one `ifeval_item`.
    """
    total = sum(i["instructions"] for i in items)
    out = {}
    for mode in MODES:
        shares = [i[mode] or 0.0 for i in items]
        out[f"prompt_{mode}"] = statistics.fmean(share == 1.0 for share in shares)
        followed = sum(round(share * i["instructions"]) for share, i in zip(shares, items, strict=True))
        out[f"instruction_{mode}"] = followed / total
    return {**out, "instructions": total, "cut": statistics.fmean(i["finish"] == "length" for i in items)}
