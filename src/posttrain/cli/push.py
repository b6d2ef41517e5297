"""posttrain push: upload what a run made to the Hub, with a model card."""

from __future__ import annotations

import sys
import tempfile
from typing import Annotated

import typer

from posttrain.cli.arguments import DryRun
from posttrain.core.errors import ModelError
from posttrain.core.visible_text import visible

MIB = 1 << 20


def push_command(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder of a run.")],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository on the Hub; made if missing.")],
    stage: Annotated[str | None, typer.Option(help="What this stage made. [default: the run's model]")] = None,
    adapter: Annotated[bool, typer.Option("--adapter", help="The adapter alone.")] = False,
    merged: Annotated[bool, typer.Option("--merged", help="The whole model, if the run left an adapter.")] = False,
    license: Annotated[
        str | None, typer.Option(help="Licence for the card, such as apache-2.0. [default: the base model's]")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Everyone may see the repository.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Replace files that are there without a question.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Upload a run's model with its card and recipe to the Hub, to a private repository unless --public."""
    if adapter and merged:
        raise ModelError("--adapter and --merged: choose one")
    from posttrain.runs.hub_push import plan_push, upload

    what = "adapter" if adapter else "merged" if merged else "auto"
    with tempfile.TemporaryDirectory(prefix="posttrain-push-") as work:
        plan = plan_push(run, repository, stage, what, license, work)
        sizes = plan.sizes()
        typer.echo(f"{'public' if public else 'private'} repository {repository}: {plan.title}")
        for name, size in sorted(sizes.items()):
            typer.echo(visible(f"  {_size(size):>11}  {name}"))
        typer.echo(f"  {_size(sum(sizes.values())):>11}  in {len(sizes)} files")
        for line in (*plan.notes, *(f"{name}: left out" for name in plan.left_out)):
            typer.echo(visible(f"note    {line}"))
        if dry_run:
            typer.echo(visible(f"\nREADME.md\n{plan.card}"))
            typer.echo("dry run: nothing was uploaded")
            return

        def confirm(touched: list[str]) -> bool:
            typer.echo(visible(f"{repository} has files that change: {', '.join(touched)}"))
            if not yes and not sys.stdin.isatty():
                raise ModelError(f"nothing was uploaded: --yes replaces files of {repository} without a question")
            return yes or typer.confirm("Go on?")

        address = upload(plan, public, confirm)
    typer.echo(visible(f"uploaded {address}"))


def _size(count: int) -> str:
    return f"{count:,} B" if count < MIB else f"{count / MIB:,.1f} MiB"
