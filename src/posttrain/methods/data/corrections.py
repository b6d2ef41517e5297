"""Corrections: the model's own revisions become rows for supervised fine-tuning, right after wrong and right kept right.

Sources: self-correction learned from own revisions, arXiv 2211.00053; STaR-like rounds, arXiv 2203.14465: list this stage
and SFT twice. With wrong answers that became right alone a model learns to change every answer, with right ones alone to
change none (arXiv 2409.12917 section 4): both are kept, balanced. Every chain is stored in rollouts/ and counted. See
docs/self-refine.md.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from posttrain.config.environment import EnvironmentConfig
from posttrain.config.problems import ProblemsConfig
from posttrain.config.rewards import RewardsConfig
from posttrain.config.settings import NAME, Config, ModelConfig, SamplerConfig
from posttrain.core.errors import DataError
from posttrain.core.progress import Track
from posttrain.core.types import Rollout, RolloutGroup, turn_name
from posttrain.methods.data import correction_rows as rows_of
from posttrain.methods.data.correction_rows import AnswerChain, CorrectionCounts, KeptChain
from posttrain.methods.data.data_stage import (
    DataStage,
    DataStageConfig,
    chunked,
    refuse_torchrun,
    save_rows,
)
from posttrain.rewards.refine_rewards import ANSWER, answer_rollout
from posttrain.rewards.reward_log import LOG
from posttrain.rewards.stack import RewardStack
from posttrain.sampling.frozen_sampler import open_sampler
from posttrain.sampling.model_feedback import ModelFeedback
from posttrain.sampling.refine_prompts import NO_CHANGE, said
from posttrain.sampling.rollout_store import groups_of, read_rollouts, rollout_steps, rollouts_path, write_rollouts

if TYPE_CHECKING:
    from posttrain.sampling.protocol import Sampler
    from posttrain.sampling.refine_turns import RefineTurn

CHAINS_TOGETHER = 256
"""Chains of one chunk, about: sampled together, stored in one file, sampled again after a crash."""


class CriticRowsConfig(Config):
    """Words in which a critic is asked about an answer, the same as of the source of feedback `model`."""

    template: str | None = Field(
        None,
        description="What it is asked, with {prompt}, {answer} and {verdict}. None: the words in docs/self-refine.md.",
    )
    verdict: str | None = Field(
        NO_CHANGE, min_length=1, description="Words that say that nothing is wrong. None: there are none."
    )

    def source(self) -> ModelFeedback.Config:
        """Return the settings of the source of feedback that the critic becomes."""
        return ModelFeedback.Config(model=ModelConfig(source="critic"), template=self.template, verdict=self.verdict)

    @model_validator(mode="after")
    def _fits(self) -> CriticRowsConfig:
        self.source()
        return self


class CorrectionsConfig(DataStageConfig):
    """Corrections: the model's own revisions are kept as rows, right after wrong and right kept right."""

    one_process = ("method",)
    method: Literal["corrections"] = "corrections"
    name: str = Field("corrections", pattern=NAME, description="Name of the stage's folder in the run.")
    problems: ProblemsConfig
    environment: EnvironmentConfig = Field(description="The self-refine loop: kind refine, and its settings.")
    rewards: RewardsConfig = Field(description="Rewards of a single answer; their weighted sum says if it is right.")
    sampler: SamplerConfig = SamplerConfig()
    n: int = Field(8, ge=1, description="Chains of each problem.")
    threshold: float = Field(1.0, description="Reward from which an answer is right.")
    keep: int | None = Field(2, ge=1, description="Most rows of a problem of each kind. None: all.")
    kept_right: float | None = Field(
        1.0,
        ge=0,
        description="Most rows of right answers that stay right, for each row of a corrected one. None: all that there are.",
    )
    train_on: list[Literal["answer", "feedback", "revision"]] = Field(
        ["feedback", "revision"],
        min_length=1,
        description="Turns that carry loss: the revision, the model's own feedback that led to it, and the first answer, which carries it only if it is right. SFT needs data.loss_on: assistant.",
    )

    critic: CriticRowsConfig | None = Field(
        None,
        description="Also write rows for a critic: data/critic.jsonl, prompts for RL with first answers of the chains; also data/critiques.jsonl for SFT, own feedback of the chains that are kept, or what the sources in `feedback` say. None: no such rows.",
    )

    @model_validator(mode="after")
    def _fits(self) -> CorrectionsConfig:
        if self.environment.kind != "refine":
            raise ValueError(
                f"environment is {self.environment.kind}: revisions come from environment: {{kind: refine}}"
            )
        if self.sampler.temperature == 0 and self.n > 1:
            raise ValueError("sampler.temperature is 0: all n chains would be the same. Raise it, or set n to 1")
        whole = [
            t.title
            for t in self.rewards.terms
            if t.compares_completions or t.scores_steps or t.needs_environment or t.form == "rollouts"
        ]
        if whole:
            raise ValueError(
                f"reward {whole[0]} can't score an answer apart from its chain: expected rewards of answers"
            )
        return self


