"""Write a recipe with comments from five answers: model, data, goal, hardware, time.

The method follows from the goal and the kind of the rows, weights or adapters from the memory planner, batch and epochs
from the number of rows, the longest sequence from their lengths, the steps from the time that there is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from posttrain.config import Recipe
from posttrain.core.errors import RecipeError
from posttrain.models.loading import context_length
from posttrain.recipe.documents import parse_document, parse_value
from posttrain.runs.data_look import DataLook, look_at_data
from posttrain.runs.memory_plan import MemoryPlan, plan_memory, read_stages
from posttrain.trainer.stage import Stage

GOALS = {
    "answer": "answer as the rows do (SFT)",
    "prefer": "prefer the better answers (DPO; KTO of single ones)",
    "score": "a reward model that scores answers",
    "reason": "find right answers (GRPO)",
    "read": "know the documents (continued pretraining)",
}
METHOD_OF = {
    ("answer", "chats"): "sft",
    ("answer", "exchanges"): "sft",
    ("answer", "pairs"): "sft",
    ("answer", "answers"): "sft",
    ("answer", "classes"): "sft",
    ("prefer", "pairs"): "dpo",
    ("prefer", "thumbs"): "kto",
    ("score", "pairs"): "reward_model",
    ("reason", "answers"): "grpo",
    ("read", "documents"): "pretrain",
}
"""(goal, kind of rows) -> method. The first goal of a kind is its default, but for those below."""
DEFAULT_GOAL = {"pairs": "prefer", "answers": "reason"}
LEARNING_RATES = {
    "sft": (2e-5, 2e-4),
    "dpo": (1e-6, 2e-5),
    "kto": (1e-6, 2e-5),
    "reward_model": (1e-5, 1e-4),
    "grpo": (1e-6, 2e-5),
    "pretrain": (2e-5, 2e-4),
}
"""Peak rates of (every weight, adapters): those of the recipes that ship, or of the methods' papers."""
GOALS_OF = {method: GOALS[goal][:1].upper() + GOALS[goal][1:] for (goal, _), method in METHOD_OF.items()}
MANY_ROWS = 2000
"""From so many rows on, every weight is trained if memory allows."""
CUT_ABOVE = 2
"""A longest row above this multiple of the 99th percentile is cut."""
GPU_FLOPS = ((70, 200e12), (20, 40e12), (0, 15e12))
"""(GiB at least, FLOP/s that training is assumed to reach on such a card; an H100 reached 318e12: gpu-h100.md)."""
CPU_SHARE = 0.7
"""Share of the rate of matrix products that training reaches on a CPU (benchmarks/sft.py)."""
PROMPTS, GROUP, RL_STEPS, ANSWER_TOKENS = 16, 8, 100, 256


@dataclass(frozen=True)
class Wishes:
    """Hold the five answers.

    Attributes:
        model: Source of the model.
        data: Source of the rows.
        goal: A key of `GOALS`. None: the usual one of the rows.
        gpu_gib: Memory of a GPU. None: this machine.
        seconds: Longest training. None: any.
        flops: FLOP/s of matrix products on this machine's CPU.
    """

    model: str
    data: str
    goal: str | None = None
    gpu_gib: float | None = None
    seconds: float | None = None
    flops: float = 100e9


@dataclass(frozen=True)
class RecipeDraft:
    """Hold the recipe's text, and what was found, in lines; those to be warned of begin with `!`."""

    text: str
    notes: list[str]


@dataclass(frozen=True)
class _Choice:
    """Hold what is decided: `adapter`, `bits` and `checkpointing` by memory, `steps` (None: epochs) by time.

    bad: rows that can't be used.
    """

    method: str
    look: DataLook
    lengths: Sequence[int] = ()
    bad: int = 0
    adapter: bool = True
    bits: bool = False
    checkpointing: bool = False
    steps: int | None = None
    comments: tuple[str, ...] = ()


