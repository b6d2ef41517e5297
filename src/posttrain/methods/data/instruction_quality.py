"""Check the examples of tasks before rows are made of them, and measure the rows, for the quality report."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.config import references
from posttrain.config.settings import ModelConfig
from posttrain.data.quality_settings import QualitySettings
from posttrain.data.text_copies import core_text
from posttrain.trainer.stage import StageContext

if TYPE_CHECKING:
    from posttrain.data.instruction_builder import InstructionBuilder
    from posttrain.data.instruction_examples import Example, ExampleStore
    from posttrain.data.instruction_tasks import InstructionTask
    from posttrain.data.leaks import LeakIndex, Leaks

log = logging.getLogger("posttrain")
NEAR_DUPLICATE = "nearly the same as an earlier example"
LEAKED = "text of evaluation {}"
HELD_OUT = "text of a held-out row"
PAIRS_SHOWN = 5
"""Near duplicates that the report shows."""


@dataclass(frozen=True)
class InstructionPreview:
    """Hold what `posttrain inspect` shows of rows that were built for it alone.

    Attributes:
        stats: The content of stats.json.
        rows: The first rows.
    """

    stats: dict[str, Any]
    rows: list[dict[str, Any]]


class InstructionQuality:
    """Leave near duplicates and leaked examples out (`drop`), and measure what is written (`measure`)."""

    def __init__(self, settings: QualitySettings, tasks: Sequence[InstructionTask], context: StageContext) -> None:
        """Prepare the checks.

        Args:
            settings: What is looked for.
            tasks: The tasks of the rows.
            context: Tokenizer and length of the model, and the recipe's evaluations.
        """
        self.settings, self.tasks, self.context = settings, tasks, context
        self._before: dict[str, Any] = {}
        self._not_read: dict[str, str] = {}
        self._templates: dict[str, frozenset[str]] = {}
        self._texts: dict[str, list[list[str]]] | None = None

    def drop(self, builder: InstructionBuilder) -> None:
        """Leave out examples that nearly repeat an earlier one, and those with text of an evaluation.

        Examples are checked before rows are held out, so that nothing of them is in demonstrations either.

        Raises:
            DataError: The data of an evaluation can't be read, or a package is missing.
        """
        if self.settings.near_duplicates is not None:
            self._before["duplicates"] = self._drop_duplicates(builder)
        if self.settings.leaks is not None:
            self._before["leaks"] = self._drop_leaks(builder)

    def _drop_duplicates(self, builder: InstructionBuilder) -> dict[str, Any]:
        import numpy as np

        from posttrain.data.near_duplicates import find_duplicates

        config = self.settings.near_duplicates
        assert config is not None
        tasks: dict[str, Any] = {}
        shown: list[dict[str, Any]] = []
        for number, store in enumerate(builder.stores):
            found = find_duplicates((_compared_texts(e, store.common_words) for e in store), config.threshold)
            repeats = np.flatnonzero(~found.kept)
            tasks[store.task.name] = found.stats
            for i in repeats[: max(0, PAIRS_SHOWN - len(shown))].tolist():
                pair = {"task": store.task.name, "similarity": round(float(found.similarity[i]), 4)}
                shown.append({**pair, **_of(store, i), "earlier": _of(store, int(found.of[i]))})
            if config.drop:
                builder.drop(number, repeats, NEAR_DUPLICATE)
        total = {name: sum(stats[name] for stats in tasks.values()) for name in ("texts", "exact", "near", "crowded")}
        about = {"threshold": config.threshold, "dropped": config.drop}
        return {
            **about,
            **total,
            "tasks": {name: s for name, s in tasks.items() if s["exact"] + s["near"]},
            "examples": shown,
        }

    def _drop_leaks(self, builder: InstructionBuilder) -> dict[str, Any]:
        config = self.settings.leaks
        assert config is not None
        index = self._index_of_evaluations()
        found: dict[str, dict[str, int]] = {}
        for number, store in enumerate(builder.stores):
            by_evaluation = index.search(_usable_texts(builder, number)).by_evaluation
            left: set[int] = set()  # an example of two evaluations is left out for the first one
            for name, examples in by_evaluation.items():
                found.setdefault(name, {})[store.task.name] = len(set(examples) - left)
                if config.drop:
                    builder.drop(number, examples, LEAKED.format(name))
                    left |= set(examples)
        return {"dropped": config.drop, "examples": found}

    def drop_held_out(self, builder: InstructionBuilder) -> None:
        """Leave out examples that share a run of words with a held-out row of any task.

        Inputs shorter than a run are not looked for: a question may rightly be asked in several tasks. Nor are the words
        of a template around an input: all rows of its task have them.
        """
        from posttrain.data.leaks import LeakIndex

        if self.settings.leaks is None:
            return
        index = LeakIndex(self.settings.leaks.n)
        for store, held in zip(builder.stores, builder.held, strict=True):
            self._templates[store.task.name] = store.common_words
            index.add(store.task.name, [self._telling(store.core_text(store[n])) for n in held.tolist()])
        file_of = {task.name: f"{'un' * (i in builder.unseen)}seen.jsonl" for i, task in enumerate(builder.tasks)}
        found = self._before.setdefault("leaks", {}).setdefault("examples", {})
        for number, store in enumerate(builder.stores):
            by_task = index.search(_usable_texts(builder, number)).by_evaluation
            for name in ("seen.jsonl", "unseen.jsonl"):
                own = set().union(*(examples for task, examples in by_task.items() if file_of[task] == name))
                if own:
                    found.setdefault(name, {})[store.task.name] = len(own)
                if self.settings.leaks.drop:
                    builder.drop(number, sorted(own), HELD_OUT)

    def _index_of_evaluations(self) -> LeakIndex:
        """Return an index of the evaluations whose data can be read before the stages run."""
        from posttrain.data.leaks import LeakIndex

        assert self.settings.leaks is not None
        index = LeakIndex(self.settings.leaks.n)
        if self._texts is None:
            self._texts = self._read_evaluations()
        for name, texts in self._texts.items():
            index.add(name, texts)
        return index

    def _read_evaluations(self) -> dict[str, list[list[str]]]:
        from posttrain.eval.item_texts import item_texts

        out = {}
        for evaluation in self.context.evaluations:
            if references(evaluation):
                self._not_read[evaluation.name] = "it reads what a stage makes"
                continue
            texts = item_texts(evaluation, self.context.tokenizer, self.context.context)
            if texts is None:
                self._not_read[evaluation.name] = "its kind does not tell the texts of its items"
            else:
                out[evaluation.name] = texts
        return out

    def measure(self, folder: Path, model: ModelConfig | None = None) -> dict[str, Any]:
        """Measure `folder`/rows.jsonl, and search it for the texts of evaluations and of the held-out rows beside it.

        Args:
            folder: The folder with rows.jsonl, seen.jsonl and unseen.jsonl.
            model: The model under which the difficulty is measured. None: it is not.

        Returns:
            The statistics of `RowQuality`; duplicates, leaks and difficulty if they were looked for.
        """
        from posttrain.data.row_quality import RowQuality, row_texts

        terms = {task.name: task.group_terms for task in self.tasks if task.group_terms is not None}
        quality = RowQuality(terms, self._tokens_of(), self.context.context)
        rows = folder / "rows.jsonl"

        def texts() -> Iterator[list[str]]:
            for row in read_rows(rows):
                quality.add(row)
                yield row_texts(row)

        out: dict[str, Any] = {}
        if self.settings.leaks is None:
            for _ in texts():
                pass
        else:
            leaks = self._index_of_rows(folder).search(texts())
            out["leaks"] = {**self._before.get("leaks", {}), "n": self.settings.leaks.n, **self._leaks(leaks)}
        out = {**quality.stats(), **out}
        if "duplicates" in self._before:
            out["duplicates"] = self._before["duplicates"]
        if model is not None and self.settings.difficulty:
            from posttrain.methods.data.row_difficulty import first_rows_of_tasks, measure_difficulty

            chosen = first_rows_of_tasks(read_rows(rows), self.settings.difficulty)
            out["difficulty"] = measure_difficulty(model, chosen, self.context.context)
        return out

    def _index_of_rows(self, folder: Path) -> LeakIndex:
        """Return the index of evaluations with the inputs of held-out rows added, as `drop_held_out` takes them."""
        index = self._index_of_evaluations()
        for name in ("seen", "unseen"):
            path = folder / f"{name}.jsonl"
            inputs: dict[str, list[list[str]]] = {}
            for row in read_rows(path) if path.is_file() else ():
                text = core_text(row["input"], self._templates.get(row["task"], frozenset()))
                inputs.setdefault(row["task"], []).append(self._telling(text))
            for own in inputs.values():  # task by task, since the wording that items share is that of a task
                index.add(f"{name}.jsonl", own)
        return index

    def _telling(self, text: str) -> list[str]:
        """Return an input in a list; [] if it is so short that rows of another task may rightly have it too."""
        from posttrain.data.row_quality import count_words

        assert self.settings.leaks is not None
        return [text] if count_words(text) >= self.settings.leaks.n else []

    def _leaks(self, leaks: Leaks) -> dict[str, Any]:
        for name, part in leaks.stats.items():
            if part["leaking_rows"]:  # examples are left out, but not what a task's file shows or says
                first = part["examples"][0]
                log.warning(
                    "%d rows have text of %s (row %d: %r): look at the demonstrations and wordings of the task",
                    *(part["leaking_rows"], name, first["row"] + 1, first["words"]),
                )
        return {"rows": len(leaks.leaking), "evaluations": leaks.stats, "not_searched": self._not_read}

    def _tokens_of(self) -> Any:
        """Return a function that counts the tokens of a row, if it may be longer than the context."""
        tokenizer, limit = self.context.tokenizer, self.context.context
        if tokenizer is None or limit is None:
            return None
        from posttrain.data.encoding import RowLength

        length = RowLength(tokenizer)

        def tokens_of(row: Mapping[str, Any]) -> int | None:
            prompt, completion = row["prompt"], row["completion"]
            return None if length.fits(prompt, completion, limit) else length.tokens(prompt, completion)

        return tokens_of


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file of lines, one at a time."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def _of(store: ExampleStore, number: int) -> dict[str, str]:
    example = store[number]
    return {"place": example.place, "text": f"{example.input_text(store.task.type)[:300]} → {example.output[:100]}"}


def _compared_texts(example: Example, template: frozenset[str]) -> list[str]:
    """Return the texts that are all near those of a duplicate: fields, also without the words of a template, output."""
    fields = list(example.fields.values())
    cores = [core_text(text, template) for text in fields] if template else []
    return [*fields, *cores, example.output, example.rationale]


def _usable_texts(builder: InstructionBuilder, number: int) -> Iterator[list[str]]:
    """Yield the texts of each example of a task in which an evaluation may leak; none of those that are left out."""
    usable = builder.usable[number]
    for i, example in enumerate(builder.stores[number]):
        fields = list(example.fields.values())
        whole = ["\n".join(fields)] if len(fields) > 1 else []
        yield [*fields, *whole, example.output, example.rationale] if usable[i] else []
