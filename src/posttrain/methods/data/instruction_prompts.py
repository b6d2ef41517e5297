"""Ask a model for tasks, and read its answers.

Every request ends where the answer begins. A model without a chat template continues the text; others get it as the
user's turn, with the beginning of the answer where they run here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

DEEPEN = (
    "add one more requirement or limit to it",
    "ask for the reasons, or for more than one step",
    "make it about a more specific case",
    "require the answer in a certain form, such as a table, a list or a fixed number of words",
)
"""Ways to make a task harder; one is drawn for each."""
NO_INPUT = re.compile(r"\W*(none|no input|nothing|n/?a|not needed)\W*", re.IGNORECASE)
FIELD = re.compile(r"^[ \t]*(Example \d+|Input|Output|Label)[ \t]*:?[ \t]*", re.MULTILINE)


class Ask(NamedTuple):
    """Hold a request: its text, the beginning of the answer, and texts that end it."""

    text: str
    begin: str
    stop: tuple[str, ...]


def ask_instructions(shown: Sequence[str], count: int) -> Ask:
    """Return the request for `count` new tasks after those that are shown."""
    listed = "\n".join(f"{i}. {task}" for i, task in enumerate(shown, 1))
    first, last = len(shown) + 1, len(shown) + count
    text = (
        f"Here is a list of different tasks, one on a line. Continue it with tasks {first} to {last}: new ones, of other "
        f"kinds and about other subjects.\n\n{listed}\n"
    )
    return Ask(text, f"{first}.", (f"\n{last + 1}.",))


def read_instructions(answer: str, ended: bool) -> tuple[list[str], int]:
    """Return the tasks of a numbered list, in one line each, and how many were cut off (the last, if it did not end)."""
    parts = re.split(r"(?m)^\s*(?:\d+[.):]|[-*])\s+", "\n" + answer)[1:]
    tasks = [" ".join(part.split()) for part in parts]
    cut = 1 if tasks and not ended else 0
    return [t for t in tasks[: len(tasks) - cut] if t], cut


def ask_kind(shown: Sequence[Mapping[str, Any]], instruction: str) -> Ask:
    """Return the question whether a task is a classification, after examples."""
    lines = [f"Task: {t['instruction']}\nAnswer: {'Yes' if t['classification'] else 'No'}" for t in shown]
    head = "Can each task be answered with one of a few fixed labels only? Answer Yes or No."
    return Ask(f"{head}\n\n" + "\n\n".join([*lines, f"Task: {instruction}\n"]), "Answer:", ("\n",))


def read_kind(answer: str) -> bool | None:
    """Return the verdict; None if it is neither yes nor no."""
    found = re.match(r"\W*(?:answer\W*)?(yes|no)\b", answer, re.IGNORECASE)
    return None if found is None else found[1].lower() == "yes"


def ask_instances(shown: Sequence[Mapping[str, Any]], instruction: str, classification: bool) -> Ask:
    """Return the request for examples of a task: output first for a classification, else input first.

    Args:
        shown: Tasks of the same kind with their examples.
        instruction: The task.
        classification: Whether it is one.
    """
    names = ("Label", "Input") if classification else ("Input", "Output")
    blocks = []
    for task in shown:
        lines = [f"Task: {task['instruction']}"]
        for i, one in enumerate(task["instances"], 1):
            pair = (one["output"], one["input"]) if classification else (one["input"], one["output"])
            lines.append(f"Example {i}\n{names[0]}: {pair[0] or 'none'}\n{names[1]}: {pair[1] or 'none'}")
        blocks.append("\n".join(lines))
    head = (
        "Write an example of an input for each label of the last task, as is done for the others. The label comes first."
        if classification
        else "Write examples of the last task, as is done for the others: an input (none if the task needs none) and the "
        "right output."
    )
    text = "\n\n".join([head, *blocks, f"Task: {instruction}\n"])
    return Ask(text, f"Example 1\n{names[0]}:", ("\n\nTask:", "\nTask:"))


def read_instances(answer: str, classification: bool, ended: bool) -> tuple[list[dict[str, str]], int]:
    """Return pairs of input and output, and how many were cut off: without their second part, or the last.

    Args:
        answer: Text of the model.
        classification: Whether labels come before inputs.
        ended: Whether the answer ended by itself.
    """
    first, second = ("label", "input") if classification else ("input", "output")
    parts = FIELD.split(answer)
    pairs: list[dict[str, str]] = []
    for name, text in zip(parts[1::2], parts[2::2], strict=True):
        kind = name.split()[0].lower()
        if kind == first:
            pairs.append({first: text.strip()})
        elif kind == second and pairs and second not in pairs[-1]:
            pairs[-1][second] = text.strip()
    whole = [p for p in pairs if second in p]
    if whole and not ended and second in pairs[-1]:
        whole = whole[:-1]
    out = [{"input": p["input"], "output": p.get("output", p.get("label", ""))} for p in whole]
    return [{**p, "input": "" if NO_INPUT.fullmatch(p["input"]) else p["input"]} for p in out], len(pairs) - len(whole)


def ask_deeper(instruction: str, way: str) -> Ask:
    """Return the request to make a task harder."""
    text = (
        f"Rewrite the task so that it is harder: {way}. It must stay a task that can be done in writing. Write the new "
        f"task alone, in one line.\n\nTask: {instruction}\n"
    )
    return Ask(text, "New task:", ("\n",))


def ask_output(instruction: str, given: str) -> Ask:
    """Return the request for an output alone, whose answers vote."""
    return Ask(f"Task: {instruction}\nInput: {given or 'none'}\n", "Output:", ("\nTask:", "\n\nInput:"))


def read_output(answer: str) -> str:
    """Return the output."""
    return answer.removeprefix("Output:").strip()


def prompt_of(instruction: str, given: str) -> str:
    """Return the prompt of a row."""
    return f"{instruction}\n\n{given}" if given else instruction
