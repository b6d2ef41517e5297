"""Rollouts of a run in the terminal: prompts, completions, reward parts, advantages."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from posttrain.core.errors import DataError
from posttrain.core.visible_text import visible
from posttrain.data.marked_text import draw_blocks
from posttrain.data.pictures import read_picture
from posttrain.methods.data.revision_chain import Chain, drop_reason, read_chains
from posttrain.methods.data.revision_chain import Text as Written
from posttrain.report import rollouts
from posttrain.report.chains import amounts, stages_with_chains
from posttrain.report.judge_figures import feedback_lines
from posttrain.report.load import numbered_folders
from posttrain.report.measured_stages import shown_images
from posttrain.report.reward_hacking import repetition, suspicious
from posttrain.sampling.rollout_store import groups_of, read_rollouts, rollout_steps, rollouts_path

SORTS = ("order", "best", "worst", "suspicious")


def plain(text: str, style: str = "") -> Text:
    """Return text from a run for the terminal; its width is that of what is shown."""
    return Text(visible(text), style=style)


def print_feedback(run: Path, out: Console, rows: int) -> bool:
    """Print the labels of feedback stages against people's, with some disagreements.

    Args:
        run: Folder of the run.
        out: Console to print to.
        rows: Disagreements to print.

    Returns:
        False if the run has no labels.
    """
    found = feedback_lines(run, rows)
    for line in found:
        out.print(line, soft_wrap=True)
    return bool(found)


def stages_with_rollouts(run: Path) -> list[Path]:
    """Return the folders of the stages that kept rollouts, in their order."""
    kept = numbered_folders(run / "stages")
    return [p for p in kept if rollout_steps(p / "rollouts") or rollout_steps(p / "held_out")]


def print_chains(
    run: Path, out: Console, *, stage: str | None = None, groups: int = 3, problem: int | None = None
) -> bool:
    """Print chains of critique and revision.

    Args:
        run: Folder of the run.
        out: Console to print to.
        stage: Name of a stage. None: the last, if no stage kept rollouts.
        groups: Chains to print.
        problem: Number of one prompt. None: all.

    Returns:
        False if the run (or the stage) has no chains, so that its rollouts are to be printed.

    Raises:
        DataError: There is no such prompt.
    """
    named = {p.name.split("-", 1)[1]: p for p in stages_with_chains(run)}
    if not named or (stage not in named if stage else bool(stages_with_rollouts(run))):
        return False
    folder = named[stage] if stage else list(named.values())[-1]
    found = read_chains(folder / "chains")
    shown = [c for c in found if problem is None or c.problem == problem]
    if not shown:
        raise DataError(f"stage {folder.name} has no chain of problem {problem}")
    out.rule(f"{folder.name}, {len(found)} chains")
    rounds = [r for c in found for r in c.rounds]
    usable = sum(r.usable for r in rounds)
    out.print(f"{usable} of {len(rounds)} rounds ended in a revision of use; {min(groups, len(shown))} chains shown")
    with out.pager(styles=True) if out.is_terminal and min(groups, len(shown)) > 2 else nullcontext():
        _print_chains(shown[:groups], out)
    return True


def _print_chains(shown: Sequence[Chain], out: Console) -> None:
    for c in shown:
        prompt = "\n\n".join(m["content"] if len(c.prompt) == 1 else f"{m['role']}: {m['content']}" for m in c.prompt)
        out.print(Panel(plain(prompt), title=plain(f"problem {c.problem}  {c.source}"), title_align="left"))
        _print_text("first answer", c.initial, "yellow", out)
        for i, r in enumerate(c.rounds, 1):
            out.print(plain(f"round {i}" + (f"  {r.says}" if r.says else ""), style="bold"))
            for name, text in (("critique", r.critique), ("revision", r.revision)):
                if text is not None:
                    _print_text(name, text, "green" if r.usable else "red" if r.why else "yellow", out)
            if r.why:
                out.print(plain(f"not used: {r.why}", style="red"))
        why = drop_reason(c)
        ended = f"ended early: {c.stopped}  " if c.stopped else ""
        rewards = "  ".join(f"{name} {change}" for name, change in amounts(c))
        out.print(plain(f"{ended}{f'no row: {why}' if why else 'gave a row'}  {rewards}".rstrip(), style="bold"))
        out.print()


def _print_text(name: str, text: Written, style: str, out: Console) -> None:
    reward = "" if text.reward is None else f", reward {text.reward:.3g}"
    failed = "".join(f", {part}: {message}" for part, message in {**text.failures, **text.notes}.items())
    out.print(plain(f"{name}  {text.tokens} tokens, {text.finish}{reward}{failed}", style=style))
    out.print(plain(text.text or "(empty)"))


def print_rollouts(
    run: Path,
    out: Console,
    *,
    stage: str | None = None,
    step: int | None = None,
    held_out: bool = False,
    sort: str = "order",
    groups: int = 3,
    problem: int | None = None,
) -> None:
    """Print a step's rollouts, group by group; through a pager in a terminal.

    Args:
        run: Folder of the run.
        out: Console to print to.
        stage: Name of a stage. None: the last.
        step: Number of the step. None: the last.
        held_out: Print answers to held-out prompts instead.
        sort: Order of groups and of the rollouts in them: by reward, or by how suspicious they are among all of the
            step (`posttrain.report.reward_hacking`).
        groups: Groups to print.
        problem: Number of one prompt. None: all.

    Raises:
        DataError: There is no such stage, step, order or prompt.
    """
    stages = stages_with_rollouts(run)
    named = {p.name.split("-", 1)[1]: p for p in stages}
    if not stages or (stage is not None and stage not in named):
        have = f"there are: {', '.join(named)}" if named else "no stage of this run kept any"
        raise DataError(f"no rollouts of stage {stage!r} in {run}; {have}" if stage else f"no rollouts in {run}")
    if sort not in SORTS:
        raise DataError(f"--sort {sort}: expected one of {', '.join(SORTS)}")
    folder = (named[stage] if stage else stages[-1]) / ("held_out" if held_out else "rollouts")
    steps = rollout_steps(folder)
    if not steps:
        raise DataError(f"{folder} holds no rollouts: {'the recipe has no held_out' if held_out else 'none yet'}")
    chosen = steps[-1] if step is None else step
    if chosen not in steps:
        near = sorted(steps, key=lambda s: abs(s - chosen))[:3]
        raise DataError(f"no rollouts of step {chosen}; there are {len(steps)}, the nearest at {sorted(near)}")
    rows = read_rollouts(rollouts_path(folder, chosen))
    ordered = _ordered(rows, sort)
    if problem is not None:
        rows = [r for r in rows if r["problem"] == problem]
        if not rows:
            raise DataError(f"step {chosen} has no problem {problem}")
        ordered = [g for g in ordered if g[0]["problem"] == problem]
    shown = ordered[:groups]
    title = f"{folder.parent.name}, {'held out, ' if held_out else ''}step {chosen} of {steps[0]} to {steps[-1]}"
    with out.pager(styles=True) if out.is_terminal and sum(len(g) for g in shown) > 8 else nullcontext():
        _print(shown, rows, title, out)


def print_drift(run: Path, out: Console, *, stage: str | None = None) -> None:
    """Print how the rewards of each stage drifted, as the report does.

    Args:
        run: Folder of the run.
        out: Console to print to.
        stage: Name of a stage. None: all.

    Raises:
        DataError: There are no rollouts.
    """
    stages = [p for p in stages_with_rollouts(run) if stage is None or p.name.split("-", 1)[1] == stage]
    seen = False
    for folder in stages:
        steps = rollout_steps(folder / "rollouts")
        notes: list[str] = []
        if steps:
            seen = True
            _print_view(rollouts.view(folder.name, folder / "rollouts", steps, notes), out)
        for note in notes:
            out.print(note, style="red")
    if not seen:
        raise DataError(f"no rollouts to watch in {run}" + (f" of stage {stage!r}" if stage else ""))


def _print_view(view: rollouts.RolloutsView, out: Console) -> None:
    out.rule(f"{view.stage}, {view.steps} steps, {view.rollouts:,} rollouts looked at")
    parts = [
        (p.name, *map(_short, (p.early, p.late, p.within, p.between)), *map(_percent, p.signal)) for p in view.parts
    ]
    heads = ["part", "early", "late", "variance within", "between", "share within, early", "late"]
    _table("Parts of the reward (means of the first and last third; variances of the last)", heads, parts, out)
    pairs = [(f"{a}, {b}", *map(_signed, rs), "moved apart" if apart else "") for a, b, rs, apart in view.pairs]
    _table("Do they go together?", ["parts", "correlation", "early", "late", ""], pairs, out)
    drift = [(n, _short(a), _short(b), _signed(r)) for n, a, b, r in view.drift]
    _table("Shape", ["measure", "early", "late", "correlation with the reward"], drift, out)
    for warning in view.warnings:
        out.print(f"worth a look: {warning}", style="yellow")
    if not view.warnings:
        out.print("nothing drifted that would be worth a look")


def _table(title: str, titles: Sequence[str], rows: Sequence[Sequence[str]], out: Console) -> None:
    if rows:
        table = Table(title=title, title_justify="left", box=None)
        for i, name in enumerate(titles):
            table.add_column(name, justify="right" if i else "left")
        for row in rows:
            table.add_row(*row)
        out.print(table)


def _short(value: float | None, form: str = ".3g") -> str:
    return "none" if value is None else format(value, form)


_signed, _percent = partial(_short, form="+.2f"), partial(_short, form=".0%")


def _ordered(rows: Sequence[dict[str, Any]], sort: str) -> list[list[dict[str, Any]]]:
    """Rows by group; groups and their rollouts in the order asked for, those without a reward last."""
    groups: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    there = [g for _, g in sorted(groups.items())]
    if sort == "order":
        return there
    sign = 1 if sort == "worst" else -1
    found = suspicious([groups_of(rows)]) if sort == "suspicious" else []
    odd = {id(there[s["group"]][s["rollout"]]): s["score"] for s in found}

    def key(row: dict[str, Any]) -> tuple[bool, float]:
        value = odd.get(id(row), 0.0) if sort == "suspicious" else row["reward"]
        return row["reward"] is None, sign * (value or 0.0)

    inside = [sorted(g, key=key) for g in there]
    return sorted(inside, key=lambda g: key(g[0]))


def _print(groups: Sequence[list[dict[str, Any]]], rows: Sequence[dict[str, Any]], title: str, out: Console) -> None:
    rewards = [r["reward"] for r in rows if r["reward"] is not None]
    count = len({r["group"] for r in rows})
    mean = f", mean reward {sum(rewards) / len(rewards):.3f}" if rewards else ""
    out.rule(title)
    out.print(f"{count} groups, {len(rows)} rollouts{mean}; {len(groups)} groups shown")
    for group in groups:
        first = group[0]
        head = f"problem {first['problem']}  {first['source']}  answer {first['answer']}"
        if out.color_system is not None and not out.no_color:
            for image in shown_images(first["images"]):
                out.print(draw_blocks(read_picture(image).open()), end="")
        out.print(Panel(plain(first["prompt"].strip() or "(empty)"), title=plain(head), title_align="left"))
        best = max((r["reward"] for r in group if r["reward"] is not None), default=None)
        for row in group:
            out.print(_line(row, best))
            out.print(_completion(row), style="default")
            out.print()


def _completion(row: dict[str, Any]) -> Text:
    """The text; what an environment replied in another colour."""
    text = Text()
    for mine, part in row["turns"]:
        text.append(visible(part), style="" if mine else "cyan")
    if not row["turns"]:
        text.append(visible(row["completion"]) or "(empty)")
    text.rstrip()
    return text


def _line(row: dict[str, Any], best: float | None) -> Text:
    """Reward, advantage, parts, length, end: green where nothing in the group is better, red without a reward."""
    style = "red" if row["reward"] is None else "green" if row["reward"] == best else "yellow"
    parts = [f"#{row['rollout']}"]
    parts.append("no reward" if row["reward"] is None else f"reward {row['reward']:.3g}")
    if row["advantage"] is not None:
        parts.append(f"advantage {row['advantage']:+.3f}")
    parts += [f"{name} {value:.3g}" for name, value in row["parts"].items()]
    mine = rollouts.own(row)
    parts.append(f"{len(mine)} tokens, {row['finish']}")
    again = repetition(mine)
    if again > 0.2:
        parts.append(f"{again:.0%} repeated")
    parts += [f"{name}: {message}" for name, message in {**row["failures"], **row["notes"]}.items()]
    return plain("  ".join(parts), style=f"bold {style}")
