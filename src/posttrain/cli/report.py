"""posttrain report: write the page of a run again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from posttrain.core.errors import RecipeError
from posttrain.core.files import similar
from posttrain.core.visible_text import visible


def report_command(run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]) -> None:
    """Write the page of a run again and print its path."""
    if not (run / "manifest.json").is_file():
        near = "" if run.exists() else similar(run)
        raise RecipeError(f"{run} is not a run's folder (no manifest.json in it).{near}")
    from posttrain.report import build_report

    typer.echo(visible(build_report(run)))
