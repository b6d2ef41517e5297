"""Arguments that several commands have, and the console that they print to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a recipe of posttrain, or a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings at any depth: stages.sft.optimizer.lr=1e-4"),
]


def make_console() -> Console:
    """Return the console that commands print to."""
    from posttrain.core.console import VisibleConsole

    return VisibleConsole()
