"""Print the data of a recipe, for `posttrain inspect`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from posttrain.config import EpochsConfig, Recipe, RewardsConfig, StageConfig, references
from posttrain.core.epoch_order import epoch_size
from posttrain.core.imports import is_import_path
from posttrain.core.types import Sample
from posttrain.core.visible_text import visible
from posttrain.data.bad_rows import SHOWN_ROWS
from posttrain.data.human_feedback import Answers
from posttrain.data.learnt_turns import NOTES
from posttrain.data.marked_text import BRACKETS, render_terminal
from posttrain.data.mixing import row_weights
from posttrain.data.preference_rows import PreparedPairs, PreparedUnpaired
from posttrain.data.prompts import PromptSet
from posttrain.data.sample_store import SampleStore
from posttrain.eval.tasks import task_data
from posttrain.methods.data.instruction_quality import InstructionPreview
from posttrain.models.loading import context_length, describe_vocabulary, load_tokenizer, pick_device
from posttrain.recipe.machine_checks import blocks
from posttrain.report.formatting import plain_text
from posttrain.report.judge_figures import describe_agreement
from posttrain.report.row_quality_view import InstructionQualityView, quality_lines, quality_view
from posttrain.rewards.stack import RewardStack
from posttrain.runs.registry import prepare_stage
from posttrain.trainer.stage import StageContext

FIELD_TITLES = {"unused": "no effect", "passed_on": "passed on", "ignored": "ignored"}
"""Counts of fields that nothing was trained on, and their titles."""
BAR = 40
"""Columns of the histogram's longest bar."""


def print_data(recipe: Recipe, only: str | None, rows: int, out: Console) -> None:
    """Prepare the data of every stage and evaluation and print its counts and first rows.

    Args:
        recipe: The recipe.
        only: Name of one stage or evaluation. None: all.
        rows: Samples, prompts or pairs to print of each.
        out: Console to print to.
    """
    tokenizer, context = load_tokenizer(recipe.model), context_length(recipe.model)
    if note := describe_vocabulary(recipe.model):
        out.print(Text(f"model: {note}"))
    for number, stage in enumerate(recipe.stages):
        if only not in (None, stage.name):
            continue
        asks = references(stage)
        if asks:
            out.rule(f"{stage.name} ({stage.method})")
            out.print(f"reads what stage {', '.join(asks)} will make; posttrain inspect RUN shows it afterwards")
            continue
        _check_rewards(stage, tokenizer)
        prepared = prepare_stage(stage, StageContext(tokenizer, context, evaluations=recipe.evaluate))
        for title, data in prepared.preview(recipe.model, recipe.seed + number):
            out.rule(f"{title} ({stage.method})")
            if isinstance(data, InstructionPreview):
                print_quality(quality_view(title, data.stats), data.rows[:rows], out)
            elif isinstance(data, PromptSet):
                _questions(data, rows, out)
            elif isinstance(data, Answers):
                _answers(data, rows, out)
            else:
                planned = len(prepared.rows) and not title.endswith(" held out")
                trained = stage if isinstance(stage, EpochsConfig) and planned else None
                own_tokens = prepared.context.tokenizer  # with the tokens that the stage adds
                _samples(data, trained, own_tokens, rows, out, recipe.model.device)
    for task in recipe.evaluate:
        if only in (None, task.name):
            out.rule(f"{task.name} (evaluation)")
            if asks := references(task):
                out.print(f"reads what stage {', '.join(asks)} will make")
                continue
            asked = task_data(task, tokenizer, context)
            if isinstance(asked, PromptSet):
                _questions(asked, rows, out)
            else:
                _samples(asked, None, tokenizer, rows, out)


def print_quality(view: InstructionQualityView, rows: Sequence[dict[str, Any]], out: Console) -> None:
    """Print the quality report of instruction rows, and some of them.

    Args:
        view: The report.
        rows: Rows to print.
        out: Console to print to.
    """
    for line in quality_lines(view):
        out.print(Text(visible(line)), soft_wrap=True)
    for i, row in enumerate(rows):
        out.print()
        out.print(Text.assemble((f"row {i + 1}", "bold"), f"  {row['task']}, wording {row['wording']}  {row['place']}"))
        out.print(Text(visible(plain_text(row["prompt"]))), soft_wrap=True)
        out.print(Text(visible(f"→ {row['completion']}")), soft_wrap=True)
    out.print()


def _check_rewards(stage: StageConfig, tokenizer: Any) -> None:
    """Build the rewards of a stage, so that a mistake in one is found now; not those that come from Python."""
    for _, block in blocks(stage):
        if not isinstance(block, RewardsConfig):
            continue
        if all(is_import_path(term.function) for term in block.terms if hasattr(term, "function")):
            RewardStack(block, None, tokenizer, environment=getattr(stage, "environment", None)).close()