class Corrections(DataStage):
    """Sample chains, chunk by chunk in rollouts/, score every answer, and save balanced rows."""

    Config = CorrectionsConfig
    title = "Corrections"

    def prepare(self) -> list[tuple[str, Any]]:
        from posttrain.data.prompts import require_plain_context
        from posttrain.sampling.environments import environment
        from posttrain.sampling.multi_turn import check

        if self.context.functions is not None:  # what can't be made is known before an earlier stage trains
            made: Any = environment(self.config.environment, self.context.functions)
            made.close()
            RewardStack(self.config.rewards, self.context.functions).close()
        check(self.config.environment, self.context.tokenizer)
        loaded = self.load_prompts(self.config.problems)
        if self.config.critic is not None:
            require_plain_context(self.prompts, f"stage {self.config.name}: what a critic is asked")
        return loaded

    def make(self, model: ModelConfig, folder: Path, seed: int) -> dict[str, Any]:
        config = self.config
        refuse_torchrun(config.method)
        chunks = chunked(len(self.prompts), max(1, CHAINS_TOGETHER // config.n))
        finished = set(rollout_steps(folder / "rollouts"))
        if missing := {c: part for c, part in chunks.items() if c not in finished}:
            self._sample(model, folder / "rollouts", missing, seed)
        chains = [chain for c in chunks for chain in self._read(rollouts_path(folder / "rollouts", c))]
        kept, counts = self._select(chains, seed)
        rows = [row for _, _, row in kept]
        stats = self._statistics(chains, rows, counts)
        if not rows:
            why = ", ".join(f"{n:,} {reason}" for reason, n in counts.dropped.most_common())
            raise DataError(
                f"stage {config.name} kept none of {len(chains):,} chains ({why}). Lower threshold ({config.threshold:g}), "
                f"raise n ({config.n}) or sampler.max_tokens, or start from a model that gets some problems right and "
                "revises some answers; posttrain inspect RUN shows what was sampled"
            )
        tables = {"rows": rows}
        made = {"chains": len(chains), "rows kept": len(rows), **{f"rows: {k}": n for k, n in counts.kept.items()}}
        if config.critic is not None:
            problems, tables["critic"] = self._critic_rows(chains)
            made["rows for a critic"] = stats["critic"] = len(tables["critic"])
            if config.environment.own or config.environment.feedback:
                critiques = rows_of.critique_rows(kept, self.prompts, config.critic.source())
                tables["critiques"] = critiques if config.environment.own else self._said(problems, tables["critic"])
                made["critiques"] = stats["critiques"] = len(tables["critiques"])
        save_rows(folder, tables, stats)
        made |= {f"dropped: {why}": n for why, n in stats["dropped"].items()}
        return {"made": made, "tokens": stats["tokens"]}

    def _sample(self, model: ModelConfig, folder: Path, missing: Mapping[int, range], seed: int) -> None:
        """Sample and score the missing chunks. A problem's chains depend on (seed, its number) alone."""
        import numpy as np

        from posttrain.sampling.environments import environment
        from posttrain.sampling.multi_turn import TurnSampler, in_turns
        from posttrain.sampling.protocol import Request

        config, prompts = self.config, self.prompts
        local = open_sampler(model, config.sampler)
        answering: Any = environment(config.environment, self.context.functions)
        sampler: Sampler = TurnSampler(local, answering, config.environment, local.tokenizer, local.context)
        streams = np.random.SeedSequence([seed, 4]).generate_state(len(prompts), np.uint64)
        total, corrected = len(prompts) * config.n, 0
        before = done = total - sum(map(len, missing.values())) * config.n
        with (
            closing(answering),
            RewardStack(config.rewards, self.context.functions, log=folder.parent / LOG) as rewards,
            Track(config.name, total, before) as track,
        ):
            for c, part in missing.items():
                count = track.counter("sampling,", total, 16, done)
                requests = [Request(prompts[i].tokens, config.n, int(streams[i]), prompts[i].problem) for i in part]
                groups = self._score(sampler.sample(requests, config.sampler, count), rewards, local.tokenizer)
                turns = partial(in_turns, tokenizer=local.tokenizer)
                write_rollouts(folder, c, groups, None, [prompts[i].text for i in part], list(part), turns)
                done += len(part) * config.n
                chains = [_chain(r, 0, config.environment, local.tokenizer) for g in groups for r in g.rollouts]
                corrected += sum(rows_of.outcome_of(chain, config.threshold)[0] == "corrected" for chain in chains)
                track.update(done, corrected=f"{corrected / (done - before):.0%}")

    def _score(self, groups: Sequence[RolloutGroup], rewards: RewardStack, tokenizer: Any) -> list[RolloutGroup]:
        """Return the chains with the reward of every answer in `steps`; that of the last one is the chain's."""
        from posttrain.sampling.refine_turns import refine_turns

        environment: Any = self.config.environment
        turns = [[refine_turns(r, tokenizer, environment) for r in g.rollouts] for g in groups]
        answers = [
            RolloutGroup(group.prompt, group.example, [answer_rollout(group.rollouts[i], turn)])
            for group, of_group in zip(groups, turns, strict=True)
            for i, of_chain in enumerate(of_group)
            for turn in of_chain
            if turn.kind == "answer"
        ]
        scored = iter(rewards(answers).groups)
        out = []
        for group, of_group in zip(groups, turns, strict=True):
            rollouts = []
            for rollout, of_chain in zip(group.rollouts, of_group, strict=True):
                of_answers = [(t, next(scored).rollouts[0]) for t in of_chain if t.kind == "answer"]
                rollouts.append(_scored(rollout, of_answers))
            out.append(replace(group, rollouts=rollouts))
        return out

    def _read(self, path: Path) -> list[AnswerChain]:
        """Return the chains of a file."""
        rows = read_rollouts(path)
        numbers = {row["group"]: row["problem"] for row in rows}
        problems = [numbers[g] for g in sorted(numbers)]
        tokenizer, environment = self.context.tokenizer, self.config.environment
        return [
            _chain(rollout, problem, environment, tokenizer)
            for problem, group in zip(problems, groups_of(rows), strict=True)
            for rollout in group.rollouts
        ]

    def _select(self, chains: Sequence[AnswerChain], seed: int) -> tuple[list[KeptChain], CorrectionCounts]:
        """Return the chains that are kept, and the counts: every chain gives a row or is dropped for one reason."""
        import numpy as np

        config, counts = self.config, CorrectionCounts()
        kept: list[KeptChain] = []
        seen, per_problem = set[tuple[Any, ...]](), Counter[tuple[int, str]]()
        for chain in chains:
            prompt = self.prompts[chain.problem]
            outcome, last = rows_of.outcome_of(chain, config.threshold)
            why = "" if outcome in rows_of.OUTCOMES else outcome
            row: dict[str, Any] = {}
            if not why:
                row = rows_of.correction_row(prompt, chain, outcome, last, config.environment, config.train_on)
                key, place = (chain.problem, *chain.key(last)), (chain.problem, outcome)
                if not all(turn.text for turn in chain.turns[: last + 1]):
                    why = rows_of.EMPTY_TURN
                elif not rows_of.carries_loss(row):
                    why = rows_of.NO_LOSS
                elif key in seen:
                    why = rows_of.REPEATED
                elif config.keep is not None and per_problem[place] >= config.keep:
                    why = rows_of.BEYOND_KEEP
                else:
                    seen.add(key)
                    per_problem[place] += 1
            if why:
                counts.drop(why, chain, prompt.source)
            else:
                kept.append((chain, outcome, row))
        right = [i for i, (_, outcome, _) in enumerate(kept) if outcome == "kept right"]
        most = len(right)
        if config.kept_right is not None:
            most = math.ceil(config.kept_right * (len(kept) - len(right)))
        order = np.random.default_rng([seed, 5]).permutation(len(right))  # not those of the first problems alone
        beyond = {right[k] for k in order[most:]}
        for i in sorted(beyond):
            counts.drop(rows_of.BEYOND_BALANCE, kept[i][0], self.prompts[kept[i][0].problem].source)
        counts.kept.update(outcome for i, (_, outcome, _) in enumerate(kept) if i not in beyond)
        return [chosen for i, chosen in enumerate(kept) if i not in beyond], counts

    def _critic_rows(self, chains: Sequence[AnswerChain]) -> tuple[list[int], list[dict[str, Any]]]:
        """Return rows for a critic, and the numbers of their problems.

        They have different first answers, at most `keep` right and `keep` wrong ones of a problem.
        """
        config = self.config
        assert config.critic is not None
        source, problems, rows = config.critic.source(), list[int](), list[dict[str, Any]]()
        seen, counts = set[tuple[int, str]](), Counter[tuple[int, bool]]()
        for chain in chains:
            if not chain.answers or not chain.rewards:
                continue
            written = chain.turns[0].text
            key, right = (chain.problem, " ".join(written.split())), chain.rewards[0] >= config.threshold
            full = config.keep is not None and counts[chain.problem, right] >= config.keep
            if not written or key in seen or full:
                continue
            seen.add(key)
            counts[chain.problem, right] += 1
            prompt = self.prompts[chain.problem]
            asked = source.request(str(prompt.problem["prompt"]), written)
            problems.append(chain.problem)
            rows.append(rows_of.critic_row(prompt, written, asked, chain.rewards[0], config.environment))
        return problems, rows

    def _said(self, problems: Sequence[int], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return rows that teach a critic what the sources of feedback say about the answers to criticise.

        An answer with which all are satisfied gets the words of the verdict; one about which none says anything, no row.
        """
        from posttrain.sampling.feedback_source import open_feedback

        config = self.config
        assert config.critic is not None
        answers, examples = [said(r["written"]) for r in rows], [self.prompts[i].problem for i in problems]
        found: list[list[Any]] = [[] for _ in rows]
        for settings in config.environment.feedback:
            source = open_feedback(settings, self.context.functions)
            try:
                notes = source.notes(answers, examples)
            finally:
                source.close()
            for of_answer, note in zip(found, notes, strict=True):
                of_answer += [] if note is None else [note]
        out = []
        for row, of_answer in zip(rows, found, strict=True):
            told = [note for note in of_answer if note.text.strip() or note.right is not None]
            satisfied = told and all(note.right for note in told)
            text = config.critic.verdict if satisfied and config.critic.verdict else "\n".join(n.text for n in told)
            if text.strip():
                out.append({"prompt": row["prompt"], "completion": text, "question_source": row["question_source"]})
        return out

    def _statistics(
        self, chains: Sequence[AnswerChain], rows: Sequence[Any], counts: CorrectionCounts
    ) -> dict[str, Any]:
        """Return stats.json: kept and dropped sum to chains."""
        return {
            "chains": len(chains),
            "kept": {outcome: counts.kept[outcome] for outcome in rows_of.OUTCOMES},
            "dropped": dict(counts.dropped.most_common()),
            "examples": counts.examples,
            "figures": rows_of.chain_figures(chains, self.config.threshold),
            "problems": len(self.prompts),
            "problems with a row": len({row["problem"] for row in rows}),
            "tokens": sum(row["tokens"] for row in rows),
        }


def _scored(rollout: Rollout, answers: Sequence[tuple[RefineTurn, Rollout]]) -> Rollout:
    """Return a chain with the rewards of its answers, or with the failures of one."""
    failed = next((r for _, r in answers if not r.rewarded), None)
    if failed is not None or not answers:
        return replace(rollout, reward=math.nan, failures={} if failed is None else failed.failures)
    steps = {turn_name(ANSWER, k): [(t.first, t.last, r.reward)] for k, (t, r) in enumerate(answers, 1)}
    last = answers[-1][1]
    return replace(rollout, reward=last.reward, rewards=last.rewards, notes=last.notes, steps={ANSWER: [], **steps})


def _chain(rollout: Rollout, problem: int, environment: Any, tokenizer: Any) -> AnswerChain:
    """Return a scored rollout as a chain."""
    from posttrain.sampling.refine_turns import refine_turns

    turns = refine_turns(rollout, tokenizer, environment)
    texts = [str(tokenizer.decode(list(rollout.tokens[t.first : t.last]), skip_special_tokens=False)) for t in turns]
    rewards: list[float] = []
    while found := rollout.steps.get(turn_name(ANSWER, len(rewards) + 1)):
        rewards.append(found[0][2])
    return AnswerChain(problem, turns, texts, rewards, rollout.finish not in ("stop", "end"), rollout.length)
