"""Feedback as a stage: answers from rows or from the policy, labelled by people or by a judge, into preference rows."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.config import JudgeConfig, ModelConfig
from posttrain.config.feedback import SamplesConfig
from posttrain.core import distributed
from posttrain.core.errors import DataError
from posttrain.core.files import write_json, write_text
from posttrain.core.progress import Track
from posttrain.data.comparisons import AnswerPair, Candidate, LeftOut, labelled_row, pair_up
from posttrain.data.human_feedback import Answers
from posttrain.data.prompts import PromptSet, RenderedPrompt, uses_chat_template
from posttrain.data.rows import SHOWN_ROWS
from posttrain.judge.judge_summary import summarize_judge
from posttrain.judge.labels import Judge, JudgedPair, describe
from posttrain.methods.data.ai_feedback import FeedbackConfig
from posttrain.methods.data.row_making import open_sampler
from posttrain.sampling.engine import LocalSampler
from posttrain.sampling.protocol import Request
from posttrain.sampling.rollout_store import groups_of, read_rollouts, rollouts_path, write_rollouts
from posttrain.trainer.policy import save_atomically

AT_ONCE = 256
"""Pairs handed to the judge together, between two lines of progress."""


def run_feedback(
    config: FeedbackConfig, model: ModelConfig, source: Answers | PromptSet, folder: Path, *, seed: int = 0
) -> dict[str, Any]:
    """Label the answers; `folder`/data/rows.jsonl gets them, judge.json and raters.json what to think of them,
    left_out.jsonl what got no row: {source, reason} a line.

    Killed, it goes on: what was sampled and what the judge said is on the disk. Returns the manifest's entry.
    """
    began = time.perf_counter()
    if not distributed.is_main():  # one process labels; the others wait for what it leaves
        save_atomically(folder / "data", lambda work: None)
        return {"rows": 0, "seconds": 0.0}
    folder.mkdir(parents=True, exist_ok=True)
    dropped = LeftOut()
    if isinstance(source, PromptSet):
        assert isinstance(config.answers, SamplesConfig)
        pairs = _sampled(config.answers, config.name, model, source.items, folder, seed, dropped)
        raters: dict[str, Any] = {}
    else:
        pairs, raters = source.pairs, source.raters
    if raters:
        write_json(folder / "raters.json", {"name": config.name, **raters})
    unlabelled: list[dict[str, str]] = []
    if config.labels == "human":
        rows = _by_people(source, pairs)
    else:
        assert config.judge is not None
        with Judge.open(config.judge) as judge:
            judged = judge_pairs(judge, pairs, config.name)
        rows = [_row(j, config.judge) for j in judged if j.p_a is not None and j.p_a != 0.5]
        unlabelled = [{"source": j.pair.source, "reason": j.why or "a tie"} for j in judged if j.p_a in (None, 0.5)]
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
            raise DataError(
                f"stage {config.name}: no pair got a label. {' '.join(report['warnings'])} {shown}".rstrip()
            )
    left_out = [*(source.left_out if isinstance(source, Answers) else dropped.all), *unlabelled]
    write_text(folder / "left_out.jsonl", "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in left_out))
    save_atomically(folder / "data", lambda work: _write(work, rows))
    return {"rows": len(rows), "seconds": round(time.perf_counter() - began, 2)}


def _write(work: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    work.mkdir(parents=True, exist_ok=True)
    write_text(work / "rows.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))


def _by_people(source: Answers | PromptSet, pairs: Sequence[AnswerPair]) -> list[dict[str, Any]]:
    if isinstance(source, Answers) and source.thumbs:
        return [{**row, "labels": "human"} for row in source.thumbs]
    return [
        labelled_row(p, p.human, p.margin or 0.0, labels="human")
        for p in pairs
        if p.human is not None and p.human != 0.5
    ]


def judge_pairs(judge: Judge, pairs: Sequence[AnswerPair], title: str) -> list[JudgedPair]:
    """All pairs, some at a time, with progress."""
    out: list[JudgedPair] = []
    with Track(f"{title}: judging", len(pairs)) as track:
        for start in range(0, len(pairs), AT_ONCE):
            part = pairs[start : start + AT_ONCE]

            def shown(done: int, total: int, start: int = start, size: int = len(part)) -> None:
                track.phase(f"{done}/{total} questions of pairs {start + 1} to {start + size}")

            out += judge.compare(part, shown)
            counts = judge.asker.counts
            track.update(len(out), questions=counts["asked"], from_the_store=counts["from the store"])
    return out


def _row(j: JudgedPair, config: JudgeConfig) -> dict[str, Any]:
    """A row with the judge's details; what it says of a is turned round where b was chosen."""
    assert j.p_a is not None
    first = j.p_a > 0.5
    details: dict[str, Any] = {}
    if j.orders is not None:
        details["orders"] = [x if first else 1 - x for x in j.orders]
    if j.scores is not None:
        details["scores"] = list(j.scores if first else j.scores[::-1])
    if j.mass is not None:
        details["mass"] = j.mass
    if config.principles_per_question and j.principles:
        details["principles"] = list(j.principles)
    if j.rationales:
        details["rationales"] = list(j.rationales)
    more: dict[str, Any] = {"labels": "judge", "judge": details}
    if j.pair.human is not None:
        more["human_probability"] = j.pair.human if first else 1 - j.pair.human
    return labelled_row(j.pair, j.p_a, j.margin, **more)


