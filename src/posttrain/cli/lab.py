"""posttrain lab: make the laboratory's small base model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from posttrain.cli.arguments import DryRun, make_console, print_plan


def lab_command(
    output: Annotated[Path | None, typer.Option(help="Folder to make. [default: the cache's, for lab:SEED]")] = None,
    kind: Annotated[
        Literal["sums", "reviews", "refine", "programs"],
        typer.Option(
            help="Answers sums; writes movie reviews, for RLHF; or answers, checks and refines sums, or small programs."
        ),
    ] = "sums",
    seed: Annotated[int, typer.Option(min=0, max=999_999_999, help="Another seed, another model of its kind.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Pretraining steps. [default: enough, in minutes]")] = None,
    dry_run: DryRun = False,
) -> None:
    """Make a small base model that reinforcement learning improves in minutes: to try, compare and debug methods."""
    from posttrain.lab.make_lab import plan_lab, run_lab_command

    if dry_run:
        print_plan(plan_lab(output, kind, seed, steps))
        return
    run_lab_command(make_console(), output, kind, seed, steps)
