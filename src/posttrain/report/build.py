"""Build `report.html` of a run folder: one file that opens offline and may be sent to anyone."""

from __future__ import annotations

import base64
import hashlib
import os
import shlex
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from posttrain.report import evaluations, formatting
from posttrain.report.chains import amounts, chain_views
from posttrain.report.charts import stage_charts
from posttrain.report.feedback import read_feedback
from posttrain.report.load import Run, read
from posttrain.report.reward_models import gold, held_out
from posttrain.report.rollouts import views

VENDOR = ("uPlot.iife.min.js", "uPlot.min.css", "LICENSE-uPlot.txt")
FILTERS = {
    "number": formatting.number,
    "score": formatting.score,
    "p": formatting.p_value,
    "seconds": formatting.seconds,
    "verdict": formatting.verdict,
    "share": formatting.share,
    "fixed": formatting.fixed,
}
LEGENDS = {
    "pairs": "are the answers: training makes the chosen one more likely, or scores it higher, than the rejected one.",
    "answers": "are the answers: training makes desirable ones more likely, and undesirable ones less likely.",
    "steps": "end a step: there the model predicts whether the step is correct.",
    "held out": "are scored, not trained on. The rest is context.",
    "rows": "carry loss: the model is trained to produce them. The rest is context.",
}
"""What marked tokens are, by kind of data."""


def build(run_folder: Path) -> Path:
    """Write `report.html` into the run folder from the files that are there, whole or not at all; return its path.

    Raises:
        CheckpointError: There is no such folder.
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
    """Return the page as text.

    The template engine escapes every text of the run. The page's content security policy also forbids scripts in it:
    it allows the page's one script by its hash, and no connection.
    """
    folder = resources.files("posttrain.report").joinpath("page")
    page = {f.name: f.read_text(encoding="utf-8") for f in folder.iterdir() if f.is_file()}
    plot, plot_style, licence = (folder.joinpath("vendor", name).read_text(encoding="utf-8") for name in VENDOR)
    environment = jinja2.Environment(
        loader=jinja2.DictLoader(page),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= FILTERS
    script = f"/* uPlot 1.6.32\n{licence.strip()} */\n{plot.strip()}\n{page['script.js']}"
    rows = run.rows()
    return environment.get_template("page.html.j2").render(
        run=run,
        manifest=run.manifest,
        rows=[(r, evaluations.forest(r)) for r in rows],
        status=formatting.STATUS.get(run.status, formatting.STATUS["unknown"]),
        summary=_summary(run),
        not_evaluated=_not_evaluated(run),
        by_stage=evaluations.by_stage(run),
        panels=evaluations.panels(run),
        curves=[
            (number, stage.name, stage_charts(stage))
            for number, stage in enumerate(run.stages, 1)
            if run.makes(stage.name) != "data"  # which takes no steps
        ],
        samples=[s for r in rows if (s := evaluations.samples(r, run)) is not None],
        changes=evaluations.CHANGES,
        rollouts=views(run),
        chains=chain_views(run.folder, run.notes),
        amounts=amounts,
        feedback=read_feedback(run.folder, run.notes),
        held_out=held_out(run),
        gold=gold(run),
        legend=_legend,
        recipe=formatting.yaml_markup(run.recipe_text),
        lineage=_lineage(run),
        commands=_commands(run),
        style=Markup(f"/* uPlot 1.6.32, MIT licence */\n{plot_style}\n{page['style.css']}"),
        script=Markup(script),
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _commands(run: Run) -> list[tuple[str, str]]:
    place, out = _place(run), []
    if _has_model(run):
        out.append(("Chat with the result", f"posttrain chat {place}/model"))
        if not run.recipe.get("evaluate"):
            out.append(("Evaluate it with the tasks of another recipe", f"posttrain evaluate {place} -r RECIPE"))
    again = f"posttrain run {place}/recipe.yaml name={shlex.quote(run.name + '-again')}"
    out.append(("Run it again, to a folder of its own", again))
    return [*out, ("Resume it, if it was interrupted", f"posttrain run {place}")]


def _place(run: Run) -> str:
    return shlex.quote(str(Path(str(run.recipe.get("output") or "runs")) / run.name))


def _has_model(run: Run) -> bool:
    """Return whether the run leaves a model, or may yet: one that ends without has made data, or a reward model."""
    made_other = bool(run.manifest.get("stages")) and run.status == "done" and not (run.folder / "model").is_dir()
    return not made_other or bool(run.manifest.get("artifacts", {}).get("model/config.json"))


def _source(run: Run) -> str:
    return str((run.manifest.get("model") or run.recipe.get("model") or {}).get("source") or "A model")


def _summary(run: Run) -> str:
    entries, parts = run.manifest.get("data") or [], []
    for stage in run.manifest.get("stages") or []:
        rows = sum(int(d.get("used") or 0) for d in entries if d.get("stage") == stage.get("name"))
        steps = stage.get("steps")
        part = run.title(stage) + (f" on {rows:,} rows" if rows else "")
        parts.append(part + (f" for {steps:,} steps" if isinstance(steps, int) else ""))
    if parts:
        return f"{_source(run)}: {', then '.join(parts)}."
    return f"{_source(run)} was evaluated." if run.before or run.after else f"{_source(run)}; no stage has started yet."


def _not_evaluated(run: Run) -> str:
    """Explain why the page shows no evaluation, and how to get one."""
    if run.recipe.get("evaluate"):
        return "The recipe's evaluations have not been made yet."
    if run.status == "unknown":
        return "There are no evaluations in this folder."
    measured = any(k.startswith("held_out") for s in run.stages for r in s.metrics for k in r)
    also = " Its stages were measured on held-out rows, which the curves show." if measured else ""
    how = (
        "To compare the model before and after training, add tasks under evaluate: to the recipe and run it again "
        "under another name."
    )
    if _has_model(run):
        how += " To evaluate this result alone, use a recipe with such tasks (Commands, below)."
    return f"This run's recipe has no evaluations (no evaluate: section).{also} {how}"


def _legend(entry: Mapping[str, Any]) -> str:
    """Explain what the marked tokens in the examples of a data entry are."""
    labels = {str(e.get("label") or "") for e in entry.get("examples") or []}
    stage = str(entry.get("stage") or "")
    if stage.endswith(" held out") or stage.startswith("evaluate "):
        return LEGENDS["held out"]
    if labels & {"chosen", "rejected"}:
        return LEGENDS["pairs"]
    if labels & {"desirable", "undesirable"}:
        return LEGENDS["answers"]
    return LEGENDS["steps" if entry.get("layout") == "steps" else "rows"]


def _lineage(run: Run) -> list[tuple[str, str, str]]:
    """Return (kind, title, detail) of each box from the model that came in to the result."""
    model = run.manifest.get("model") or run.recipe.get("model") or {}
    boxes = [("model", str(model.get("source") or "model"), str(model.get("type") or "start"))]
    stages = run.manifest.get("stages") or run.recipe.get("stages") or []
    for stage in stages:
        steps = f"{stage['steps']:,} steps" if isinstance(stage.get("steps"), int) else ""
        detail = [run.title(stage) if stage.get("method") else "", steps, str(stage.get("status") or "not started")]
        boxes.append(("stage", str(stage.get("name") or stage.get("method") or ""), " · ".join(filter(None, detail))))
    ready = run.status == "done" or (run.folder / "model").is_dir()
    if stages and _has_model(run):
        boxes.append(("model" if ready else "pending", "model/", "the result" if ready else "not there yet"))
    return boxes
