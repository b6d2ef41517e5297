"""Show what a stage measured on held-out rows while it trained: the step that was chosen, and answers step by step."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from posttrain.report.formatting import format_number, plain_text
from posttrain.report.load import JsonDict, Run, StageLog, read_json

LONGEST_IMAGE = 2**18
"""Characters of the largest image that the page shows."""
_PREVIEW = re.compile(r"data:image/jpeg;base64,[A-Za-z0-9+/]+=*")


@dataclass(frozen=True)
class AnswerHistory:
    """Hold the answers to one prompt.

    Attributes:
        answers: (steps in words, answer) in order; equal answers in a row are one.
        images: Small copies of the prompt's images, as `data:` URLs.
    """

    prompt: str
    expected: str
    answers: list[tuple[str, str]]
    images: tuple[str, ...] = ()


@dataclass(frozen=True)
class MeasuredStage:
    """Hold a stage that measured held-out rows.

    Attributes:
        lines: The loss before and at its lowest, and which weights the model has, in sentences.
        warning: Why to look closer; empty if there is no reason.
        histories: Answers to each prompt that was answered.
        no_answers: Why there is none; empty if there are some, or none were asked for.
    """

    stage: str
    lines: list[str]
    warning: str
    histories: list[AnswerHistory]
    no_answers: str


def measured_stages(run: Run) -> list[MeasuredStage]:
    """Return the stages that measured held-out rows, in order."""
    out = []
    for stage in run.stages:
        files = sorted((stage.folder / "held_out").glob("step-*.json"))
        found = [m for path in files if isinstance(m := read_json(path, run.notes), dict)]
        if found or stage.chosen:
            histories = _histories(found, stage.chosen.get("model_step"))
            reason = str(found[-1].get("no_answers") or "") if found else ""
            out.append(MeasuredStage(stage.name, _lines(stage), _warning(stage.chosen), histories, reason))
    return out


def held_out_lines(run: Run) -> list[str]:
    """Return lines on the held-out loss of each stage of a run, for the terminal."""
    return [
        f"{'! ' if line == s.warning else ''}{s.stage}: {line}"
        for s in measured_stages(run)
        for line in [*s.lines, *([s.warning] if s.warning else [])]
    ]


def _lines(stage: StageLog) -> list[str]:
    """Describe the step that was chosen; a stage that has not ended has no line."""
    chosen, losses = stage.chosen, stage.chosen.get("held_out_loss") or {}
    best, step = chosen.get("best_step"), chosen.get("model_step")
    taken = stage.metrics[-1]["step"] if stage.metrics else 0
    if best is None or step is None:
        return []
    before, lowest = (format_number(losses.get(name)) for name in ("before", "best"))
    weights = "whose weights the model has" if step == best else f"but the model has the weights of step {step:,}"
    lines = [f"held-out loss {before} before training, {lowest} at step {best:,} of {taken:,} (the lowest, {weights})"]
    if early := chosen.get("stopped_early"):
        waited = f"{early['patience']} measurement{'s' * (early['patience'] != 1)}"
        planned = f"{early['planned_steps']:,}"
        lines.append(f"stopped early, after step {taken:,} of {planned}: {waited} without a lower held-out loss")
    return lines


def _warning(chosen: JsonDict) -> str:
    losses = chosen.get("held_out_loss") or {}
    before, best = losses.get("before"), losses.get("best")
    if not isinstance(before, float) or not isinstance(best, float) or best < before:
        return ""
    return (
        "no step has a lower held-out loss than the model before training: the learning rate may be too high, or the "
        "held-out rows are of another kind than the rows that are trained on"
    )


def _histories(found: list[JsonDict], model_step: int | None) -> list[AnswerHistory]:
    """Return the answers of all measurements by prompt; the step whose weights the model has is named."""
    answered: dict[tuple[str, tuple[str, ...]], list[tuple[int, JsonDict]]] = {}
    for measurement in found:
        for answer in measurement.get("answers") or []:
            asked = plain_text(answer.get("prompt")), shown_images(answer.get("images"))
            answered.setdefault(asked, []).append((int(measurement["step"]), answer))
    out = []
    for (prompt, images), of_prompt in answered.items():
        runs = [list(same) for _, same in groupby(of_prompt, key=lambda item: item[1].get("output"))]
        answers = [
            (_steps([step for step, _ in same], model_step), plain_text(same[0][1].get("output"))) for same in runs
        ]
        out.append(AnswerHistory(prompt, plain_text(of_prompt[0][1].get("expected")), answers, images))
    return out


def shown_images(value: Any) -> tuple[str, ...]:
    """Return the images of an answer; what is no small copy, as the run writes them, is left out."""
    images = value if isinstance(value, list) else []
    return tuple(i for i in images if isinstance(i, str) and len(i) <= LONGEST_IMAGE and _PREVIEW.fullmatch(i))


def _steps(steps: list[int], model_step: int | None) -> str:
    first = "before training" if steps[0] == 0 else f"step {steps[0]:,}"
    words = first if len(steps) == 1 else f"{first} to step {steps[-1]:,}"
    if model_step not in steps:
        return words
    return f"{words} (the model)" if len(steps) == 1 else f"{words} (the model: step {model_step:,})"