def draft_recipe(wishes: Wishes, name: str) -> RecipeDraft:
    """Return a recipe for five answers.

    Args:
        wishes: The answers.
        name: Name of the run.

    Raises:
        RecipeError: The goal does not go with the rows.
        PosttrainError: The model or the rows can't be read.
    """
    look = look_at_data(wishes.data)
    method = method_for(wishes.goal, look)
    first = _recipe(_render(wishes, name, _Choice(method, look, (8,), bad=1)))
    stages = read_stages(first, context_length(first.model))
    (stage,) = stages.values()
    lengths, bad = _lengths(stage), len(stage.entries[0].get("bad_rows") or [])
    whole = method == "pretrain" or (look.rows >= MANY_ROWS and method != "grpo")
    kinds = [*([(False, False)] if whole else []), (True, False), (True, True)]
    chosen, plan = None, None
    for adapter, bits in kinds:
        for checkpointing in (False, True):
            chosen = _Choice(method, look, lengths, bad, adapter, bits, checkpointing)
            plan = plan_memory(_recipe(_render(wishes, name, chosen)), wishes.gpu_gib, stages)
            if not plan.too_large:
                return _finished(wishes, name, chosen, plan)
    assert chosen is not None and plan is not None
    return _finished(wishes, name, chosen, plan)


def method_for(goal: str | None, look: DataLook) -> str:
    """Return the method for a goal and rows. Raises RecipeError if they do not go together, with what does."""
    goal, possible = goal or usual_goal(look), _goals(look)
    if (goal, look.kind) not in METHOD_OF:
        needed = sorted({kind for g, kind in METHOD_OF if g == goal})
        raise RecipeError(
            f"goal {goal!r} needs rows of kind {' or '.join(needed) or 'none'}, and {look.notes[0]}. These go with "
            f"{', '.join(possible)} (docs/data.md has the columns of each kind)"
        )
    return METHOD_OF[goal, look.kind]


def usual_goal(look: DataLook) -> str:
    """Return what rows of this kind are usually for."""
    return DEFAULT_GOAL.get(look.kind, _goals(look)[0])


def _goals(look: DataLook) -> list[str]:
    return [goal for goal, kind in METHOD_OF if kind == look.kind]


def _lengths(stage: Stage) -> list[int]:
    """Return tokens of rows (of pairs: of the longer answer), or of prompts where the stage samples."""
    units = stage.workload().units
    lengths = [max(len(sample) for sample in unit) for unit in units]
    return lengths or [len(q.tokens) for q in getattr(stage.data[0][1], "items", ())] or [1]


def _finished(wishes: Wishes, name: str, chosen: _Choice, plan: MemoryPlan) -> RecipeDraft:
    """Return the draft, with steps for the time that there is, and what it takes in comments."""
    where = f"a GPU of {wishes.gpu_gib:g} GiB" if wishes.gpu_gib is not None else f"this machine ({plan.device})"
    peak = plan.training[0].peak
    fits = "" if not plan.too_large else f"! it does not fit into {where}: take a smaller model, or shorter rows. "
    mean = float(np.mean(chosen.lengths))
    steps = _steps(chosen)
    each, how = _step_seconds(wishes, chosen, plan, mean)
    most = None if wishes.seconds is None else max(1, int(wishes.seconds / each))
    cut = most is not None and most < steps
    percentiles = [f"{q}%: {np.percentile(chosen.lengths, q):,.0f}" for q in (50, 95, 99)]
    unit = "tokens a prompt" if chosen.method == "grpo" else "tokens a row"
    comments = (
        *chosen.look.notes,
        f"{unit}: {', '.join(percentiles)}, longest {max(chosen.lengths):,}",
        f"{fits}memory: about {peak / 1e9:.1f} GB of {plan.room / 1e9:.1f} on {where}",
        f"time: about {_span(each * (most if cut and most else steps))} of training, {how}"
        + (f"; {steps:,} steps would take {_span(each * steps)}" if cut else ""),
    )
    text = _render(wishes, name, replace(chosen, steps=most if cut else None, comments=comments))
    _recipe(text)
    return RecipeDraft(text, list(comments))


