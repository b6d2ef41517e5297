"""The runs of a sweep: combinations of settings times seeds, all checked before one of them starts (no torch)."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from posttrain.config import NAME, Recipe
from posttrain.core.errors import ModelError, RecipeError
from posttrain.recipe.machine_checks import check_machine
from posttrain.recipe.parsing import load_recipe, split_lists

RANGE = re.compile(r"(uniform|log)\(\s*([^,()]+?)\s*,\s*([^,()]+?)\s*\)")
"""A range that random search draws from; log: the logarithm is uniform."""
MAX_RUNS = 1000
"""Most runs of one sweep."""
MAX_SHOWN = 5
"""Most combinations whose problems one message lists."""
SET_BY_SWEEP = {
    "name": "each run gets a name",
    "output": "runs go into the sweep's folder",
    "seed": "use --seeds 0,1,2",
}
"""Settings that a sweep sets itself."""


@dataclass(frozen=True)
class Combination:
    """Hold one choice of settings.

    Attributes:
        label: The settings that differ within the sweep, as `lr=0.0001, batch_size=8`.
        values: Value of each of them as text, by its short name.
        runs: Recipe of its run with each seed, by seed.
    """

    label: str
    values: dict[str, str]
    runs: dict[int, Recipe]


@dataclass(frozen=True)
class SweepPlan:
    """Hold what a sweep runs.

    Attributes:
        folder: The sweep's folder; each run is `folder`/runs/NAME.
        axes: Full key of each setting that is varied, by its short name.
        combinations: In the order in which they run.
        seeds: Seeds of each combination.
    """

    folder: Path
    axes: dict[str, str]
    combinations: list[Combination]
    seeds: list[int]


def plan_sweep(
    recipe: str, arguments: Sequence[str], seeds: Sequence[int] | None, draws: int | None, folder: Path | None
) -> SweepPlan:
    """Return the runs of a sweep, every one of them checked.

    A grid has every combination of the listed values, the last setting varying fastest. Random search draws each
    setting independently (from its values with equal probability, or from its range), with a generator of seed 0,
    and leaves out combinations that came before; a larger number of draws begins with the same combinations.

    Args:
        recipe: Name or path of the recipe.
        arguments: ``key=value`` for all runs, ``key=[a, b]`` for values to try, and ``key=uniform(low, high)`` or
            ``key=log(low, high)`` for ranges to draw from.
        seeds: Seeds of each combination. None: the recipe's own.
        draws: Number of combinations that are drawn. None: the whole grid.
        folder: The sweep's folder. None: the recipe's output/NAME-sweep.

    Raises:
        RecipeError: Every problem of every combination, as far as a message holds them.
        ModelError: Models have to come from the Hub, which can't be reached.
    """
    fixed, axes = _read_arguments(recipe, arguments)
    if draws is None and (ranges := [key for key, values in axes.items() if isinstance(values, tuple)]):
        raise RecipeError(f"{ranges[0]} is a range, which only a random search can draw from: add --random N")
    chosen = list(_grid(axes) if draws is None else _drawn(axes, draws))
    names = _short_names(list(axes))
    if len(chosen) * len(seeds or "1") > MAX_RUNS:
        raise RecipeError(
            f"{len(chosen):,} combinations with {len(seeds or '1')} seeds are more than the {MAX_RUNS:,} runs that a "
            "sweep may have: try fewer values, or draw some combinations with --random N"
        )
    combinations, problems = [], []
    for overrides in chosen:
        values = {names[key]: _shown(text) for key, _, text in (o.partition("=") for o in overrides)}
        label = ", ".join(f"{name}={value}" for name, value in values.items())
        runs: dict[int, Recipe] = {}
        try:
            base = load_recipe(recipe, [*fixed, *overrides])
            folder = Path(base.output) / f"{base.name}-sweep" if folder is None else folder
            for seed in [base.seed] if seeds is None else seeds:
                own = [f"name={_run_name(values, seed)}", f"output={json.dumps(str(folder / 'runs'))}", f"seed={seed}"]
                runs[seed] = load_recipe(recipe, [*fixed, *overrides, *own])
            check_machine(base)
        except (RecipeError, ModelError) as error:
            problems.append(f"{label}: {error}")
        combinations.append(Combination(label, values, runs))
    if problems or folder is None:
        shown = "\n".join(problems[:MAX_SHOWN])
        more = f"\nand {len(problems) - MAX_SHOWN:,} more" if len(problems) > MAX_SHOWN else ""
        raise RecipeError(
            f"{len(problems)} of {len(chosen)} combinations can't run, and nothing was started:\n{shown}{more}"
        )
    return SweepPlan(folder, {names[key]: key for key in axes}, combinations, list(combinations[0].runs))


SweepAxis = list[str] | tuple[str, float, float]
"""Overrides to choose from, or (kind, low, high) of a range."""


def _read_arguments(recipe: str, arguments: Sequence[str]) -> tuple[list[str], dict[str, SweepAxis]]:
    """Return the overrides of all runs, and what is varied, by key."""
    fixed: list[str] = []
    axes: dict[str, SweepAxis] = {}
    seen = set[str]()
    plain = [a for a in arguments if not RANGE.fullmatch(a.partition("=")[2].strip())]
    several = dict(zip(plain, split_lists(recipe, plain), strict=True))
    for argument in arguments:
        key, _, text = argument.partition("=")
        key = key.strip()
        found = RANGE.fullmatch(text.strip())
        varied = found is not None or len(several[argument]) > 1
        if key in seen:
            raise RecipeError(f"{key} is given twice: keep one")
        seen.add(key)
        if key == "seed" or (varied and key in SET_BY_SWEEP):
            raise RecipeError(f"{argument}: a sweep does not vary {key}; {SET_BY_SWEEP[key]}")
        if found is not None:
            axes[key] = _range(argument, *found.groups())
        elif varied:
            axes[key] = list(dict.fromkeys(several[argument]))
        else:
            fixed += several[argument]
    if not axes:
        raise RecipeError(
            "nothing to sweep over: list values, as in stages.sft.optimizer.lr=[1e-5,1e-4] (quoted where the shell "
            "reads brackets); a setting that is a list itself takes a list of lists, [[0.9,0.99],[0.9,0.999]]"
        )
    return fixed, axes


def _range(argument: str, kind: str, *ends: str) -> tuple[str, float, float]:
    try:
        low, high = map(float, ends)
    except ValueError:
        low = high = math.nan
    if not (math.isfinite(low) and math.isfinite(high) and low < high and (kind == "uniform" or low > 0)):
        expected = "two numbers, the lower one first" + (", both above 0" if kind == "log" else "")
        raise RecipeError(f"{argument}: expected {expected}")
    return kind, low, high


def _grid(axes: dict[str, SweepAxis]) -> Iterator[list[str]]:
    values = [axis for axis in axes.values() if isinstance(axis, list)]
    if math.prod(map(len, values)) > 100 * MAX_RUNS:
        raise RecipeError(
            f"the grid has {math.prod(map(len, values)):,} combinations: draw some of them with --random N"
        )
    return map(list, itertools.product(*values))


def _drawn(axes: dict[str, SweepAxis], draws: int) -> Iterator[list[str]]:
    """Yield distinct combinations, drawn one after the other."""
    there = math.prod(len(a) if isinstance(a, list) else draws for a in axes.values())
    if there < draws:
        raise RecipeError(f"--random {draws}: the grid has {there} combinations in all; leave --random out")
    generator, seen = random.Random(0), set[tuple[str, ...]]()
    for _ in range(1000 * draws):
        one = tuple(_draw(generator, key, axis) for key, axis in axes.items())
        if one not in seen:
            seen.add(one)
            yield list(one)
        if len(seen) == draws:
            return
    raise RecipeError(f"--random {draws}: only {len(seen)} different combinations were found; widen the ranges")


def _draw(generator: random.Random, key: str, axis: SweepAxis) -> str:
    if isinstance(axis, list):
        return axis[generator.randrange(len(axis))]
    kind, low, high = axis
    value = (
        math.exp(generator.uniform(math.log(low), math.log(high))) if kind == "log" else generator.uniform(low, high)
    )
    return f"{key}={float(f'{value:.4g}')!r}"


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    """Return the shortest end of each dotted key that no other one has."""
    out = {}
    for key in keys:
        parts = key.split(".")
        ends = [".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1)]
        out[key] = next(e for e in ends if not any(f".{o}".endswith(f".{e}") for o in keys if o != key))
    return out


def _shown(text: str) -> str:
    """Return a value without the quotes that a text has in JSON."""
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' else text


def _run_name(values: dict[str, str], seed: int) -> str:
    """Return the name of a run: its settings and its seed, shortened to what a folder's name takes."""
    full = "_".join(f"{name}-{value}" for name, value in (*values.items(), ("seed", str(seed))))
    if re.fullmatch(NAME, full):
        return full
    digest = hashlib.sha256(full.encode()).hexdigest()[:8]
    return f"{re.sub('[^A-Za-z0-9_.-]+', '-', full).strip('-.')[:80]}-{digest}"