def _sampled(
    config: SamplesConfig,
    title: str,
    model: ModelConfig,
    questions: Sequence[RenderedPrompt],
    folder: Path,
    seed: int,
    dropped: LeftOut,
) -> list[AnswerPair]:
    """Pairs of the policy's own completions. Each lot of prompts is kept as a step's rollouts when it is sampled."""
    sampler: LocalSampler | None = None
    chatty = config.problems.kind != "rows" or uses_chat_template(config.problems, None)
    seeds = np.random.SeedSequence([seed, 3]).generate_state(len(questions), np.uint64)
    size = config.prompts_at_once
    pairs: list[AnswerPair] = []
    with Track(f"{title}: sampling", len(questions)) as track:
        for lot, start in enumerate(range(0, len(questions), size), 1):
            numbers = range(start, min(start + size, len(questions)))
            path = rollouts_path(folder / "rollouts", lot)
            if not path.exists():
                sampler = sampler or open_sampler(model, config.sampler)
                requests = [
                    Request(questions[i].tokens, config.n, int(seeds[i]), questions[i].problem) for i in numbers
                ]
                groups = sampler.sample(requests, config.sampler)
                write_rollouts(
                    folder / "rollouts", lot, groups, None, [questions[i].text for i in numbers], list(numbers)
                )
            for i, group in zip(numbers, groups_of(read_rollouts(path)), strict=True):
                # In plain text the space before an answer is part of it: it joins the answer to what it goes on from.
                texts = [r.text.strip() if chatty else r.text.rstrip() for r in group.rollouts]
                answers = [(text, j) for j, text in enumerate(texts)]
                turns = [str(m["content"]) for m in questions[i].problem["messages"]]
                asked = turns[-1].strip(), "".join(turns).strip()
                different = {text: j for text, j in reversed(answers) if text and text.strip() not in asked}
                source = questions[i].problem["source"]
                for text, j in answers:
                    if not text:
                        dropped.note("empty answer", f"{source}#{j}")
                    elif text not in different:
                        dropped.note("the answer is the prompt again", f"{source}#{j}")
                    elif different[text] != j:
                        dropped.note("answer given twice", f"{source}#{j}")
                candidates = [Candidate(t, f"{source}#{j}") for t, j in sorted(different.items(), key=lambda x: x[1])]
                if len(candidates) < 2:
                    dropped.note("prompts with fewer than two answers", source)
                    continue
                rng = np.random.default_rng([config.seed, i])
                pairs += pair_up(_prompt(questions[i]), candidates, config.pairs_per_prompt, rng, dropped)
            track.update(numbers[-1] + 1, pairs=len(pairs))
    if not pairs:
        raise DataError(
            f"stage {title}: no prompt got two different answers ({dict(dropped)}); raise sampler.temperature or n"
        )
    return pairs


def _prompt(question: RenderedPrompt) -> Any:
    """What was asked, as the preference layout has it."""
    turns = [dict(m) for m in question.problem["messages"]]
    return turns[0]["content"] if len(turns) == 1 and turns[0]["role"] == "user" else turns
