"""Feedback: answers from rows or from the policy, labelled by people or by a judge, become preference rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from posttrain.config.feedback import AnswersConfig, SamplesConfig
from posttrain.config.judge import JudgeConfig
from posttrain.config.settings import NAME, ModelConfig
from posttrain.core.errors import DataError
from posttrain.core.files import write_json, write_lines
from posttrain.core.progress import Track
from posttrain.methods.data.data_stage import DataStage, DataStageConfig, chunked, save_rows
from posttrain.sampling.frozen_sampler import open_sampler
from posttrain.sampling.rollout_store import groups_of, read_rollouts, rollouts_path, write_rollouts

if TYPE_CHECKING:
    from posttrain.core.types import RolloutGroup
    from posttrain.data.comparisons import AnswerPair, Candidate, LeftOut
    from posttrain.data.prompts import RenderedPrompt
    from posttrain.judge.labels import Judge, JudgedPair
    from posttrain.sampling.engine import LocalSampler

PAIRS_AT_ONCE = 256
"""Pairs given to the judge together, between two lines of progress."""


class FeedbackConfig(DataStageConfig):
    """Feedback: answers in, pairs with strengths out (data/rows.jsonl), labelled by people or by a judge."""

    method: str = "feedback"
    name: str = Field("feedback", pattern=NAME, description="Name of the stage's folder in the run.")
    labels: Literal["human", "judge"] = Field(
        description="Whose labels the rows get. judge: if people's labels exist as well, the report compares the two."
    )
    answers: AnswersConfig
    judge: JudgeConfig | None = Field(None, description="The judge (labels: judge).")
    show: int = Field(10, ge=0, description="Disagreements with people (or between orders) kept in judge.json.")

    @model_validator(mode="after")
    def _labels(self) -> FeedbackConfig:
        if self.labels == "human" and isinstance(self.answers, SamplesConfig):
            raise ValueError(
                "nobody has labelled sampled answers: set labels: judge, or use answers from rows with ratings"
            )
        if self.labels == "judge" and self.judge is None:
            raise ValueError("labels: judge needs a judge (judge.model.source, or judge.server.model)")
        if self.labels == "human" and self.judge is not None:
            raise ValueError("labels: human uses no judge; remove judge, or set labels: judge")
        return self


class Feedback(DataStage):
    """Label answers and save pairs with strengths; judge.json and raters.json (agreement), left_out.jsonl beside them.

    Sampled answers are stored in rollouts/ and the judge's answers in its store, from which a stage resumes.
    """

    Config = FeedbackConfig
    title = "Feedback"

    def prepare(self) -> list[tuple[str, Any]]:
        """Read the rows, or render the prompts; check the judge's principles, key and store."""
        from posttrain.data.human_feedback import read_answers
        from posttrain.data.prompts import require_plain_context
        from posttrain.data.tokenizing import tokenize
        from posttrain.judge.labels import Judge

        config, tokenizer = self.config, self.context.tokenizer
        if config.judge is not None:
            Judge.open(config.judge, f"stage {config.name}").close()
        if isinstance(config.answers, SamplesConfig):
            data = self.load_prompts(config.answers.problems)
            require_plain_context(self.prompts, f"stage {config.name}: pairs of answers")
            return data
        self.answers = read_answers(config.answers, lambda text: len(tokenize(tokenizer, [text])[0]))
        if config.labels == "human" and not self.answers.thumbs and all(p.human is None for p in self.answers.pairs):
            raise DataError(
                f"stage {config.name}: labels: human needs people's labels, and these rows have none (no scores)"
            )
        if config.labels == "judge" and not self.answers.pairs:
            raise DataError(f"stage {config.name}: every prompt has a single answer; a judge compares two")
        return [(config.name, self.answers)]

    def make(self, model: ModelConfig, folder: Path, seed: int) -> dict[str, Any]:
        from posttrain.core import distributed
        from posttrain.data.comparisons import LeftOut

        if not distributed.is_main():  # one process labels, the others wait
            save_rows(folder, None)
            return {"rows": 0}
        folder.mkdir(parents=True, exist_ok=True)
        dropped = LeftOut()
        if isinstance(self.config.answers, SamplesConfig):
            pairs, left_out = self._sample(model, folder / "rollouts", seed, dropped), dropped.all
        else:
            pairs, left_out = self.answers.pairs, self.answers.left_out
            if self.answers.raters:
                write_json(folder / "raters.json", {"name": self.config.name, **self.answers.raters})
        if self.config.labels == "human":
            rows = self._rows_by_people()
        else:
            rows, unlabelled = self._rows_by_judge(pairs, folder, dropped)
            left_out = [*left_out, *unlabelled]
        write_lines(folder / "left_out.jsonl", left_out)
        save_rows(folder, {"rows": rows})
        return {"rows": len(rows)}

    def _rows_by_people(self) -> list[dict[str, Any]]:
        from posttrain.data.comparisons import labelled_row

        if self.answers.thumbs:
            return [{**row, "labels": "human"} for row in self.answers.thumbs]
        return [
            labelled_row(p, p.human, p.margin or 0.0, labels="human")
            for p in self.answers.pairs
            if p.human is not None and p.human != 0.5
        ]

    def _rows_by_judge(
        self, pairs: Sequence[AnswerPair], folder: Path, dropped: LeftOut
    ) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
        """Write judge.json; return the rows, and the source and reason of each pair without a label."""
        from posttrain.data.bad_rows import SHOWN_ROWS
        from posttrain.judge.judge_summary import summarize_judge
        from posttrain.judge.labels import Judge, describe

        config = self.config
        with Judge.open(config.judge, f"stage {config.name}") as judge:
            judged = judge_pairs(judge, pairs, config.name)
        rows = [_judged_row(j, config.judge) for j in judged if j.p_a is not None and j.p_a != 0.5]
        report = {"name": config.name, "judge": describe(config.judge), **summarize_judge(judged, config.show)}
        report |= {
            "answers_left_out": dict(dropped),
            "answers_left_out_shown": dropped.all[:SHOWN_ROWS],
            "unread_answers": judge.counts["unreadable"],
            "cost": judge.asker.cost(),
        }
        write_json(folder / "judge.json", report)
        if not rows:
            shown = "; ".join(f"{u['source']}: {u['why']}" for u in report["unlabelled"][:3])
            message = f"stage {config.name}: no pair got a label. {' '.join(report['warnings'])} {shown}"
            raise DataError(message.rstrip())
        return rows, [{"source": j.pair.source, "reason": j.why or "a tie"} for j in judged if j.p_a in (None, 0.5)]

    def _sample(self, model: ModelConfig, folder: Path, seed: int, dropped: LeftOut) -> list[AnswerPair]:
        """Sample what is missing in `folder`, chunk by chunk, and return pairs of the policy's own answers."""
        import numpy as np

        from posttrain.data.comparisons import pair_up
        from posttrain.data.prompts import uses_chat_template
        from posttrain.sampling.protocol import Request

        config, prompts = self.config.answers, self.prompts
        pairs: list[AnswerPair] = []
        sampler: LocalSampler | None = None
        chat = config.problems.kind != "rows" or uses_chat_template(config.problems, None)
        seeds = np.random.SeedSequence([seed, 3]).generate_state(len(prompts), np.uint64)
        with Track(f"{self.config.name}: sampling", len(prompts)) as track:
            for c, part in chunked(len(prompts), config.prompts_at_once).items():
                path = rollouts_path(folder, c)
                if not path.exists():
                    sampler = sampler or open_sampler(model, config.sampler)
                    requests = [Request(prompts[i].tokens, config.n, int(seeds[i]), prompts[i].problem) for i in part]
                    groups = sampler.sample(requests, config.sampler)
                    write_rollouts(folder, c, groups, None, [prompts[i].text for i in part], list(part))
                for i, group in zip(part, groups_of(read_rollouts(path)), strict=True):
                    candidates = _candidates(prompts[i], group, chat, dropped)
                    if len(candidates) < 2:
                        dropped.note("prompts with fewer than two answers", prompts[i].source)
                        continue
                    rng = np.random.default_rng([config.seed, i])
                    pairs += pair_up(_turns(prompts[i]), candidates, config.pairs_per_prompt, rng, dropped)
                track.update(part[-1] + 1, pairs=len(pairs))
        if not pairs:
            raise DataError(
                f"stage {self.config.name}: no prompt got two different answers ({dict(dropped)}); raise "
                "sampler.temperature or n"
            )
        return pairs


