"""Run folder to ``report.html``: one file that opens offline and may be sent to anyone."""

from __future__ import annotations

import base64
import hashlib
import math
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from posttrain.report import words
from posttrain.report.chains import amounts, chain_views
from posttrain.report.curves import Chart, chart, measures_for, ticks
from posttrain.report.feedback import read_feedback
from posttrain.report.inference import by_stage, panels
from posttrain.report.load import Evaluation, Record, Run, TaskRow, read
from posttrain.report.rollouts import views
from posttrain.report.scored import scored

SHOWN = {"gained": 3, "lost": 3, "wrong": 0, "right": 0}  # cards of a task, by what became of the item
FOLDED = {"gained": 9, "lost": 9, "wrong": 4, "right": 4}  # up to these behind "more"
CHANGES = {
    "gained": "wrong → right",
    "lost": "right → wrong",
    "wrong": "wrong both times",
    "right": "right both times",
}


@dataclass(frozen=True)
class Card:
    """One item before and after; ``scores`` are (choice, share before, share after, log-likelihoods of both)."""

    change: str
    item: str
    prompt: str
    expected: str
    before: str
    after: str
    scores: list[tuple[str, float, float, float, float]]


@dataclass(frozen=True)
class Samples:
    """The cards of a task, shown and folded; how many items there are of each change; greedy answers, if any."""

    task: str
    counts: dict[str, int]
    cards: list[Card]
    more: list[Card]
    greedy: list[Card]


@dataclass(frozen=True)
class Forest:
    """Intervals side by side, in percent of the axis: (side, value, low, width), and the marks of the axis."""

    lanes: list[tuple[str, float, float, float]]
    marks: list[tuple[float, str]]


def build(run_folder: Path) -> Path:
    """Writes ``report.html`` into the run folder from whatever files are there, and returns its path.

    The page is written whole or not at all. Raises CheckpointError where there is no such folder.
    """
    run = read(Path(run_folder))
    target = run.folder / "report.html"
    scratch = target.with_suffix(f".{os.getpid()}.tmp")
    try:
        scratch.write_text(render(run), encoding="utf-8")
        scratch.replace(target)
    finally:
        scratch.unlink(missing_ok=True)
    return target


