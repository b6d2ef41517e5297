"""Worked examples before a question: of lm-eval's wheel (chain of thought of BBH and MMLU), or of a file of yours."""

from __future__ import annotations

import difflib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from posttrain.config.problems import DemonstrationsConfig
from posttrain.core.errors import DataError, MissingExtraError
from posttrain.core.files import named_path
from posttrain.data.turns import make_message

THINK = "Let's think step by step."
LM_EVAL_CHAINS = {
    "bbh": ("bbh/cot_fewshot", "", "input", f"{THINK}\n"),
    "mmlu": ("mmlu/flan_cot_fewshot", "mmlu_", "question", f"{THINK} "),
}
"""Collection -> (folder in lm-eval's tasks, beginning of its files' names, field of the question, start of answers)."""


@dataclass(frozen=True)
class Demonstrations:
    """Hold worked examples.

    Attributes:
        description: What the questions are about; empty for none.
        pairs: (question, answer) of each.
        lead: Beginning of every answer, also of the one that is asked for.
        layout: A question with its answer, as text with {question} and {answer}; empty: Q: and A:, with `lead`.
    """

    description: str
    pairs: tuple[tuple[str, str], ...]
    lead: str = ""
    layout: str = ""

    def before(self, messages: Sequence[Mapping[str, Any]], style: str) -> list[Any]:
        """Return the turns of a question with the demonstrations before it, without one of the same question.

        Args:
            messages: The turns, the question last.
            style: text: within the last turn; turns: each as a turn of the user and an answer, before the user's first.
        """
        question = messages[-1]["content"].strip()
        pairs = [(asked, answer) for asked, answer in self.pairs if asked.strip() != question]
        intro = [self.description] if self.description else []
        if style == "turns":
            turns: list[Any] = []
            for number, (asked, answer) in enumerate(pairs):
                turns.append(make_message("user", "\n\n".join([*(intro if not number else []), asked])))
                turns.append(make_message("assistant", self.lead + answer))
            first = next(i for i, turn in enumerate(messages) if turn["role"] != "system")
            return [*messages[:first], *turns, *messages[first:]]
        # Not by format(): a question may have braces.
        head, _, tail = (self.layout or f"Q: {{question}}\nA: {self.lead}{{answer}}").partition("{answer}")
        texts = [head.replace("{question}", asked) + answer + tail for asked, answer in pairs]
        text = "\n\n".join([*intro, *texts, head.replace("{question}", question)])
        return [*messages[:-1], {**messages[-1], "content": text.rstrip(" ")}]


def load_demonstrations(config: DemonstrationsConfig) -> Demonstrations:
    """Read demonstrations.

    Args:
        config: Their settings.

    Raises:
        MissingExtraError: They are lm-eval's, and it is not installed.
        DataError: There are no such ones, or fewer than `count`.
    """
    collection, colon, name = config.source.partition(":")
    if colon and collection in LM_EVAL_CHAINS:
        made = _of_lm_eval(collection, name)
    else:
        made = Demonstrations("", tuple(_of_file(named_path(config.source))))
    if len(made.pairs) < (config.count or 1):
        raise DataError(f"demonstrations: {config.source} has {len(made.pairs)}, and count is {config.count or 1}")
    return replace(made, pairs=made.pairs[: config.count], layout=config.layout or "")


def _of_lm_eval(collection: str, name: str) -> Demonstrations:
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(
            f"demonstrations {collection}:{name} are in lm-eval's wheel, which is not installed: pip install "
            "'posttrain[lm-eval]'"
        )
    folder, start, field, lead = LM_EVAL_CHAINS[collection]
    files = (Path(spec.submodule_search_locations[0]) / "tasks" / folder).glob(f"{start}*.yaml")
    known = {path.stem.removeprefix(start): path for path in files if not path.stem.startswith("_")}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise DataError(f"demonstrations: no {collection}:{name}.{hint} There are {', '.join(sorted(known))}")
    task = yaml.safe_load(known[name].read_text(encoding="utf-8"))
    samples = task["fewshot_config"]["samples"]
    pairs = [(s[field].strip(), s["target"].strip().removeprefix(THINK).strip()) for s in samples]
    return Demonstrations(task["description"].strip(), tuple(pairs), lead)


def _of_file(path: Path) -> list[tuple[str, str]]:
    """Return (prompt, completion) of the lines of a JSON Lines file."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return [(str(row["prompt"]), str(row["completion"])) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"demonstrations: {path} can't be read ({type(error).__name__}: {error}): expected a JSON Lines file with "
            f"prompt and completion in each line, or {' or '.join(f'{c}:NAME' for c in LM_EVAL_CHAINS)}"
        ) from error
