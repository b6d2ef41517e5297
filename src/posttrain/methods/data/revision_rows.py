"""Critique and revision: the model answers, criticises its answer by a principle, and rewrites it.

Sources: constitutional AI, arXiv 2212.08073 section 3.1 (a principle drawn for every revision, revisions of revisions);
self-refine, arXiv 2303.17651 (no principle, until the critique or a reward is satisfied). Everything written is kept in
chains/, and every round and every chain is in the account: used, or not for one reason. See docs/constitutional.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.config import ModelConfig, SamplingConfig
from posttrain.core.errors import DataError
from posttrain.core.progress import Track
from posttrain.core.types import Message, Rollout, RolloutGroup
from posttrain.data import chat_template as chat
from posttrain.data.prompts import RenderedPrompt
from posttrain.methods.data import revision_chain as chains
from posttrain.methods.data.critique_revision import RefineConfig
from posttrain.methods.data.revision_chain import Chain, Round, Text
from posttrain.methods.data.revision_prompts import Example, draw, fitting, turns
from posttrain.methods.data.row_making import alone, chunked, leave_data, open_sampler
from posttrain.methods.rl.collect_rollouts import with_failed
from posttrain.rewards.stack import RewardStack
from posttrain.sampling.openai_sampler import OpenAISampler
from posttrain.sampling.protocol import Request, Sampler
from posttrain.trainer.stage import Functions


def run_refine(
    config: RefineConfig,
    model: ModelConfig,
    questions: Sequence[RenderedPrompt],
    folder: Path,
    *,
    texts: tuple[Sequence[str], Sequence[Example]],
    seed: int = 0,
    functions: Functions | None = None,
) -> dict[str, Any]:
    """Carry every chain through, chunk by chunk: `folder`/data has rows.jsonl and stats.json, chains/ everything.

    Goes on behind the last chunk that is there. Returns the manifest's account. Raises DataError where no chain gives a
    row, RewardError where rewards can't be had or fail too often, ServerError, ModelError under torchrun.
    """
    alone("refine")
    began = time.perf_counter()
    principles, examples = texts
    lots = chunked(len(questions), config.prompts_at_once)
    there = set(chains.chunks_there(folder / "chains"))
    left = [c for c in range(len(lots)) if c + 1 not in there]
    if left:
        with (
            ExitStack() as stack,
            Track(config.name, len(questions), sum(map(len, lots)) - sum(len(lots[c]) for c in left)) as track,
        ):
            rewards = stack.enter_context(RewardStack(config.rewards, functions)) if config.rewards else None
            loop = Loop(config, _writer(config, model), principles, examples, rewards, track.phase)
            streams = np.random.SeedSequence([seed, 6]).generate_state(
                len(questions) * (1 + 2 * config.revisions), np.uint64
            )
            for c in left:
                made = loop({i: questions[i] for i in lots[c]}, streams.reshape(len(questions), -1))
                chains.write_chains(folder / "chains", c + 1, made)
                usable = [r.usable for chain in made for r in chain.rounds]
                track.update(track.done + len(made), revisions_usable=f"{sum(usable)}/{len(usable)}")
    found = chains.read_chains(folder / "chains")
    rows = [row for chain in found for row in chains.rows_of(chain, config.keep)]
    stats = chains.stats_of(found, principles, len(rows), config.stop_at)
    if not rows:
        why = ", ".join(f"{n:,} {reason}" for reason, n in {**stats["dropped"], **stats["unusable"]}.items())
        raise DataError(
            f"stage {config.name} made no row of {len(found):,} chains ({why}). Raise sampler.max_tokens or "
            "critique_tokens, give examples, or take a larger model; posttrain inspect RUN shows what was written"
        )
    leave_data(folder, {"rows": rows}, stats)
    counted = {
        "chains": len(found),
        "rows kept": len(rows),
        "rounds": stats["rounds"],
        "revisions usable": stats["usable"],
    }
    counted |= {f"round: {why}": n for why, n in stats["unusable"].items()}
    counted |= {f"stopped: {why}": n for why, n in stats["stopped"].items()}
    counted |= {f"chain dropped: {why}": n for why, n in stats["dropped"].items()}
    return {"made": counted, "tokens": stats["tokens"], "seconds": round(time.perf_counter() - began, 2)}


Writer = Callable[[Sequence[tuple[Sequence[Message], int]], SamplingConfig, int, Callable[..., None]], list[Rollout]]
"""(conversations with a seed each, how to draw, longest text, called as each ends) → what comes next in each."""


def _writer(config: RefineConfig, model: ModelConfig) -> Writer:
    """Who writes. A conversation that leaves no room in a context comes back with finish `error`, like a refusal."""
    sampler: Sampler
    if config.server is not None:
        sampler, tokenizer, context = OpenAISampler(config.server), None, 2**31
    else:
        local = open_sampler(config.model or model, config.sampler)
        sampler, tokenizer, context = local, local.tokenizer, local.context

    def write(
        asked: Sequence[tuple[Sequence[Message], int]],
        sampling: SamplingConfig,
        longest: int,
        on_done: Callable[..., None],
    ) -> list[Rollout]:
        tokens: list[list[int]] = [[] for _ in asked]
        if tokenizer is not None:
            tokens = chat.tokenize(tokenizer, [chat.render_chat(tokenizer, m, generation=True) for m, _ in asked])
        fits = [i for i, t in enumerate(tokens) if len(t) < context]
        requests = [Request(tokens[i], 1, asked[i][1], {"messages": asked[i][0]}) for i in fits]
        groups = sampler.sample(requests, sampling.model_copy(update={"max_tokens": longest}), on_done)
        out = [Rollout((), (), "error", chains.NO_ROOM) for _ in asked]
        for i, group in zip(fits, groups, strict=True):
            out[i] = group.rollouts[0]
        return out

    return write


@dataclass
class Loop:
    """What carries chains through. shown: called with what is under way."""

    config: RefineConfig
    write: Writer
    principles: Sequence[str]
    examples: Sequence[Example]
    rewards: RewardStack | None
    shown: Callable[[str], None]

    def __call__(self, questions: Mapping[int, RenderedPrompt], streams: np.ndarray) -> list[Chain]:
        """The chains of these questions, by number; a question's row of streams seeds what is sampled for it."""
        config = self.config
        asked = [(q.problem["messages"], int(streams[i][0])) for i, q in questions.items()]
        firsts = self._answers("answers", asked, list(questions.values()))
        out = []
        for (i, q), first in zip(questions.items(), firsts, strict=True):
            messages: list[Message] = [{"role": m["role"], "content": m["content"]} for m in q.problem["messages"]]
            out.append(Chain(i, str(q.problem.get("source", "")), messages, first))
        drawn = {c.problem: draw(len(self.principles), c.prompt, config.revisions, config.seed) for c in out}
        for n in range(config.revisions):
            going = []
            for c in out:
                if not c.stopped and self._reached(c.answer):
                    c.stopped = chains.BY_REWARD
                if not c.stopped and not chains.without_answer(c):
                    number = drawn[c.problem][n] if self.principles else None
                    c.rounds.append(Round(number, "" if number is None else self.principles[number]))
                    going.append(c)
            self._critiques(n, going, streams)
            self._revisions(n, [c for c in going if not c.rounds[-1].why and not c.stopped], questions, streams)
        return out

    def _critiques(self, n: int, going: Sequence[Chain], streams: np.ndarray) -> None:
        asked = [
            (
                turns(self.config, self.examples, c.prompt, c.answer.text, c.rounds[-1].says or None),
                int(streams[c.problem][1 + 2 * n]),
            )
            for c in going
        ]
        written = self._say(f"critiques {n + 1}", asked, self.config.critique_tokens)
        for c, rollout in zip(going, written, strict=True):
            text = _text(rollout)
            why = chains.fault(text)
            c.rounds[-1].critique, c.rounds[-1].why = text, f"critique: {why}" if why else ""
            verdict = self.config.satisfied
            # A first answer that was cut has no end to be content with.
            if not why and verdict and verdict.lower() in text.text.lower() and not chains.fault(c.answer):
                c.stopped = chains.BY_VERDICT

    def _revisions(
        self, n: int, going: Sequence[Chain], questions: Mapping[int, RenderedPrompt], streams: np.ndarray
    ) -> None:
        asked = []
        for c in going:
            done = c.rounds[-1]
            assert done.critique is not None
            conversation = turns(
                self.config, self.examples, c.prompt, c.answer.text, done.says or None, done.critique.text
            )
            asked.append((conversation, int(streams[c.problem][2 + 2 * n])))
        for c, text in zip(
            going, self._answers(f"revisions {n + 1}", asked, [questions[c.problem] for c in going]), strict=True
        ):
            done = c.rounds[-1]
            assert done.critique is not None
            shown = [("that of an example", e.revision) for e in fitting(self.examples, done.says or None)]
            why = chains.fault(text, [("the answer", c.answer.text), ("the critique", done.critique.text), *shown])
            done.why = f"revision: {why}" if why else ""
            done.revision = text

    def _answers(
        self, what: str, asked: Sequence[tuple[Sequence[Message], int]], questions: Sequence[RenderedPrompt]
    ) -> list[Text]:
        """First answers or revisions, with their rewards where there are any."""
        written = self._say(what, asked, self.config.sampler.max_tokens)
        if self.rewards is None or not written:
            return [_text(r) for r in written]
        stripped = [replace(r, text=r.text.strip()) for r in written]  # what is judged is what the row will say
        groups = [RolloutGroup(q.tokens, q.problem, [r]) for q, r in zip(questions, stripped, strict=True)]
        scored, _, failures = with_failed(self.rewards(groups))
        out = []
        for group, failed in zip(scored, failures, strict=True):
            r = group.rollouts[0]
            lost = failed[0] if r.finish != "error" else {}  # what was not written has not failed at a reward
            out.append(_text(r, None if failed[0] else r.reward, dict(r.rewards), dict(lost)))
        return out

    def _say(self, what: str, asked: Sequence[tuple[Sequence[Message], int]], longest: int) -> list[Rollout]:
        done = 0

        def count(*_: Any) -> None:
            nonlocal done
            done += 1
            self.shown(f"{what}, {done}/{len(asked)}")

        return self.write(asked, self.config.sampler, longest, count) if asked else []

    def _reached(self, answer: Text) -> bool:
        at = self.config.stop_at
        return at is not None and answer.reward is not None and answer.reward >= at and not chains.fault(answer)


def _text(
    r: Rollout,
    reward: float | None = None,
    parts: dict[str, float] | None = None,
    failures: dict[str, str] | None = None,
) -> Text:
    return Text(r.text.strip(), r.finish, len(r.tokens), reward, parts or {}, failures or {})
