"""posttrain memory: tell the memory of a recipe's stages, and of serving its model, before a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from posttrain.cli.arguments import Overrides, RecipeName, make_console

if TYPE_CHECKING:
    from rich.table import Table

    from posttrain.runs.memory_plan import MemoryPlan, StageMemory

UNIT = 1e9
"""Tables are in GB."""


def memory_command(
    recipe: RecipeName,
    overrides: Overrides = None,
    gpu: Annotated[
        float | None, typer.Option(min=0.1, help="GiB of a GPU to plan for. [default: this machine]")
    ] = None,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences that are served at the same time.")] = 1,
    tokens: Annotated[int, typer.Option(min=1, help="Longest sequence that is served, in tokens.")] = 2048,
    int8_cache: Annotated[
        bool, typer.Option("--int8-cache", help="Serve with keys and values in int8, as sampler.kv_cache: int8 does.")
    ] = False,
) -> None:
    """Tell the memory of training and serving, from the model's configuration and the rows: no weights are read.

    The exit code is 1 if a stage takes more than there is.
    """
    from posttrain.recipe.machine_checks import check_machine
    from posttrain.recipe.parsing import load_recipe

    checked = load_recipe(recipe, overrides or ())
    check_machine(checked)
    from posttrain.runs.memory_plan import WAYS, plan_memory

    plan = plan_memory(checked, gpu, sequences=sequences, tokens=tokens, kv_cache="int8" if int8_cache else None)
    out = make_console()
    shape = plan.shape
    out.print(
        f"{checked.model.source}: {shape.kind}, {shape.parameters / 1e6:,.1f} M parameters, {shape.layers} layers, "
        f"width {shape.hidden:,}, vocabulary {shape.vocabulary:,}",
        soft_wrap=True,
    )
    for line in plan.training:
        out.print(training_table(line))
        for note in line.notes:
            out.print(f"  {note}", soft_wrap=True)
    out.print(serving_table(plan))
    where = f"a GPU of {gpu:g} GiB" if gpu is not None else f"this machine ({plan.device})"
    for line in plan.too_large:
        out.print(
            f"! {line.name} takes {line.peak / UNIT:.2f} GB, and {where} has {plan.room / UNIT:.2f}: {WAYS}",
            soft_wrap=True,
        )
    if plan.too_large:
        raise typer.Exit(1)
    out.print(f"all stages fit into {where}, {plan.room / UNIT:.2f} GB", soft_wrap=True)


def training_table(line: StageMemory) -> Table:
    """Return the table of a stage: what is held while a step is taken, and the peak of each phase, by format."""
    from rich.table import Table

    columns = {"this recipe": line.own, **line.formats}
    table = Table(title=f"{line.name}: memory in GB", caption=_work(line))
    table.add_column("held")
    for name in columns:
        table.add_column({"nf4": "nf4 (QLoRA)"}.get(name, name), justify="right")
    names = list(dict.fromkeys(name for memory in columns.values() for name in memory.parts))
    for name in names:
        table.add_row(name, *(_gb(memory.parts.get(name)) for memory in columns.values()))
    table.add_section()
    for name in dict.fromkeys(name for memory in columns.values() for name in memory.phases):
        table.add_row(f"while: {name}", *(_gb(memory.phases.get(name)) for memory in columns.values()))
    table.add_section()
    table.add_row("peak", *(_gb(memory.peak) for memory in columns.values()), style="bold")
    return table


def _work(line: StageMemory) -> str:
    if not line.tokens:
        return "trains nothing"
    return (
        f"{line.trained / 1e6:,.1f} M parameters are trained; the largest micro-batch has {line.tokens:,} tokens, "
        f"{line.targets:,} of them with a loss"
    )


def serving_table(plan: MemoryPlan) -> Table:
    """Return the table of serving by format."""
    from rich.table import Table

    sequences, tokens = plan.served
    table = Table(title=f"serving {sequences} sequence{'s' * (sequences != 1)} of {tokens:,} tokens: memory in GB")
    cache = "keys and values" + (f" ({plan.kv_cache})" if plan.kv_cache else "")
    for name in ("weights in", "weights", cache, "computing", "files, libraries", "sum"):
        table.add_column(name, justify="left" if name == "weights in" else "right")
    for name, memory in plan.serving.items():
        table.add_row(name, *(_gb(v) for v in (memory.weights, memory.cache, memory.work, memory.beside, memory.total)))
    return table


def _gb(value: int | None) -> str:
    return "–" if value is None else f"{value / UNIT:.2f}"