def _candidates(prompt: RenderedPrompt, group: RolloutGroup, chat: bool, dropped: LeftOut) -> list[Candidate]:
    """Return the different answers of a prompt; empty, repeated and copied ones are counted in `dropped`."""
    from posttrain.data.comparisons import Candidate

    # In plain text the space before an answer belongs to it: it separates the answer from the prompt.
    texts = [r.text.strip() if chat else r.text.rstrip() for r in group.rollouts]
    turns = [str(m["content"]) for m in prompt.problem["messages"]]
    copies = turns[-1].strip(), "".join(turns).strip()
    first: dict[str, int] = {}
    for j, text in enumerate(texts):
        if not text:
            dropped.note("empty answer", f"{prompt.source}#{j}")
        elif text.strip() in copies:
            dropped.note("the answer is the prompt again", f"{prompt.source}#{j}")
        elif first.setdefault(text, j) != j:
            dropped.note("answer given twice", f"{prompt.source}#{j}")
    return [Candidate(text, f"{prompt.source}#{j}") for text, j in first.items()]


def _turns(prompt: RenderedPrompt) -> Any:
    """Return the prompt as the preference layout has it: a text if it is a single turn, or else its turns."""
    turns = [dict(m) for m in prompt.problem["messages"]]
    return turns[0]["content"] if len(turns) == 1 and turns[0]["role"] == "user" else turns


