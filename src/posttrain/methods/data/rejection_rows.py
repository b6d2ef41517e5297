"""Rejection sampling: the model's own completions that rewards hold for good become rows for supervised fine-tuning.

Sources: RFT, arXiv 2308.01825 section 3.3 (right and different chains, some a question); the R1 chain's third step,
arXiv 2501.12948 section 2.3.3. Everything sampled is kept in rollouts/, and every completion is in the account: kept,
or dropped for one reason.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.config import ModelConfig
from posttrain.config.rewards import RewardsConfig
from posttrain.core.errors import DataError
from posttrain.core.progress import Track
from posttrain.data.prompts import RenderedPrompt
from posttrain.methods.data.rejection import RejectionConfig
from posttrain.methods.data.row_making import alone, chunked, leave_data, open_sampler
from posttrain.methods.rl.collect_rollouts import with_failed
from posttrain.rewards.stack import RewardStack
from posttrain.sampling.protocol import Request
from posttrain.sampling.rollout_store import read_rollouts, rollout_steps, rollouts_path, write_rollouts
from posttrain.trainer.stage import Functions

CHUNK = 256
"""Completions of one chunk, about: what is sampled together, kept in one file, and done again after a crash."""


def run_rejection(
    config: RejectionConfig,
    model: ModelConfig,
    questions: Sequence[RenderedPrompt],
    folder: Path,
    *,
    seed: int = 0,
    functions: Functions | None = None,
) -> dict[str, Any]:
    """Sample, judge, keep: `folder`/data has rows.jsonl, problems.jsonl, stats.json. Returns the manifest's account.

    Goes on behind the last chunk that is there. Raises DataError where nothing is kept, RewardError where rewards can't
    be had or fail too often, ModelError under torchrun.
    """
    alone("rejection_sampling")
    began = time.perf_counter()
    chunks = chunked(len(questions), max(1, CHUNK // config.n))
    there = set(rollout_steps(folder / "rollouts"))
    left = [c for c in range(len(chunks)) if c + 1 not in there]
    if left:
        _sample(config, model, questions, folder, chunks, left, seed, functions)
    rows, problems, dropped = [], [], Counter[str]()
    for c in range(len(chunks)):
        for of_problem in _by_problem(read_rollouts(rollouts_path(folder / "rollouts", c + 1))):
            kept, reasons = select(config, of_problem)
            dropped.update(reasons)
            question = questions[of_problem[0]["problem"]]
            rows += [row_of(question, r) for r in kept]
            right = sum(_passes(config, r) for r in of_problem)
            about = {"problem": of_problem[0]["problem"], "source": str(question.problem.get("source", ""))}
            problems.append({**about, "samples": len(of_problem), "right": right, "kept": len(kept)})
    stats = stats_of(config, rows, problems, dropped)
    if not rows:
        why = ", ".join(f"{n:,} {reason}" for reason, n in dropped.most_common())
        raise DataError(
            f"stage {config.name} kept none of {stats['samples']:,} completions ({why}). Lower threshold "
            f"({config.threshold:g}), raise n ({config.n}) or sampler.max_tokens, or start from a model that gets "
            "some problems right; posttrain inspect RUN shows what was sampled"
        )

    leave_data(folder, {"rows": rows, "problems": problems}, stats)
    counted = {"samples": stats["samples"], "rows kept": stats["kept"], "problems": stats["problems"]}
    counted["problems with a row"] = stats["solved"]
    counted |= {f"dropped: {why}": n for why, n in stats["dropped"].items()}
    return {"made": counted, "tokens": stats["tokens"], "seconds": round(time.perf_counter() - began, 2)}


def _sample(
    config: RejectionConfig,
    model: ModelConfig,
    questions: Sequence[RenderedPrompt],
    folder: Path,
    chunks: Sequence[range],
    left: Sequence[int],
    seed: int,
    functions: Functions | None,
) -> None:
    """Sample and judge the chunks that are not there yet. A problem's completions depend on (seed, its number)."""
    sampler = open_sampler(model, config.sampler)
    streams = np.random.SeedSequence([seed, 4]).generate_state(len(questions), np.uint64)
    total, kept = len(questions) * config.n, 0
    before = sum(len(chunks[c]) for c in range(len(chunks)) if c not in left) * config.n
    with RewardStack(_rewards(config), functions) as rewards, Track(config.name, total, before) as track:
        done = before
        for c in left:
            part, at = chunks[c], 0

            def count(*_: Any) -> None:
                nonlocal at
                at += 1
                if at % 16 == 0:
                    track.phase(f"sampling, {done + at}/{total}")  # noqa: B023  called within this turn of the loop

            requests = [Request(questions[i].tokens, config.n, int(streams[i]), questions[i].problem) for i in part]
            scored = rewards(sampler.sample(requests, config.sampler, count))
            groups, _, failures = with_failed(scored)
            texts = [questions[i].text for i in part]
            write_rollouts(folder / "rollouts", c + 1, groups, None, texts, list(part), failures)
            done += len(part) * config.n
            kept += sum(r.reward >= config.threshold for g in scored.groups for r in g.rollouts)
            track.update(done, above_threshold=f"{kept / (done - before):.0%}")


def _rewards(config: RejectionConfig) -> RewardsConfig:
    """The stage's rewards, and the score that chooses among those that pass as a part that does not count."""
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
    """(rows kept, in the order in which they are chosen; how many were dropped by reason) of one problem's completions.

    A completion is dropped for the first of these that holds: no reward (one failed), below the threshold, cut at the
    longest length (it has no end to be learnt), longer than `longest`, empty, the same text as one
    before it but for spaces, and beyond the best `keep`.
    """
    reasons: Counter[str] = Counter()
    good: list[dict[str, Any]] = []
    seen: set[str] = set()
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


def row_of(question: RenderedPrompt, row: Mapping[str, Any]) -> dict[str, Any]:
    """What supervised fine-tuning reads: the turns as the model was asked them, and its completion as the last."""
    asked = [{"role": m["role"], "content": m["content"]} for m in question.problem["messages"]]
    answer = {"role": "assistant", "content": row["completion"]}
    about = {"answer": row["answer"], "reward": row["reward"], "parts": row["parts"], "tokens": len(row["tokens"])}
    return {"messages": [*asked, answer], **about, "problem": row["problem"], "source": row["source"]}


def stats_of(
    config: RejectionConfig, rows: Sequence[Any], problems: Sequence[Mapping[str, Any]], dropped: Counter[str]
) -> dict[str, Any]:
    """The account: kept and dropped sum to samples. success: how many problems had 0, 1, … n right completions."""
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
