"""Rejection sampling: the model's own completions with a high reward become rows for supervised fine-tuning.

Sources: RFT, arXiv 2308.01825 section 3.3 (right and different chains, some a question); the R1 chain's third step,
arXiv 2501.12948 section 2.3.3. Every completion is stored in rollouts/ and counted: kept, or dropped for one reason.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from posttrain.config.problems import ProblemsConfig
from posttrain.config.rewards import RewardConfig, RewardsConfig
from posttrain.config.settings import NAME, ModelConfig, SamplerConfig
from posttrain.core.errors import DataError
from posttrain.core.progress import Track
from posttrain.methods.data.data_stage import (
    DataStage,
    DataStageConfig,
    chunked,
    refuse_torchrun,
    save_rows,
)
from posttrain.rewards.reward_log import LOG
from posttrain.rewards.stack import RewardStack
from posttrain.sampling.frozen_sampler import open_sampler
from posttrain.sampling.rollout_store import read_rollouts, rollout_steps, rollouts_path, write_rollouts

if TYPE_CHECKING:
    from posttrain.data.prompts import RenderedPrompt

SAMPLED_TOGETHER = 256
"""Completions of one chunk, about: sampled together, stored in one file, sampled again after a crash."""


class RejectionConfig(DataStageConfig):
    """Rejection sampling: the model's own completions with a high reward are kept as rows to train on."""

    one_process = ("method",)
    method: Literal["rejection_sampling"] = "rejection_sampling"
    name: str = Field("rejection", pattern=NAME, description="Name of the stage's folder in the run.")
    problems: ProblemsConfig
    rewards: RewardsConfig
    sampler: SamplerConfig = SamplerConfig()
    n: int = Field(8, ge=1, description="Completions of each problem.")
    threshold: float = Field(1.0, description="Reward from which a completion is kept.")
    keep: int | None = Field(4, ge=1, description="Most rows of a problem. None: all.")
    rank_by: RewardConfig | None = Field(
        None,
        description="If more than `keep` pass, those with the highest of this score are kept. None: those sampled first.",
    )
    longest: int | None = Field(
        None, ge=1, description="Longest completion that is kept, in tokens, its end included. None: all that ended."
    )

    @model_validator(mode="after")
    def _fits(self) -> RejectionConfig:
        if self.sampler.temperature == 0 and self.n > 1:
            raise ValueError("sampler.temperature is 0: all n completions would be the same. Raise it, or set n to 1")
        if self.rank_by is not None and self.keep is None:
            raise ValueError(
                "rank_by chooses among what passes, and keep is none: all of it is kept. Set keep, or drop rank_by"
            )
        if self.rank_by is not None and "rank" in [p.title for p in self.rewards.terms]:
            raise ValueError("a reward is named 'rank', as the score of rank_by is; give it another name")
        return self


