"""Tell what a command would do, as (subject, text) lines: from settings, rows and the model's configuration alone.

No weights are read. Nothing is written but caches: of prepared rows, and of a GGUF file that was never opened before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from posttrain.config import METHOD_KIND, EpochsConfig, EvaluationConfig, ModelConfig, Recipe, StageConfig, references
from posttrain.core.epoch_order import epoch_size
from posttrain.eval.tasks import task_data
from posttrain.models.loading import context_length, load_tokenizer, pick_device, pick_dtype
from posttrain.models.model_shape import ModelShape, model_shape
from posttrain.recipe.sweep_plan import SweepPlan
from posttrain.runs.memory_plan import WAYS, MemoryPlan, plan_memory, read_stages
from posttrain.runs.run_folder import describe_folder, run_path
from posttrain.trainer.loop import steps_for
from posttrain.trainer.stage import Stage

DryRunLines = Iterator[tuple[str, str]]


def model_line(config: ModelConfig, shape: ModelShape | None = None) -> tuple[str, str]:
    """Return the line on a model: its type, its size, and how it is opened here."""
    shape = shape or model_shape(config)
    device = pick_device(config.device)
    dtype = str(pick_dtype(config.dtype, device)).removeprefix("torch.")
    bits = f", {config.quantization.kind}" if config.quantization is not None else ""
    return (
        "model",
        f"{config.source}: {shape.kind}, {shape.parameters / 1e6:,.1f} M parameters, {dtype}{bits}, {device}",
    )


def planned_run(recipe: Recipe, folder: Path | None, fresh: bool = False) -> DryRunLines:
    """Yield what `run` would do: stages with rows, steps and memory, evaluations with items, and the files.

    Args:
        recipe: The recipe.
        folder: Folder of the run. None: the recipe's output/name.
        fresh: An earlier run in the folder is set aside.

    Raises:
        PosttrainError: What the run would end with before its first step.
    """
    path = run_path(folder if folder is not None else Path(recipe.output) / recipe.name)
    state = describe_folder(path, recipe, fresh)
    context = context_length(recipe.model)
    stages = read_stages(recipe, context)
    plan = plan_memory(recipe, prepared=stages)
    yield model_line(recipe.model, plan.shape)
    for (name, stage), number in zip(recipe.in_order(), range(len(recipe.stages)), strict=False):
        yield name, f"{_stage(stage, stages.get(name))}; {_memory(plan, number)}"
        yield "", f"writes {path / 'stages' / name / stage.makes}"
    if recipe.rounds > 1:
        yield "rounds", f"{recipe.rounds} times these stages, each from the last model"
    trains = any(stage.makes == "model" for stage in recipe.stages)
    yield from planned_evaluations(recipe.evaluate, recipe.model, ", before and after" if trains else "")
    for line in plan.too_large:
        yield "!", f"{line.name} takes more than the {plan.room / 1e9:.1f} GB that there are: {WAYS}"
    kept = [*(["stages/"] if recipe.stages else []), *(["evaluations/"] if recipe.evaluate else [])]
    kept += ["model/"] if trains else []
    yield "folder", f"{path}: {state}"
    yield "writes", ", ".join(["recipe.yaml", "manifest.json", *kept, "report.html"])


def planned_evaluations(tasks: Sequence[EvaluationConfig], model: ModelConfig, when: str = "") -> DryRunLines:
    """Yield a line for each evaluation: its kind, and the number of its items.

    Args:
        tasks: The evaluations.
        model: The model, whose tokenizer and context decide which items fit.
        when: What follows each of them.
    """
    tokenizer, context = (load_tokenizer(model), context_length(model)) if tasks else (None, None)
    for task in tasks:
        if asks := references(task):
            count = f"items that stage {', '.join(asks)} makes"
        else:
            data: Any = task_data(task, tokenizer, context)
            count = f"{getattr(data, 'stats', {}).get('used', len(getattr(data, 'items', ()))):,} items"
        yield "evaluate", f"{task.name} ({task.kind}): {count}{when}"


def planned_sweep(plan: SweepPlan) -> DryRunLines:
    """Yield what `sweep` would do: its runs, and the first of them in full."""
    runs = [(c.label, recipe) for c in plan.combinations for recipe in c.runs.values()]
    yield "sweep", f"{len(runs)} runs: {len(plan.combinations)} combinations, seeds {', '.join(map(str, plan.seeds))}"
    for label, recipe in runs:
        path = Path(recipe.output) / recipe.name
        yield "run", f"{label}, seed {recipe.seed}: {path}: {describe_folder(path, recipe, False)}"
    yield "first", f"{runs[0][0]}, seed {runs[0][1].seed}:"
    yield from planned_run(runs[0][1], None)
    yield "writes", f"{plan.folder}: sweep.json, results, sweep.html"


def _stage(config: StageConfig, stage: Stage | None) -> str:
    """Return a sentence on a stage: its method, rows and steps."""
    title = METHOD_KIND.load(config.method).title if stage is None else stage.title
    if stage is None:
        return f"{title or config.method}, on what stage {', '.join(references(config))} makes"
    work = ""
    if isinstance(config, EpochsConfig) and stage.rows:
        count = epoch_size(len(stage.rows), stage.weights)
        work = stage.plan(steps_for(count, config.batch_size, config.epochs, config.max_steps)[0])
    elif (steps := getattr(config, "steps", None)) is not None:
        each = f"{getattr(config, 'prompts_per_step', 1)} prompts with {getattr(config, 'group_size', 1)} completions"
        work = f"{steps:,} steps of {each}"
    read = [f"{e.get('used', e.get('rows', 0)):,} rows" for e in stage.entries[:1]] if not work else []
    return ": ".join([title or config.method, ", ".join([work, *read] if work else read) or "no rows"])


def _memory(plan: MemoryPlan, number: int) -> str:
    line = plan.training[number]
    trained = f"trains {line.trained / 1e6:,.1f} M parameters, " if line.trained else ""
    return f"{trained}about {line.peak / 1e9:.2f} of {plan.room / 1e9:.1f} GB"