def _samples(
    prepared: Any, stage: EpochsConfig | None, tokenizer: Any, rows: int, out: Console, device: str = "auto"
) -> None:
    samples = prepared.samples
    lengths = samples.lengths.tolist() if isinstance(samples, SampleStore) else [len(s) for s in samples]
    _numbers(prepared.stats, lengths, out)
    if stage is not None and lengths:
        unit = "pairs" if isinstance(prepared, PreparedPairs) else "samples"
        sizes = getattr(prepared, "sizes", lengths)
        told = plan(stage, sizes, pick_device(device).type, unit, epoch_size(len(sizes), row_weights(prepared)))
        out.print(f"plan       {told}", soft_wrap=True)
    colours = out.color_system is not None and not out.no_color
    how = "coloured" if colours else "in {} {}".format(*BRACKETS)
    for title, sample in _titled(prepared, rows):
        marked = sum(w != 0 for w in sample.weights)
        what = "of the answer" if title.startswith(("pair", "answer")) else "carry loss"
        out.print()
        out.print(Text.assemble((title, "bold"), f"  {len(sample)} tokens, {marked} {what} ({how})  {sample.source}"))
        out.print(render_terminal(sample, tokenizer, colours), soft_wrap=True)
    out.print()


def _titled(prepared: Any, rows: int) -> list[tuple[str, Sample]]:
    """Return the samples of the first `rows` rows, each with a title; answers of a pair stay together."""
    if isinstance(prepared, PreparedPairs):
        pairs = enumerate(prepared.labelled(rows))
        return [(f"pair {i}, {label} answer", sample) for i, pair in pairs for label, sample in pair]
    if isinstance(prepared, PreparedUnpaired):
        answers = enumerate(prepared.labelled(rows))
        return [(f"answer {i}, {label}", sample) for i, ((label, sample),) in answers]
    return [(f"sample {i}", sample) for i, sample in enumerate(prepared.samples[:rows])]


def _numbers(stats: dict[str, Any], lengths: Sequence[int], out: Console) -> None:
    for label, value in _facts(stats):
        out.print(f"{label:<10} {value}", soft_wrap=True)
    if lengths:
        out.print("lengths in tokens")
        for line in histogram(lengths):
            out.print(f"  {line}", soft_wrap=True)


def _questions(asked: PromptSet, rows: int, out: Console) -> None:
    """Problems of a reinforcement-learning stage, as the model is asked them."""
    _numbers(asked.stats, [len(q.tokens) for q in asked.items], out)
    for i, q in enumerate(asked.items[:rows]):
        out.print()
        out.print(Text.assemble((f"problem {i}", "bold"), f" {len(q.tokens)} tokens  {q.problem['source']}"))
        out.print(q.text, soft_wrap=True)
        out.print(f"answer     {q.problem['answer']}", soft_wrap=True)
    out.print()


def _answers(answers: Answers, rows: int, out: Console) -> None:
    """Answers with what people said of them: the pairs to be judged, or the thumbs."""
    _numbers(answers.stats, [], out)
    out.print(f"pairs      {len(answers.pairs):,}")
    said = describe_agreement(answers.raters)
    if said:
        out.print(said, soft_wrap=True)
    for i, p in enumerate(answers.pairs[:rows]):
        people = "" if p.human is None else f"  people prefer the first: {p.human:.2f}, margin {p.margin or 0:+.2f}"
        out.print()
        out.print(Text.assemble((f"pair {i}", "bold"), f"  {p.source}{people}"), soft_wrap=True)
        for text in (str(p.prompt), p.a, p.b):
            out.print(f"  {text}", soft_wrap=True)
    out.print()


def _facts(s: dict[str, Any]) -> list[tuple[str, str]]:
    """The manifest's entry of this data, in words."""
    tokens, loss = s.get("tokens", 0), s.get("loss_tokens", 0)
    share = f" ({loss / tokens:.0%})" if tokens else ""
    held_out = f", held out {s['held_out']:,}" if s.get("held_out") else ""
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in (s.get("dropped") or {}).items() if count)
    facts = [
        ("source", str(s.get("source", ""))),
        ("layout", str(s.get("layout", ""))),
        ("rows", f"{s.get('rows', 0):,}, used {s.get('used', 0):,}{held_out}"),
        *(("", describe_source(source)) for source in s.get("sources") or []),
        ("dropped", dropped or "none"),
        ("truncated", f"{s.get('truncated', 0):,}"),
        (
            "tokens",
            f"{tokens:,}, {loss:,} carry loss{share}; median {s.get('median', 0)}, longest {s.get('longest', 0)}",
        ),
    ]
    facts += [(title, fields_in_words(s[key])) for key, title in FIELD_TITLES.items() if s.get(key)]
    for name, number in (s.get("rendering") or {}).items():
        unit = NOTES.get(name, "")
        facts.append(("rendering", f"{name}: {number:,} {unit.removesuffix('s') if number == 1 else unit}".rstrip()))
    if s.get("duplicates"):
        facts.append(("duplicates", f"{s['duplicates']:,} samples are there more than once"))
    if s.get("swapped"):
        facts.append(("swapped", f"{s['swapped']:,} pairs whose probability is below 0.5: answers changed places"))
    if s.get("contradictory"):
        facts.append(("opposites", f"{s['contradictory']:,} rows say the opposite of an earlier one; all are used"))
        facts += [("opposites", which) for which in s["contradictions"]]
    if "desirable" in s:
        facts.append(("labels", f"{s['desirable']:,} good, {s.get('used', 0) - s['desirable']:,} bad"))
    bad_rows = s.get("bad_rows") or []
    facts += [("bad row", f"{bad['file']}:{bad['row']}: {bad['reason']}") for bad in bad_rows[:SHOWN_ROWS]]
    if len(bad_rows) > SHOWN_ROWS:
        facts.append(("bad row", f"and {len(bad_rows) - SHOWN_ROWS:,} more; a run names all of them in bad_rows/"))
    for out in s.get("left_out") or []:
        facts.append(("left out", f"{out['source']}: {out['reason']}"))
    return facts