class RejectionSampling(DataStage):
    """Sample completions, chunk by chunk in rollouts/, score them, and save the best as rows."""

    Config = RejectionConfig
    title = "Rejection sampling"

    def prepare(self) -> list[tuple[str, Any]]:
        return self.load_prompts(self.config.problems)

    def make(self, model: ModelConfig, folder: Path, seed: int) -> dict[str, Any]:
        config = self.config
        refuse_torchrun(config.method)
        chunks = chunked(len(self.prompts), max(1, SAMPLED_TOGETHER // config.n))
        finished = set(rollout_steps(folder / "rollouts"))
        if missing := {c: part for c, part in chunks.items() if c not in finished}:
            self._sample(model, folder / "rollouts", missing, seed)
        rows, problems, dropped = [], [], Counter[str]()
        for c in chunks:
            for sampled in _by_problem(read_rollouts(rollouts_path(folder / "rollouts", c))):
                kept, reasons = select(config, sampled)
                dropped.update(reasons)
                prompt = self.prompts[sampled[0]["problem"]]
                rows += [sft_row(prompt, r) for r in kept]
                right = sum(_passes(config, r) for r in sampled)
                entry = {"problem": sampled[0]["problem"], "source": str(prompt.problem.get("source", ""))}
                problems.append({**entry, "samples": len(sampled), "right": right, "kept": len(kept)})
        stats = _count(config, rows, problems, dropped)
        if not rows:
            why = ", ".join(f"{n:,} {reason}" for reason, n in dropped.most_common())
            raise DataError(
                f"stage {config.name} kept none of {stats['samples']:,} completions ({why}). Lower threshold "
                f"({config.threshold:g}), raise n ({config.n}) or sampler.max_tokens, or start from a model that gets "
                "some problems right; posttrain inspect RUN shows what was sampled"
            )
        save_rows(folder, {"rows": rows, "problems": problems}, stats)
        made = {"samples": stats["samples"], "rows kept": stats["kept"], "problems": stats["problems"]}
        made |= {"problems with a row": stats["solved"]} | {f"dropped: {why}": n for why, n in stats["dropped"].items()}
        return {"made": made, "tokens": stats["tokens"]}

    def _sample(self, model: ModelConfig, folder: Path, missing: Mapping[int, range], seed: int) -> None:
        """Sample and score the missing chunks. A problem's completions depend on (seed, its number) alone."""
        import numpy as np

        from posttrain.sampling.protocol import Request

        config, prompts = self.config, self.prompts
        sampler = open_sampler(model, config.sampler)
        streams = np.random.SeedSequence([seed, 4]).generate_state(len(prompts), np.uint64)
        total, kept = len(prompts) * config.n, 0
        before = done = total - sum(map(len, missing.values())) * config.n
        with (
            RewardStack(_rewards(config), self.context.functions, log=folder.parent / LOG) as rewards,
            Track(config.name, total, before) as track,
        ):
            for c, part in missing.items():
                count = track.counter("sampling,", total, 16, done)
                requests = [Request(prompts[i].tokens, config.n, int(streams[i]), prompts[i].problem) for i in part]
                groups = rewards(sampler.sample(requests, config.sampler, count)).groups
                write_rollouts(folder, c, groups, None, [prompts[i].text for i in part], list(part))
                done += len(part) * config.n
                kept += sum(r.reward >= config.threshold for g in groups for r in g.rollouts)
                track.update(done, above_threshold=f"{kept / (done - before):.0%}")


def _rewards(config: RejectionConfig) -> RewardsConfig:
    """Return the stage's rewards, with the score that chooses among those that pass as a term that does not count."""
    if config.rank_by is None:
        return config.rewards
    rank = config.rank_by.model_copy(update={"name": "rank", "weight": 0.0})
    return config.rewards.model_copy(update={"terms": [*config.rewards.terms, rank]})


def _by_problem(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    groups: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    return [group for _, group in sorted(groups.items())]


def _passes(config: RejectionConfig, row: Mapping[str, Any]) -> bool:
    reward = row["reward"]
    return reward is not None and math.isfinite(reward) and reward >= config.threshold


def select(config: RejectionConfig, sampled: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Select the completions of one problem that become rows.

    A completion is dropped for the first reason that holds: no reward (one failed), below the threshold, cut at the
    longest length (it has no end to train on), longer than `longest`, empty, the same text as an earlier one except
    for spaces, beyond the best `keep`.

    Returns:
        The completions that are kept, best first, and how many were dropped by reason.
    """
    reasons, good, seen = Counter[str](), list[dict[str, Any]](), set[str]()
    for row in sampled:
        content = " ".join(row["completion"].split())
        if row["reward"] is None:
            reasons["no reward"] += 1
        elif not _passes(config, row):
            reasons["below the threshold"] += 1
        elif row["finish"] == "length":
            reasons["cut at the longest length"] += 1
        elif config.longest is not None and len(row["tokens"]) > config.longest:
            reasons["longer than longest"] += 1
        elif not content:
            reasons["empty"] += 1
        elif content in seen:
            reasons["repeated"] += 1
        else:
            seen.add(content)
            good.append(row)
    if config.rank_by is not None:
        good.sort(key=lambda r: -r["parts"]["rank"])  # equals stay as they were sampled
    kept = good if config.keep is None else good[: config.keep]
    if len(good) > len(kept):
        reasons["beyond keep"] += len(good) - len(kept)
    return kept, reasons


def sft_row(prompt: RenderedPrompt, row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row for supervised fine-tuning: the prompt's turns, and the completion as the last."""
    from posttrain.data.prompts import template_columns

    turns = [dict(m) for m in prompt.problem["messages"]]
    answer = {"role": "assistant", "content": row["completion"]}
    context = template_columns(prompt.problem)
    numbers = {"answer": row["answer"], "reward": row["reward"], "parts": row["parts"], "tokens": len(row["tokens"])}
    return {"messages": [*turns, answer], **context, **numbers, "problem": row["problem"], "source": row["source"]}


def _count(
    config: RejectionConfig, rows: Sequence[Any], problems: Sequence[Mapping[str, Any]], dropped: Counter[str]
) -> dict[str, Any]:
    """Return stats.json: kept and dropped sum to samples; success[i]: problems with i right completions."""
    success = Counter(p["right"] for p in problems)
    return {
        "samples": sum(p["samples"] for p in problems),
        "kept": len(rows),
        "dropped": dict(dropped.most_common()),
        "problems": len(problems),
        "solved": sum(p["kept"] > 0 for p in problems),
        "right": sum(p["right"] for p in problems),
        "success": [success.get(i, 0) for i in range(config.n + 1)],
        "tokens": sum(r["tokens"] for r in rows),
    }
