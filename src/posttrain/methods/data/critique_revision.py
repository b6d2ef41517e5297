"""Critique and revision: the model answers, criticises its answer by a principle, and rewrites it.

Sources: constitutional AI, arXiv 2212.08073 section 3.1 (a principle drawn for every revision, revisions of revisions);
self-refine, arXiv 2303.17651 (no principle, until the critique or a reward is satisfied). Everything written is stored
in chains/, and every round and every chain is counted: used, or not for one reason. See docs/constitutional.md.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from posttrain.config.judge import ServerConfig
from posttrain.config.problems import ProblemsConfig
from posttrain.config.rewards import RewardsConfig
from posttrain.config.settings import NAME, ModelConfig, SamplerConfig, SamplingConfig
from posttrain.core.errors import DataError
from posttrain.core.progress import Track
from posttrain.core.types import Message, Rollout, RolloutGroup
from posttrain.methods.data import revision_chain as chains
from posttrain.methods.data.data_stage import (
    DataStage,
    DataStageConfig,
    chunked,
    refuse_torchrun,
    save_rows,
)
from posttrain.methods.data.revision_chain import Chain, Round, Text
from posttrain.methods.data.revision_prompts import (
    FinishedRound,
    draw_principles,
    matching_examples,
    read_examples,
    revision_turns,
)
from posttrain.rewards.reward_log import LOG
from posttrain.rewards.stack import RewardStack
from posttrain.sampling.frozen_sampler import open_sampler

if TYPE_CHECKING:
    import numpy as np

    from posttrain.data.prompts import RenderedPrompt
    from posttrain.sampling.protocol import Sampler

Conversations = Sequence[tuple[Sequence[Message], int]]
"""Turns so far, and a seed, of each conversation."""
Writer = Callable[[Conversations, SamplingConfig, int, Callable[..., None]], list[Rollout]]
"""(conversations, sampling settings, most tokens, called as each ends) -> the next turn of each."""


class RefineConfig(DataStageConfig):
    """Critique and revision: a model criticises and rewrites its answers, which become rows to train on."""

    one_process = ("method",)
    method: Literal["refine"] = "refine"
    name: str = Field("refine", pattern=NAME, description="Name of the stage's folder in the run.")
    problems: ProblemsConfig = Field(
        description="Prompts; rendered as chat, since critiques are turns of a conversation."
    )
    model: ModelConfig | None = Field(None, description="A model that writes instead of the policy.")
    server: ServerConfig | None = Field(None, description="A model behind a server that writes instead.")
    principles: str | None = Field(
        None,
        description="File with principles, one a line (packaged:NAME: ships with posttrain); one is drawn for each round. None: none, as in self-refine.",
    )
    revisions: int = Field(2, ge=1, description="Rounds of critique and revision.")
    critique: str | None = Field(
        None,
        description="Request for a critique, with the field {principle}. None: the words in docs/constitutional.md.",
    )
    revision: str | None = Field(
        None,
        description="Request for the revision, with the field {principle}. None: the words in docs/constitutional.md.",
    )
    examples: str | None = Field(
        None,
        description="JSON Lines file with finished rounds (prompt, answer, principle, critique, revision): those of the round's principle, or all if it has none, come before each request. packaged:NAME: ships with posttrain. None: none.",
    )
    sampler: SamplerConfig = Field(SamplerConfig(), description="How answers, critiques and revisions are drawn.")
    critique_tokens: int = Field(128, ge=1, description="Longest critique in tokens.")
    satisfied: str | None = Field(
        None,
        min_length=1,
        description="Words of a critique (case does not count) that end its chain: its answer needs no change. None: every round is carried out.",
    )
    rewards: RewardsConfig | None = Field(
        None, description="Rewards of every answer of a chain, for stats.json and for stop_at. None: none."
    )
    stop_at: float | None = Field(
        None,
        allow_inf_nan=False,
        description="Reward from which an answer that ended needs no (further) round. None: every round is carried out.",
    )
    keep: Literal["last", "all"] = Field(
        "last", description="Rows of each chain: its last answer, or every revision that could be used."
    )
    seed: int = Field(0, ge=0, description="Draws the principles, together with the prompt.")
    prompts_at_once: int = Field(32, ge=1, description="Chains that are completed between two writes to the disk.")

    @model_validator(mode="after")
    def _fits(self) -> RefineConfig:
        if self.model is not None and self.server is not None:
            raise ValueError(
                "either a model writes (model.source) or one behind a server (server.model): leave one out"
            )
        if self.stop_at is not None and self.rewards is None:
            raise ValueError("stop_at is a reward, and there is none: give rewards")
        if self.critique_tokens < self.sampler.min_tokens:
            raise ValueError(
                f"critique_tokens ({self.critique_tokens}) is below sampler.min_tokens ({self.sampler.min_tokens}): no "
                "critique could end"
            )
        named = False
        for name in ("critique", "revision"):
            template = getattr(self, name)
            try:
                fields = {f for _, f, _, _ in string.Formatter().parse(template or "") if f is not None}
            except ValueError as error:
                raise ValueError(f"{name}: {error}; write {{{{ and }}}} for braces that are meant as such") from error
            allowed = {"principle"} if self.principles else set()
            if fields - allowed:
                have = "{principle}" if allowed else "none without principles"
                raise ValueError(f"{name} has the field {sorted(fields - allowed)[0]!r}, and there may be: {have}")
            named = named or bool(fields) or template is None
        if self.principles and not named:
            raise ValueError("principles are drawn, and neither critique nor revision names {principle}")
        return self


class CritiqueRevision(DataStage):
    """Write chains of critiques and revisions, chunk by chunk in chains/, and save their answers as rows."""

    Config = RefineConfig
    title = "Critique and revision"

    def prepare(self) -> list[tuple[str, Any]]:
        """Render the prompts; read principles and examples."""
        from posttrain.data.prompts import require_plain_context, uses_chat_template
        from posttrain.judge.principles import read_principles
        from posttrain.sampling.openai_sampler import OpenAISampler

        config = self.config
        self.principles = read_principles(config.principles) if config.principles is not None else []
        self.examples = read_examples(config.examples) if config.examples is not None else []
        if config.server is not None:
            OpenAISampler(config.server)  # a missing key or package is reported now
        if not uses_chat_template(config.problems, self.context.tokenizer):
            raise DataError(
                f"stage {config.name}: critiques are turns of a chat, and these prompts are plain text. Remove "
                "problems.template and data.chat=false; for a model without a chat template set model.chat_template"
            )
        data = self.load_prompts(config.problems)
        require_plain_context(self.prompts, f"stage {config.name}: critique and revision")
        return data

    def make(self, model: ModelConfig, folder: Path, seed: int) -> dict[str, Any]:
        config = self.config
        refuse_torchrun(config.method)
        chunks = chunked(len(self.prompts), config.prompts_at_once)
        finished = set(chains.finished_chunks(folder / "chains"))
        if missing := {c: part for c, part in chunks.items() if c not in finished}:
            self._write(model, folder / "chains", missing, seed)
        made = chains.read_chains(folder / "chains")
        rows = [row for chain in made for row in chains.rows_of_chain(chain, config.keep)]
        stats = chains.chain_stats(made, self.principles, len(rows), config.stop_at)
        if not rows:
            why = ", ".join(f"{n:,} {reason}" for reason, n in {**stats["dropped"], **stats["unusable"]}.items())
            raise DataError(
                f"stage {config.name} made no row of {len(made):,} chains ({why}). Raise sampler.max_tokens or "
                "critique_tokens, add examples, or use a larger model; posttrain inspect RUN shows what was written"
            )
        save_rows(folder, {"rows": rows}, stats)
        counts = {"chains": len(made), "rows kept": len(rows)}
        counts |= {"rounds": stats["rounds"], "revisions usable": stats["usable"]}
        for title, name in (("round", "unusable"), ("stopped", "stopped"), ("chain dropped", "dropped")):
            counts |= {f"{title}: {why}": n for why, n in stats[name].items()}
        return {"made": counts, "tokens": stats["tokens"]}

    def _write(self, model: ModelConfig, folder: Path, missing: Mapping[int, range], seed: int) -> None:
        import numpy as np

        config, total = self.config, len(self.prompts)
        with ExitStack() as stack:
            track = stack.enter_context(Track(config.name, total, total - sum(map(len, missing.values()))))
            rewards = None
            if config.rewards is not None:
                log = folder.parent / LOG
                rewards = stack.enter_context(RewardStack(config.rewards, self.context.functions, log=log))
            writer = open_writer(config, model)
            loop = RevisionLoop(config, writer, self.principles, self.examples, rewards, track)
            streams = np.random.SeedSequence([seed, 6]).generate_state(total * (1 + 2 * config.revisions), np.uint64)
            for c, part in missing.items():
                made = loop({i: self.prompts[i] for i in part}, streams.reshape(total, -1))
                chains.write_chains(folder, c, made)
                usable = [r.usable for chain in made for r in chain.rounds]
                track.update(track.done + len(made), revisions_usable=f"{sum(usable)}/{len(usable)}")


def open_writer(config: RefineConfig, model: ModelConfig) -> Writer:
    """Open the model or server that writes.

    The next turn of a conversation that leaves no room in the context has the finish `error`, like a refusal.
    """
    from posttrain.data.chat_template import render_chat
    from posttrain.data.tokenizing import tokenize
    from posttrain.sampling.openai_sampler import OpenAISampler
    from posttrain.sampling.protocol import Request

    sampler: Sampler
    if config.server is not None:
        sampler, tokenizer, context = OpenAISampler(config.server), None, 2**31
    else:
        local = open_sampler(config.model or model, config.sampler)
        sampler, tokenizer, context = local, local.tokenizer, local.context

    def write(
        conversations: Conversations, sampling: SamplingConfig, max_tokens: int, on_done: Callable[..., None]
    ) -> list[Rollout]:
        tokens: list[list[int]] = [[] for _ in conversations]
        if tokenizer is not None:
            texts = [render_chat(tokenizer, turns, generation=True) for turns, _ in conversations]
            tokens = tokenize(tokenizer, texts)
        fits = [i for i, t in enumerate(tokens) if len(t) < context]
        requests = [Request(tokens[i], 1, conversations[i][1], {"messages": conversations[i][0]}) for i in fits]
        groups = sampler.sample(requests, sampling.model_copy(update={"max_tokens": max_tokens}), on_done)
        out = [Rollout((), (), "error", chains.NO_ROOM) for _ in conversations]
        for i, group in zip(fits, groups, strict=True):
            out[i] = group.rollouts[0]
        return out

    return write


@dataclass
class RevisionLoop:
    """Write chains, all of a chunk side by side.

    Attributes:
        config: Settings of the stage.
        write: Writes the next turn of each conversation.
        principles: Principles to draw from; empty: none.
        examples: Finished rounds that are shown before each request.
        rewards: Score every answer. None: no rewards.
        track: Shows the progress.
    """

    config: RefineConfig
    write: Writer
    principles: Sequence[str]
    examples: Sequence[FinishedRound]
    rewards: RewardStack | None
    track: Track

    def __call__(self, prompts: Mapping[int, RenderedPrompt], streams: np.ndarray) -> list[Chain]:
        """Return the chains of these prompts, by number; a prompt's row of `streams` seeds its samples."""
        config = self.config
        conversations = [(p.problem["messages"], int(streams[i][0])) for i, p in prompts.items()]
        firsts = self._answers("answers", conversations, list(prompts.values()))
        out = []
        for (i, p), first in zip(prompts.items(), firsts, strict=True):
            turns: list[Message] = [dict(m) for m in p.problem["messages"]]  # type: ignore[misc]
            out.append(Chain(i, str(p.problem.get("source", "")), turns, first))
        drawn = {c.problem: draw_principles(len(self.principles), c.prompt, config.revisions, config.seed) for c in out}
        for n in range(config.revisions):
            open_chains = []
            for c in out:
                if not c.stopped and self._reached(c.answer):
                    c.stopped = chains.BY_REWARD
                if not c.stopped and not chains.no_answer(c):
                    number = drawn[c.problem][n] if self.principles else None
                    c.rounds.append(Round(number, "" if number is None else self.principles[number]))
                    open_chains.append(c)
            self._critiques(n, open_chains, streams)
            self._revisions(n, [c for c in open_chains if not c.rounds[-1].why and not c.stopped], prompts, streams)
        return out

    def _critiques(self, n: int, open_chains: Sequence[Chain], streams: np.ndarray) -> None:
        conversations = [(self._turns(c), int(streams[c.problem][1 + 2 * n])) for c in open_chains]
        written = self._next_turns(f"critiques {n + 1}", conversations, self.config.critique_tokens)
        for c, rollout in zip(open_chains, written, strict=True):
            text = _text(rollout)
            why = chains.fault(text)
            c.rounds[-1].critique, c.rounds[-1].why = text, f"critique: {why}" if why else ""
            verdict = self.config.satisfied
            # A truncated first answer is always rewritten: it has no end.
            if not why and verdict and verdict.lower() in text.text.lower() and not chains.fault(c.answer):
                c.stopped = chains.BY_VERDICT

    def _revisions(
        self, n: int, open_chains: Sequence[Chain], prompts: Mapping[int, RenderedPrompt], streams: np.ndarray
    ) -> None:
        conversations = [(self._turns(c), int(streams[c.problem][2 + 2 * n])) for c in open_chains]
        texts = self._answers(f"revisions {n + 1}", conversations, [prompts[c.problem] for c in open_chains])
        for c, text in zip(open_chains, texts, strict=True):
            last = c.rounds[-1]
            assert last.critique is not None
            shown = [("that of an example", e.revision) for e in matching_examples(self.examples, last.says or None)]
            why = chains.fault(text, [("the answer", c.answer.text), ("the critique", last.critique.text), *shown])
            last.why, last.revision = f"revision: {why}" if why else "", text

    def _turns(self, chain: Chain) -> list[Message]:
        """Return the conversation whose next turn is the critique of the last round, or its revision."""
        last = chain.rounds[-1]
        critique = last.critique.text if last.critique is not None else None
        return revision_turns(self.config, self.examples, chain.prompt, chain.answer.text, last.says or None, critique)

    def _answers(self, title: str, conversations: Conversations, prompts: Sequence[RenderedPrompt]) -> list[Text]:
        """Return first answers or revisions, with their rewards if the stage has any."""
        written = self._next_turns(title, conversations, self.config.sampler.max_tokens)
        if self.rewards is None or not written:
            return [_text(r) for r in written]
        stripped = [replace(r, text=r.text.strip()) for r in written]  # rewards see the text that the row will have
        groups = [RolloutGroup(p.tokens, p.problem, [r]) for p, r in zip(prompts, stripped, strict=True)]
        out = []
        for group in self.rewards(groups).groups:
            r = group.rollouts[0]
            lost = r.failures if r.finish != "error" else {}  # a refused answer is no failure of a reward
            reward = r.reward if r.rewarded else None
            out.append(
                replace(_text(r), reward=reward, parts=dict(r.rewards), failures=dict(lost), notes=dict(r.notes))
            )
        return out

    def _next_turns(self, title: str, conversations: Conversations, max_tokens: int) -> list[Rollout]:
        if not conversations:
            return []
        count = self.track.counter(f"{title},", len(conversations))
        return self.write(conversations, self.config.sampler, max_tokens, count)

    def _reached(self, answer: Text) -> bool:
        least = self.config.stop_at
        return least is not None and answer.reward is not None and answer.reward >= least and not chains.fault(answer)


def _text(rollout: Rollout) -> Text:
    return Text(rollout.text.strip(), rollout.finish, len(rollout.tokens))