def render(run: Run) -> str:
    """The page as text. Text of the run is escaped by the template engine; scripts in it are also forbidden by the
    page's own content security policy, which allows our one script by its hash and no connection at all."""
    files = resources.files("posttrain.report").joinpath("page").iterdir()
    page = {f.name: f.read_text(encoding="utf-8") for f in files if f.is_file()}
    environment = jinja2.Environment(
        loader=jinja2.DictLoader(page),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": words.number, "score": words.score, "p": words.p_value, "seconds": words.seconds,
        "verdict": words.verdict, "plain": words.plain, "share": words.share, "fixed": words.fixed,
    }  # fmt: skip
    script = page["script.js"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    rows = run.rows()
    place = shlex.quote(str(Path(str(run.recipe.get("output") or "runs")) / run.name))
    return environment.get_template("page.html.j2").render(
        run=run,
        manifest=run.manifest,
        rows=rows,
        plots=[(r, _forest(r)) for r in rows],
        status_words=words.STATUS.get(run.status, words.STATUS["unknown"]),
        done=_what_was_done(run),
        by_stage=by_stage(run),
        panels=panels(run),
        curves=[(s.name, *_charts(s.metrics, s.timings)) for s in run.stages if s.name not in _data_stages(run)],
        samples=[s for r in rows if (s := _samples(r, run)) is not None],
        changes=CHANGES,
        rollouts=views(run),
        chains=chain_views(run.folder, run.notes),
        amounts=amounts,
        feedback=read_feedback(run.folder, run.notes),
        scored=scored(run),
        recipe=words.yaml_markup(run.recipe_text),
        lineage=_lineage(run),
        commands=[
            *([("Chat with the result", f"posttrain chat {place}/model")] if _has_model(run) else []),
            ("Run it again, to a folder of its own",
             f"posttrain run {place}/recipe.yaml name={shlex.quote(run.name + '-again')}"),
            ("Go on, if it was interrupted", f"posttrain run {place}"),
        ],
        style=Markup(page["style.css"]),
        script=Markup(script),
        digest=digest,
    )  # fmt: skip


def _has_model(run: Run) -> bool:
    """Whether the run leaves a model, or may yet: one that is done without has made data, or a reward model."""
    made_other = bool(run.manifest.get("stages")) and run.status == "done" and not (run.folder / "model").is_dir()
    return not made_other or bool(run.manifest.get("artifacts", {}).get("model/config.json"))


def _what_was_done(run: Run) -> str:
    source = str((run.manifest.get("model") or run.recipe.get("model") or {}).get("source") or "A model")
    entries = run.manifest.get("data") or []
    parts = []
    for stage in run.manifest.get("stages") or []:
        method = words.METHODS.get(str(stage.get("method")), str(stage.get("method") or "a stage"))
        rows = sum(int(d.get("used") or 0) for d in entries if d.get("stage") == stage.get("name"))
        steps = stage.get("steps")
        parts.append(
            method
            + (f" on {rows:,} rows" if rows else "")
            + (f" for {steps:,} steps" if isinstance(steps, int) else "")
        )
    if parts:
        return f"{source} went through {', then '.join(parts)}."
    return f"{source} was evaluated." if run.before or run.after else f"{source}; no stage has begun yet."


def _data_stages(run: Run) -> set[str]:
    """Stages that train nothing, and so have no curves."""
    return {str(s.get("name")) for s in run.manifest.get("stages") or [] if s.get("made") is not None}


def _charts(metrics: list[Record], timings: list[Record]) -> tuple[list[Chart], list[int]]:
    skipped = [r["step"] for r in metrics if r.get("skipped")]
    of_metrics, of_timings = measures_for(metrics)
    flat = [{**r, **{k.replace(" ", "_"): v for k, v in (r.get("phases") or {}).items()}} for r in timings]
    found = [chart(m, metrics, skipped) for m in of_metrics] + [chart(m, flat) for m in of_timings]
    return [c for c in found if c is not None], skipped


def _forest(row: TaskRow) -> Forest:
    """Accuracy on an axis from 0 to 1, perplexity from 0 to a little above the highest limit."""
    sides = [(name, s) for name, s in (("before", row.before), ("after", row.after)) if s]
    end = 1.0 if row.metric == "accuracy" else max((float(s.get("high") or 0) for _, s in sides), default=0) * 1.1
    if not 0 < end < math.inf:
        return Forest([], [])
    lanes = []
    for name, side in sides:
        at, low, high = (100 * float(side.get(k) or 0) / end for k in ("value", "low", "high"))
        lanes.append((name, at, low, high - low))
    marks = [0, 0.25, 0.5, 0.75, 1] if row.metric == "accuracy" else ticks(0, end)
    return Forest(lanes, [(100 * m / end, f"{m:.0%}" if row.metric == "accuracy" else words.number(m)) for m in marks])


def _samples(row: TaskRow, run: Run) -> Samples | None:
    before, after = (side.get(row.task, Evaluation()) for side in (run.before, run.after))
    old = {i.get("id"): i for i in before.items if "correct" in i}
    new = {i.get("id"): i for i in after.items if "correct" in i}
    groups: dict[str, list[Card]] = {name: [] for name in CHANGES}
    for item in [i for i in old if i in new]:
        was, now = bool(old[item]["correct"]), bool(new[item]["correct"])
        change = {(False, True): "gained", (True, False): "lost", (False, False): "wrong"}.get((was, now), "right")
        groups[change].append(_card(change, old[item], new[item]))
    cards = [c for name, group in groups.items() for c in group[: SHOWN[name]]]
    more = [c for name, group in groups.items() for c in group[SHOWN[name] : FOLDED[name]]]
    greedy = [] if row.kind in ("generate", "sample") and old else _greedy(before.samples, after.samples)
    if not cards and not more and not greedy:
        return None
    return Samples(row.task, {name: len(group) for name, group in groups.items()}, cards, more, greedy)


def _card(change: str, old: Record, new: Record) -> Card:
    def answer(item: Record) -> str:
        return words.plain(item["output"] if "output" in item else item.get("prediction"))

    a, b = old.get("scores"), new.get("scores")
    scores = []
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        scores = [(str(k), p, q, float(a[k]), float(b[k])) for k, p, q in zip(a, _shares(a), _shares(b), strict=True)]
    return Card(change, str(old.get("id", "")), words.plain(old.get("prompt")), words.plain(old.get("expected")),
                answer(old), answer(new), scores)  # fmt: skip


def _shares(scores: dict[str, Any]) -> list[float]:
    """Softmax of the scores: how the model divides its belief among the choices."""
    top = max(float(v) for v in scores.values())
    weights = [math.exp(float(v) - top) for v in scores.values()]
    return [w / sum(weights) for w in weights]


def _greedy(before: Sequence[Record], after: Sequence[Record]) -> list[Card]:
    """Greedy answers to the same prompts; a side that has none for a prompt is left empty."""
    old, new = ({words.plain(s.get("prompt")): s for s in side} for side in (before, after))
    out = []
    for prompt in {**old, **new}:
        about = old.get(prompt) or new[prompt]
        was, now = (words.plain(side.get(prompt, {}).get("output")) for side in (old, new))
        out.append(Card("greedy", "", prompt, words.plain(about.get("expected")), was, now, []))
    return out


def _lineage(run: Run) -> list[tuple[str, str, str]]:
    """(kind, title, detail) of each box from the model that came in to the one that goes out."""
    model = run.manifest.get("model") or run.recipe.get("model") or {}
    boxes = [("model", str(model.get("source") or "model"), str(model.get("type") or "start"))]
    stages = run.manifest.get("stages") or run.recipe.get("stages") or []
    for stage in stages:
        method = str(stage.get("method") or "")
        detail = " · ".join(
            part
            for part in (
                words.METHODS.get(method, method),
                f"{stage['steps']:,} steps" if isinstance(stage.get("steps"), int) else "",
                str(stage.get("status") or "not begun"),
            )
            if part
        )
        boxes.append(("stage", str(stage.get("name") or method), detail))
    ready = run.status == "done" or (run.folder / "model").is_dir()
    if stages and _has_model(run):
        boxes.append(("model" if ready else "pending", "model/", "the result" if ready else "not there yet"))
    return boxes
