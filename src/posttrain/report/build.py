"""Build `report.html` of a run folder: one file that opens offline and may be sent to anyone."""

from __future__ import annotations

import base64
import functools
import hashlib
import os
import shlex
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from posttrain.core.errors import CheckpointError, PosttrainError
from posttrain.core.files import changed_artifacts
from posttrain.core.secrets import hide_values
from posttrain.report import evaluations, formatting
from posttrain.report.behaviour import behaviours
from posttrain.report.chains import amounts, chain_views
from posttrain.report.charts import stage_charts
from posttrain.report.judge_figures import read_feedback
from posttrain.report.kept_corrections import kept_corrections
from posttrain.report.load import Run, read, read_json
from posttrain.report.measured_stages import measured_stages
from posttrain.report.merge_search_view import merge_searches
from posttrain.report.refinements import refinements
from posttrain.report.retention_view import retentions
from posttrain.report.reward_models import gold, held_out
from posttrain.report.rollouts import views
from posttrain.report.row_quality_view import instruction_qualities
from posttrain.report.stage_comparison import compare_stages
from posttrain.report.written_tasks import written_tasks
from posttrain.rewards.reward_log import printed_lines

VENDOR = ("uPlot.iife.min.js", "uPlot.min.css", "LICENSE-uPlot.txt")
FILTERS = {
    "number": formatting.format_number,
    "score": formatting.format_score,
    "p": formatting.format_p,
    "seconds": formatting.format_seconds,
    "verdict": formatting.verdict,
    "share": formatting.format_share,
    "strategy": evaluations.strategy,
    "fixed": formatting.format_fixed,
    "percentage": formatting.format_percentage,
    "quote": shlex.quote,
}


def build_report(run_folder: Path) -> Path:
    """Write `report.html` into the run folder from the files that are there, whole or not at all; return its path.

    Raises:
        CheckpointError: There is no such folder, or a file in it holds something else than the run wrote.
    """
    folder = Path(run_folder)
    try:
        page = render_page(read(folder))
    except PosttrainError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, jinja2.TemplateError) as error:
        changed, manifest = changed_artifacts(folder, weights=False), read_json(folder / "manifest.json", [])
        if not changed and isinstance(manifest, dict) and manifest.get("artifacts"):
            raise  # all files are what the run wrote: the mistake is not in them
        raise CheckpointError(
            f"the page of {folder} can't be made: {', '.join(changed[:3]) or 'a file of the run'} holds something else "
            f"than the run wrote ({type(error).__name__}: {error}). Put it back from a copy"
        ) from error
    target = folder / "report.html"
    scratch = target.with_suffix(f".{os.getpid()}.tmp")
    try:
        scratch.write_text(hide_values(page), encoding="utf-8")
        scratch.replace(target)
    finally:
        scratch.unlink(missing_ok=True)
    return target


@functools.cache
def page_files() -> tuple[dict[str, str], jinja2.Environment]:
    """Return the files of the pages, and their templates; compiling one takes longer than filling it."""
    folder = resources.files("posttrain.report").joinpath("page")
    page = {f.name: f.read_text(encoding="utf-8") for f in folder.iterdir() if f.is_file()}
    environment = jinja2.Environment(
        loader=jinja2.DictLoader(page),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= FILTERS
    return page, environment


@functools.cache
def chart_files() -> tuple[str, str]:
    """Return the style of the pages and the script that draws their charts, both with uPlot's in front."""
    page, _ = page_files()
    folder = resources.files("posttrain.report").joinpath("page")
    plot, plot_style, licence = (folder.joinpath("vendor", file).read_text(encoding="utf-8") for file in VENDOR)
    script = f"/* uPlot 1.6.32\n{licence.strip()} */\n{plot.strip()}\n{page['chart.js']}"
    return f"/* uPlot 1.6.32, MIT licence */\n{plot_style}\n{page['style.css']}", script


def render_template(name: str, /, **values: Any) -> str:
    """Return a page as text.

    The template engine escapes every text among the values. The page's content security policy also forbids scripts in
    them: it allows the page's one script by its hash, and no connection.

    Args:
        name: File of the template, which puts `style`, `script` and `digest` into the page.
        values: What else the template shows.
    """
    page, templates = page_files()
    style, charts = chart_files()
    script = f"{charts}\n{page['script.js']}"
    return templates.get_template(name).render(
        style=Markup(style),
        script=Markup(script),
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        **values,
    )


def render_page(run: Run) -> str:
    """Return the page of a run as text."""
    rows = run.rows()
    return render_template(
        "page.html.j2",
        run=run,
        manifest=run.manifest,
        rows=[(r, evaluations.interval_axis(r)) for r in rows],
        by_stage=compare_stages(run),
        panels=evaluations.panels(run),
        refinements=refinements(run),
        behaviours=behaviours(run),
        curves=[
            (number, stage.name, stage_charts(stage))
            for number, stage in enumerate(run.stages, 1)
            if run.makes(stage.name) != "data"  # which takes no steps
        ],
        samples=[s for r in rows if (s := evaluations.samples(r, run)) is not None],
        changes=evaluations.CHANGES,
        rollouts=views(run),
        chains=chain_views(run.folder, run.notes),
        written_tasks=written_tasks(run.folder, run.notes),
        corrections=kept_corrections(run.folder, run.notes),
        instruction_qualities=instruction_qualities(run.folder, run.notes),
        amounts=amounts,
        feedback=read_feedback(run.folder, run.notes),
        held_out=held_out(run),
        measured=measured_stages(run),
        retentions=retentions(run),
        searches=merge_searches(run),
        gold=gold(run),
        printed=printed_lines(run.folder),
        recipe=formatting.yaml_markup(run.recipe_text),
    )
