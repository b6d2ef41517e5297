"""Labels for the steps of chains by Monte Carlo: the policy continues from each step's end, and the end is judged.

Source: Math-Shepherd, arXiv 2312.08935, section 3.2. Labelled chains are stored, a line a problem, so that an
interrupted run resumes after the last whole batch of problems; a batch is a function of (seed, its number) and the policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from posttrain.core.errors import DataError
from posttrain.core.files import Lines, read_lines
from posttrain.core.progress import Track
from posttrain.core.types import Rollout, RolloutGroup
from posttrain.data.process_rows import PreparedChains, StepChain, chain_samples, split_steps
from posttrain.sampling.protocol import Request

if TYPE_CHECKING:
    from posttrain.data.prompts import RenderedPrompt
    from posttrain.methods.reward_model.process import RolloutLabelsConfig
    from posttrain.rewards.stack import RewardStack
    from posttrain.sampling.engine import LocalSampler

LabelledRow = dict[str, Any]


class Labeller:
    """Sample chains, split them into steps, continue from each, judge the ends, and write the labels."""

    def __init__(
        self,
        config: RolloutLabelsConfig,
        separator: str,
        sampler: LocalSampler,
        rewards: RewardStack,
        seed: int,
    ) -> None:
        self.config, self.separator = config, separator
        self.sampler, self.tokenizer, self.rewards, self.seed = sampler, sampler.tokenizer, rewards, seed

    def label(self, prompts: Sequence[RenderedPrompt], path: Path, title: str) -> None:
        """Add a row to the file for each prompt that has none yet.

        Args:
            prompts: The prompts.
            path: The file.
            title: Title of the progress line.
        """
        size, total = self.config.problems_per_batch, len(prompts)
        done = len(read_lines(path)) if path.exists() else 0
        done = total if done >= total else done - done % size
        lines = Lines(path, done)
        with Track(title, total, done) as track:
            for start in range(done, total, size):
                rows = self.batch(prompts[start : start + size], start, track)
                for row in rows:
                    lines.add(row)
                lines.sync()
                steps = [t for r in rows for c in r["chains"] for t in c["targets"] if t is not None]
                track.update(start + len(rows), right_steps=sum(steps) / max(1, len(steps)))
        lines.close()

    def batch(self, prompts: Sequence[RenderedPrompt], start: int, track: Track) -> list[LabelledRow]:
        """Label the chains of some prompts.

        Args:
            prompts: The prompts.
            start: Number of the first, for its random stream.
            track: Progress.
        """
        config = self.config
        streams = np.random.SeedSequence([self.seed, 3, start]).generate_state(2 * len(prompts), np.uint64)
        track.phase("sampling chains")
        requests_for_chains = [
            Request(q.tokens, config.chains, int(s), q.problem) for q, s in zip(prompts, streams[::2], strict=True)
        ]
        groups = self.sampler.sample(requests_for_chains, config.sampler)
        ends = self._judged(groups)
        requests: list[Request] = []
        where: list[tuple[int, int, int]] = []  # prompt, chain, step
        spans: list[list[list[tuple[int, int]]]] = []
        for g, group in enumerate(groups):
            spans.append([split_steps(r.text, self.separator) for r in group.rollouts])
            rng = np.random.default_rng(int(streams[2 * g + 1]))
            for c, rollout in enumerate(group.rollouts):
                # The last step ends where the chain does, whose outcome is known.
                for k, (_, end) in enumerate(spans[g][c][:-1]):
                    cut = self._tokens_of(rollout, end)
                    left = config.sampler.max_tokens - cut
                    stream = int(rng.integers(2**63))
                    if left < 1:
                        continue
                    prompt = [*group.prompt, *rollout.tokens[:cut]]
                    requests.append(Request(prompt, config.completions, stream, group.example, left))
                    where.append((g, c, k))
        track.phase(f"continuing from {len(requests):,} steps, {config.completions} times each")
        shares = self._shares(requests, where, groups)
        return [self._row(q, start + g, groups[g], spans[g], ends[g], shares, g) for g, q in enumerate(prompts)]

    def _tokens_of(self, rollout: Rollout, end: int) -> int:
        """Return how many of its tokens hold the first `end` characters: a step ends with a token."""
        low, high = 1, len(rollout.tokens)
        while low < high:  # the text of more tokens is never shorter
            middle = (low + high) // 2
            if len(self._text(rollout.tokens[:middle])) >= end:
                high = middle
            else:
                low = middle + 1
        return low

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def _shares(
        self, requests: list[Request], where: list[tuple[int, int, int]], groups: Sequence[RolloutGroup]
    ) -> dict[tuple[int, int, int], list[bool | None]]:
        """Return by step if each completion from there ends right (None: it could not be judged)."""
        whole = []
        for (g, c, _), continued in zip(where, self.sampler.sample(requests, self.config.sampler), strict=True):
            group = groups[g]
            cut = len(continued.prompt) - len(group.prompt)
            before = list(group.rollouts[c].tokens[:cut])
            joined = []
            for r in continued.rollouts:
                tokens = [*before, *r.tokens]
                kept = tokens[:-1] if r.finish in ("end", "stop") else tokens
                text = self._text(kept) if r.finish != "stop" else self._text(before) + r.text
                joined.append(Rollout(tuple(tokens), tuple([0.0] * len(before) + list(r.logprobs)), r.finish, text))
            whole.append(RolloutGroup(group.prompt, group.example, joined))
        return dict(zip(where, self._judged(whole), strict=True))

    def _judged(self, groups: Sequence[RolloutGroup]) -> list[list[bool | None]]:
        """Return if each rollout ends right; None if a reward failed on it."""
        right = self.config.right
        return [[r.reward >= right if r.rewarded else None for r in g.rollouts] for g in self.rewards(groups).groups]

    def _row(
        self,
        prompt: RenderedPrompt,
        number: int,
        group: RolloutGroup,
        spans: Sequence[Sequence[tuple[int, int]]],
        ends: Sequence[bool | None],
        shares: dict[tuple[int, int, int], list[bool | None]],
        g: int,
    ) -> LabelledRow:
        chains = []
        for c, rollout in enumerate(group.rollouts):
            outcomes = [shares.get((g, c, k), []) for k in range(len(spans[c]) - 1)] + [[ends[c]]]
            targets = [self._target(o) for o in outcomes[: len(spans[c])]]
            chains.append(
                {
                    "steps": [rollout.text[a:b] for a, b in spans[c]],
                    "targets": targets,
                    "right": [sum(bool(x) for x in o) for o in outcomes[: len(spans[c])]],
                    "of": [sum(x is not None for x in o) for o in outcomes[: len(spans[c])]],
                    "outcome": ends[c],
                    "finish": rollout.finish,
                }
            )
        answer = prompt.problem.get("answer")
        return {
            "problem": number,
            "source": prompt.problem.get("source", ""),
            "prompt": prompt.problem.get("prompt", prompt.text),
            "answer": answer,
            "chains": chains,
        }

    def _target(self, outcomes: Sequence[bool | None]) -> float | None:
        known = [o for o in outcomes if o is not None]
        if not known:
            return None
        return float(any(known)) if self.config.targets == "hard" else sum(known) / len(known)


def labelled_chains(rows: Sequence[LabelledRow], prompts: Sequence[RenderedPrompt], tokenizer: Any) -> PreparedChains:
    """Tokenize labelled rows. Chains without a step, or without any label, are counted in the stats.

    Args:
        rows: Labelled rows.
        prompts: Their prompts.
        tokenizer: The model's tokenizer.

    Raises:
        DataError: No chain is left.
    """
    chains, without, unlabelled = list[StepChain](), 0, 0
    for row, q in zip(rows, prompts, strict=True):
        for i, c in enumerate(row["chains"]):
            unlabelled += sum(t is None for t in c["targets"])
            if all(t is None for t in c["targets"]):
                without += 1
                continue
            chains.append(StepChain(q.tokens, c["steps"], c["targets"], row["problem"], f"{row['source']}#{i}"))
    if not chains:
        raise DataError(
            f"none of {without} sampled chains has a step that could be labelled: look at what the policy writes "
            "(labels/*.jsonl), at sampler.max_tokens and at the rewards"
        )
    targets = [t for c in chains for t in c.targets if t is not None]
    outcomes = [c["outcome"] for r in rows for c in r["chains"] if c["outcome"] is not None]
    stats = {
        "chains": len(chains), "steps": len(targets), "unlabelled_steps": unlabelled, "without_steps": without,
        "right_steps": sum(t >= 0.5 for t in targets), "mean_target": float(np.mean(targets)),
        "accuracy_of_chains": float(np.mean(outcomes)) if outcomes else None,
        "completions_judged": sum(n for r in rows for c in r["chains"] for n in c["of"]),
    }  # fmt: skip
    return PreparedChains(chain_samples(chains, tokenizer), stats)