def judge_pairs(judge: Judge, pairs: Sequence[AnswerPair], title: str) -> list[JudgedPair]:
    """Judge all pairs, PAIRS_AT_ONCE at a time, with progress.

    Args:
        judge: The judge.
        pairs: Pairs of answers.
        title: Name of the stage, for the progress line.
    """
    out: list[JudgedPair] = []
    with Track(f"{title}: judging", len(pairs)) as track:
        for start in range(0, len(pairs), PAIRS_AT_ONCE):
            part = pairs[start : start + PAIRS_AT_ONCE]
            of = f"questions of pairs {start + 1} to {start + len(part)}"
            out += judge.compare(part, lambda done, total, of=of: track.phase(f"{done}/{total} {of}"))  # type: ignore[misc]
            counts = judge.asker.counts
            track.update(len(out), questions=counts["asked"], from_the_store=counts["from the store"])
    return out


def _judged_row(judged: JudgedPair, config: JudgeConfig) -> dict[str, Any]:
    """Return a row with the judge's details, which are swapped if b was chosen."""
    from posttrain.data.comparisons import labelled_row

    assert judged.p_a is not None
    first = judged.p_a > 0.5
    details: dict[str, Any] = {}
    if judged.orders is not None:
        details["orders"] = [x if first else 1 - x for x in judged.orders]
    if judged.scores is not None:
        details["scores"] = list(judged.scores if first else judged.scores[::-1])
    if judged.mass is not None:
        details["mass"] = judged.mass
    if config.principles_per_question and judged.principles:
        details["principles"] = list(judged.principles)
    if judged.rationales:
        details["rationales"] = list(judged.rationales)
    more: dict[str, Any] = {"labels": "judge", "judge": details}
    if judged.pair.human is not None:
        more["human_probability"] = judged.pair.human if first else 1 - judged.pair.human
    return labelled_row(judged.pair, judged.p_a, judged.margin, **more)