def _step_seconds(wishes: Wishes, chosen: _Choice, plan: MemoryPlan, mean: float) -> tuple[float, str]:
    """Return about how long a step takes, and what that assumes.

    FLOPs a token and weight: 6, with adapters 4; 2 more for recomputed layers and for a reference; 8 in RL.
    """
    if plan.device == "cuda":
        gib = wishes.gpu_gib if wishes.gpu_gib is not None else plan.room / 2**30
        rate = next(rate for least, rate in GPU_FLOPS if gib >= least)
        how = f"if the card trains at {rate / 1e12:g} TFLOP/s"
    else:
        rate, how = CPU_SHARE * wishes.flops, "by the matrix products measured here"
    if chosen.method == "grpo":
        tokens, work = PROMPTS * GROUP * (mean + ANSWER_TOKENS), 8
    else:
        tokens = _batch(chosen) * mean * (2 if chosen.method in ("dpo", "reward_model") else 1)
        work = (4 if chosen.adapter else 6) + 2 * chosen.checkpointing + 2 * (chosen.method in ("dpo", "kto"))
    return work * plan.shape.parameters * tokens / rate, how


def _span(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _batch(chosen: _Choice) -> int:
    rows = chosen.look.rows
    return 8 if rows < 500 else 16 if rows < 20_000 else 32  # few rows: an epoch has enough steps all the same


def _epochs(chosen: _Choice) -> int:
    return 3 if chosen.method == "sft" and chosen.look.rows < 20_000 else 1


def _steps(chosen: _Choice) -> int:
    if chosen.method == "grpo":
        return RL_STEPS
    return max(1, -(-chosen.look.rows * _epochs(chosen) // _batch(chosen)))


def _recipe(text: str) -> Recipe:
    return Recipe.model_validate(parse_document(text, "recipe").data)


# ------------------------------------------------------------------------------------------------------------- writing


def _render(wishes: Wishes, name: str, chosen: _Choice) -> str:
    """Return the text of a recipe."""
    written = [f"# {line}" for line in (f"{GOALS_OF[chosen.method]}; written by posttrain new.", *chosen.comments)]
    written += [f"#   posttrain inspect {name}.yaml     # what the model reads, and which tokens have a loss"]
    written += [f"#   posttrain run {name}.yaml         # with --dry-run: rows, steps, memory, files, and no run"]
    told = _value(f"{GOALS_OF[chosen.method]}: {wishes.data}")
    written += [f"name: {name}", f"description: {told}", "", "model:", f"  source: {_value(wishes.model)}"]
    if chosen.bits:
        written += _aligned([("  quantization: nf4", "4 bits a weight (QLoRA); pip install 'posttrain[quantized]'")])
    written += ["", "seed: 0", "", "stages:", *_aligned(_stage_lines(chosen))]
    if chosen.look.kind == "classes":
        written += ["", "evaluate:", *_aligned(_choice_lines(chosen))]
    return "\n".join(written) + "\n"


def _stage_lines(chosen: _Choice) -> Iterator[tuple[str, str]]:
    """Yield (line, comment) of the stage."""
    method = chosen.method
    yield f"  - method: {method}", ""
    yield f"    name: {'rl' if method == 'grpo' else method}", ""
    yield from _rl_lines(chosen) if method == "grpo" else _row_lines(chosen)
    if chosen.adapter:
        yield "    adapter:", "leave it out to train every weight"
        yield "      kind: lora", ""
        yield "      r: 16", "rank"
        yield "      alpha: 32", "scale: alpha / r"
        if chosen.bits:
            yield "    merge: false", "keep the adapter alone: merged, the weights are full ones, and take their memory"
    rate = LEARNING_RATES[method][chosen.adapter]
    yield "    optimizer:", ""
    yield f"      lr: {rate:.0e}".replace("e-0", "e-"), "adapters take ten times the rate of every weight, or more"
    if method != "grpo":
        yield "      schedule: cosine", ""
        yield "      warmup: 0.05", "the first 5% of the steps"
    if chosen.checkpointing:
        yield "    systems:", ""
        yield "      activation_checkpointing: true", "less memory, a third more time"


def _row_lines(chosen: _Choice) -> Iterator[tuple[str, str]]:
    look, longest = chosen.look, max(chosen.lengths)
    yield "    data:", ""
    yield from _source_lines(look)
    usual = int(np.percentile(chosen.lengths, 99))
    if longest > CUT_ABOVE * usual and chosen.method == "sft":
        yield f"      max_tokens: {-(-usual // 64) * 64}", f"99% of the rows are shorter; the longest has {longest:,}"
        yield "      on_long: truncate", "cut at the end, and counted; bad_row stops instead"
    if chosen.method == "sft" and look.kind == "chats":
        yield "      loss_on: assistant", "every assistant turn; completion: only the last one"
    yield "      shuffle_seed: 0", ""
    if chosen.bad:
        yield "      on_bad_row: skip", f"{chosen.bad:,} rows can't be used: posttrain inspect says why"
    if look.kind == "classes":
        yield f"      rows: [0, {look.rows - _measured(look)}]", "the rest is measured below"
    if look.rows >= 40:
        yield "    held_out: 0.05", "of the rows: measured before, during and after training, never trained on"
    if chosen.method == "pretrain":
        yield f"    sequence_length: {512 if longest < 4096 else 2048}", "documents are cut into these, without loss"
    if chosen.method in ("dpo", "kto"):
        yield "    beta: 0.1", "lower: farther from the initial model"
    yield f"    batch_size: {_batch(chosen)}", "rows a step"
    if chosen.steps is None:
        yield f"    epochs: {_epochs(chosen)}", "passes over the rows"
    else:
        yield f"    max_steps: {chosen.steps}", f"what the time allows; {_steps(chosen):,} are {_epochs(chosen)} epochs"


def _source_lines(look: DataLook) -> Iterator[tuple[str, str]]:
    for key, value in {"source": look.source, **look.settings}.items():
        yield f"      {key}: {_value(value)}", ""


def _rl_lines(chosen: _Choice) -> Iterator[tuple[str, str]]:
    look, measured = chosen.look, _measured(chosen.look)
    data = f"source: {_value(look.source)}, shuffle_seed: 0" + (", on_bad_row: skip" if chosen.bad else "")
    yield f"    problems: {{kind: rows, data: {{{data}, rows: [0, {look.rows - measured}]}}}}", ""
    yield "    held_out:", ""
    yield f"      problems: {{kind: rows, data: {{{data}, rows: [{look.rows - measured}, {look.rows}]}}}}", ""
    yield "      every: 20", "steps"
    yield f"    rewards: [{{kind: {look.rewards}, name: right}}]", "1 or 0; math reads formulas: docs/rewards.md"
    yield "    sampler:", ""
    yield f"      max_tokens: {ANSWER_TOKENS}", "raise it if answers are cut off (completions/clipped_ratio)"
    yield f"    prompts_per_step: {min(PROMPTS, look.rows - measured)}", ""
    yield f"    group_size: {GROUP}", "answers to each prompt, which are compared"
    yield f"    steps: {chosen.steps or RL_STEPS}", ""


def _choice_lines(chosen: _Choice) -> Iterator[tuple[str, str]]:
    look = chosen.look
    yield "  - name: labels", ""
    yield "    kind: choice", "the likeliest of the labels, before and after"
    yield "    data:", ""
    yield from _source_lines(look)
    yield "      shuffle_seed: 0", ""
    yield f"      rows: [{look.rows - _measured(look)}, {look.rows}]", "none of them is trained on"
    yield f"    choices: {_value(list(look.classes))}", ""
    yield "    max_new_tokens: 8", ""


def _measured(look: DataLook) -> int:
    """Return how many rows are set apart to be measured: a tenth, at most 400."""
    return min(400, max(1, look.rows // 10))


def _value(value: Any) -> str:
    """Return a value as YAML on one line; texts plain where they stay texts."""
    if isinstance(value, str) and value and all(c.isalnum() or c in "/._-" for c in value):
        if parse_value(value) == value:
            return value
    return json.dumps(value, ensure_ascii=False)


def _aligned(lines: Iterator[tuple[str, str]] | Sequence[tuple[str, str]], column: int = 34) -> list[str]:
    return [f"{line:<{column - 1}} # {comment}" if comment else line for line, comment in lines]
