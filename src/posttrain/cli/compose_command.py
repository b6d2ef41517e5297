"""posttrain compose: a vision tower and a language model, joined by a new projector."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from posttrain.cli.arguments import DryRun, TrustRemoteCode, named_model, print_plan
from posttrain.core.visible_text import visible


def compose_command(
    tower: Annotated[
        str,
        typer.Argument(
            help="Folder or Hub name of a vision tower (clip, siglip, vit, dinov2, efficientnet), or TYPE:SETTING=VALUE"
        ),
    ],
    language: Annotated[str, typer.Argument(help="A run's folder, or any language model.")],
    output: Annotated[Path, typer.Option(help="Folder for the model.")],
    layer: Annotated[int | None, typer.Option(help="Layer of the tower: -2 is the last but one.")] = None,
    chat_template: Annotated[str | None, typer.Option(help="File of a chat template, for a model without one.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the new weights.")] = 0,
    trust_remote_code: TrustRemoteCode = False,
    dry_run: DryRun = False,
) -> None:
    """Join a vision tower and a language model by a new projector, to be trained on rows with images."""
    if ":" not in tower:  # TYPE:SETTING=VALUE is made here
        named_model(tower, "cpu", trust_remote_code)
    config = named_model(language, "cpu", trust_remote_code)
    from posttrain.models.compose import compose, plan_composed

    config = config.model_copy(update={"chat_template": chat_template})
    if dry_run:
        from posttrain.runs.dry_run import model_line

        print_plan([model_line(config), *plan_composed(tower, config, output, layer)])
        return
    made = compose(tower, config, output, seed, layer)
    for name, count in made.items():
        typer.echo(f"{name.replace('_', ' '):<12} {count:,}")
    typer.echo(visible(f"wrote        {output}"))