def describe_source(source: dict[str, Any]) -> str:
    """Return a line about one of several sources: how many of its rows are taken and used."""
    taken = f"{source['rows']:,} of {source['in_source']:,} rows"
    weight = f", weight {source['weight']:g}" if "weight" in source else ""
    return f"{source['source']}: {taken}, used {source['used']:,} (layout {source['layout']}{weight})"


def fields_in_words(counts: dict[str, int]) -> str:
    """Return columns, and fields inside of columns, with the number of rows in which they have a value."""
    inside = {name: n for name, n in counts.items() if "[]." in name}
    columns = {name: n for name, n in counts.items() if name not in inside}
    parts = [("column", columns), ("field", inside)]
    return "; ".join(
        f"{noun}{'s' * (len(named) != 1)} " + ", ".join(f"{name} {n:,}" for name, n in named.items())
        for noun, named in parts
        if named
    )


def histogram(lengths: Sequence[int], bins: int = 8) -> list[str]:
    """Return one line for each bin of equal width: range, count, bar. No lengths give no lines."""
    if not lengths:
        return []
    low, high = min(lengths), max(lengths)
    width = max(1, -(-(high - low + 1) // bins))
    counts = [0] * (1 + (high - low) // width)
    for n in lengths:
        counts[(n - low) // width] += 1
    edges = [(low + i * width, min(high, low + (i + 1) * width - 1)) for i in range(len(counts))]
    pad = len(str(high))
    most = max(counts)
    return [
        f"{a:>{pad}} to {b:>{pad}} {count:>{len(str(most))}} {'█' * -(-BAR * count // most)}".rstrip()
        for (a, b), count in zip(edges, counts, strict=True)
    ]


def plan(
    stage: EpochsConfig, lengths: Sequence[int], device: str, unit: str = "samples", in_epoch: int | None = None
) -> str:
    """Return a sentence on the steps of a stage, and on the micro-batches that the token budget makes of each.

    Args:
        stage: Settings of the stage.
        lengths: Tokens of each sample or pair, before shared prefixes save any.
        device: Type of the device, which decides the default budget.
        unit: What a batch consists of, `samples` or `pairs`.
        in_epoch: Number of them drawn in an epoch. None: each once.
    """
    from posttrain.core.ragged import micro_batches
    from posttrain.trainer.loop import steps_for
    from posttrain.trainer.token_budget import LEAST, cpu_tokens

    front, inserted = (0, 0) if stage.adapter is None else stage.adapter.computed_tokens()
    default = cpu_tokens(front) if device == "cpu" else LEAST
    count, budget = len(lengths), stage.systems.tokens_per_micro_batch or default
    chosen = device == "cuda" and stage.systems.tokens_per_micro_batch is None
    limit = f"{budget:,} tokens" + (" (or more, if the GPU's memory holds more)" if chosen else "")
    in_epoch = in_epoch or count
    steps, drawn = steps_for(in_epoch, stage.batch_size, stage.epochs, stage.max_steps)
    shown = [lengths[i : i + stage.batch_size] for i in range(0, count, stage.batch_size)][: min(steps, 200)]
    micro = [len(micro_batches([n + inserted for n in batch], budget)) for batch in shown]
    spread = f"{min(micro)}" if min(micro) == max(micro) else f"{min(micro)} to {max(micro)}"
    mean = sum(sum(batch) for batch in shown) / len(shown)
    given = "max_steps, " if stage.max_steps is not None else ""
    passes = f"{spread} micro-batch{'es' * (spread != '1')} a step of at most {limit}"
    epochs = f"{given}{drawn / in_epoch:.4g} epochs"
    return (
        f"{steps:,} step{'s' * (steps != 1)} ({epochs}) of {stage.batch_size} {unit}, about {mean:,.0f} tokens; "
        f"{passes}; {sum(n + inserted > budget for n in lengths)} {unit} are longer than that"
    )
