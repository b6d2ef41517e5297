"""Arguments that several commands have, and the console that they print to."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from posttrain.config import ModelConfig


def recipe_names(incomplete: str) -> list[str]:
    """Return the recipes of posttrain that begin like this; none: a shell completes files."""
    folder = Path(__file__).parents[1] / "recipes"  # no import of pydantic while a person waits
    return sorted(p.stem for p in folder.glob("*.yaml") if p.stem.startswith(incomplete))


RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="Name of a recipe of posttrain, or a YAML file.", autocompletion=recipe_names
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings at any depth: stages.sft.optimizer.lr=1e-4"),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done and written; write nothing.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code shipped with it.")]


def named_model(source: str, device: str, trust_remote_code: bool) -> ModelConfig:
    """Return the settings of a model that is named on the command line, once it is known that it can be had.

    Args:
        source: Hub name, folder, file or a run's folder.
        device: Where it is opened.
        trust_remote_code: Whether code that ships with it is run.

    Raises:
        ModelError: It has to come from the Hub, which can't be reached.
    """
    from posttrain.config import ModelConfig
    from posttrain.core.hub import check_hub
    from posttrain.recipe.model_sources import find_model

    if find_model(source).kind == "hub":
        check_hub([source])
    return ModelConfig(source=source, device=device, trust_remote_code=trust_remote_code)


def print_plan(lines: Iterable[tuple[str, str]]) -> None:
    """Print what --dry-run found: (subject, text) pairs, and that nothing was done."""
    console = make_console()
    for subject, text in (*lines, ("dry run", "nothing was written")):
        console.print(f"{subject:<10} {text}", soft_wrap=True, markup=False, highlight=False)


def make_console() -> Console:
    """Return the console that commands print to."""
    from posttrain.core.console import VisibleConsole

    return VisibleConsole()
