"""Build instruction rows of tasks: read tables, hold rows out, mix, and write rows (arXiv 2109.01652, 2210.11416).

Texts stay on the disk; in memory are a few numbers of each example. Everything random depends on the seed, the task and
the texts of the row: the same seed gives the same rows, and a further task or row does not change the others.
"""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.core.errors import DataError
from posttrain.data.instruction_examples import Dropped, ExampleStore, open_table, store_examples
from posttrain.data.instruction_held_out import OTHER_TASK, choose_held_out, copies_across, copies_of, similar_to
from posttrain.data.instruction_mixing import mixed_counts, mixing_rates, ranks, task_seed
from posttrain.data.instruction_rows import Fits, RowKind, RowWriter
from posttrain.data.instruction_settings import InstructionSettings
from posttrain.data.instruction_tasks import InstructionTask

log = logging.getLogger("posttrain")
MIXED_IN = 0x5851F42D4C957F2D
"""Makes the order of rows independent of the order in which examples are taken."""


class InstructionBuilder:
    """Build the rows of tasks, step by step: `read`, `drop` (any number of times), `split`, then the rows.

    Attributes:
        tasks: The tasks.
        stores: Their examples, after `read`.
        usable: Whether each example of each task may be used.
        held: Numbers of the held-out examples of each task, after `split`.
    """

    def __init__(
        self, tasks: Sequence[InstructionTask], seed: int, settings: InstructionSettings, folder: Path
    ) -> None:
        """Check the tasks together.

        Args:
            tasks: The tasks.
            seed: Seeds everything random.
            settings: How rows are built.
            folder: Gets the examples; it can be removed when the rows are written.

        Raises:
            DataError: Two tasks have one name, a held-out cluster does not exist, or no task is left to train on.
        """
        self.tasks, self.seed, self.settings, self.folder = list(tasks), seed, settings, folder
        self.unseen = check_tasks(self.tasks, settings)
        self.stores: list[ExampleStore] = []
        self.usable: list[np.ndarray] = []
        self.held: list[np.ndarray] = []
        self._writers: dict[tuple[int, bool], RowWriter] = {}
        self._plan: tuple[list[np.ndarray], list[int]] | None = None
        self._spare_from: list[int] = []
        """Examples of each task that rows were made of, or tried to."""

    def read(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Read the tables of all tasks; `progress` is called with the rows so far and in all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        total = sum(len(open_table(task).order) for task in self.tasks)  # columns are checked before rows are read
        done = 0

        def count() -> None:
            nonlocal done
            done += 1
            if done % 1000 == 0:
                progress(done, total)

        for i, task in enumerate(self.tasks):
            store = store_examples(task, self.folder / f"{i}.examples", count)
            self.stores.append(store)
            self.usable.append(np.ones(len(store), dtype=bool))
        progress(total, total)

    def drop(self, number: int, examples: Sequence[int] | np.ndarray, cause: str) -> None:
        """Leave examples of a task out, and count them.

        Args:
            number: Number of the task.
            examples: Numbers of the examples.
            cause: Why, for the counts.
        """
        store, usable = self.stores[number], self.usable[number]
        for i in examples:
            if usable[i]:
                usable[i] = False
                store.drop(int(i), cause)

    def split(self) -> None:
        """Hold examples out, and drop their copies from training."""
        settings = self.settings
        for i, (task, store, usable) in enumerate(zip(self.tasks, self.stores, self.usable, strict=True)):
            order = ranks(store.column("pair_keys"), task_seed(self.seed, task.name, "held out"))
            shown = similar_to(store, store.demonstrations, usable, settings.similarity)
            free = usable & ~shown  # what the task's file shows is not held out
            half = len(np.flatnonzero(usable)) // 2
            if i in self.unseen:
                most = half if settings.held_out_shots and not task.demonstrations else len(usable)
                self.held.append(choose_held_out(store, free, order, settings.unseen, most))
            else:
                self.held.append(choose_held_out(store, free, order, settings.held_out, half))
                if settings.held_out > len(self.held[i]):
                    log.warning(
                        "task %s: held_out is %d, and %d of its %d examples are held out: half at most, with groups",
                        *(task.name, settings.held_out, len(self.held[i]), int(usable.sum())),
                    )
        for i, (store, held) in enumerate(zip(self.stores, self.held, strict=True)):
            copied = i not in self.unseen or settings.held_out_shots  # else nothing is made of the task's other rows
            found = copies_of(store, held, self.usable[i], settings.similarity) if copied else {}
            self.usable[i][held] = False
            for cause, numbers in found.items():
                self.drop(i, numbers, cause)
        for i, numbers in enumerate(copies_across(self.stores, self.held, self.usable)):
            self.drop(i, numbers, OTHER_TASK)

    def _chosen(self) -> list[np.ndarray]:
        """Return for each task the examples that may be trained on, in the order in which they are taken."""
        out = []
        for i, (task, store) in enumerate(zip(self.tasks, self.stores, strict=True)):
            numbers = np.flatnonzero(self.usable[i])
            order = ranks(store.column("pair_keys"), task_seed(self.seed, task.name, "order"))
            caps = [n for n in (task.max_rows, self.settings.max_rows_per_task) if n is not None]
            out.append(numbers[np.argsort(order[numbers], kind="stable")][: min(caps, default=None)])
        return out

    def plan(self) -> tuple[list[np.ndarray], list[int]]:
        """Return the examples of each task that may be trained on, and how many rows of each are; after `split`."""
        if self._plan is None:
            chosen = self._chosen()
            self._plan = chosen, self._mixture(chosen)
        return self._plan

    def _mixture(self, chosen: Sequence[np.ndarray]) -> list[int]:
        """Return how many rows of each task are trained on; none of the tasks of held-out clusters."""
        settings = self.settings
        examples = [0 if i in self.unseen else len(c) for i, c in enumerate(chosen)]
        rates = mixing_rates(settings.mixing, examples, [task.weight for task in self.tasks])
        available = [n * self._variants(task) for n, task in zip(examples, self.tasks, strict=True)]
        counts = mixed_counts(rates, available, settings.rows)
        if settings.rows is None and 2 * sum(counts) < sum(available):
            i = max((i for i, n in enumerate(counts) if n), key=lambda i: counts[i] / available[i])
            log.warning(
                "task %s has %d rows, which its share in the mixture limits all others to: %d of %d rows are taken. "
                "rows: %d takes more",
                *(self.tasks[i].name, available[i], sum(counts), sum(available), sum(available)),
            )
        if settings.rows is not None and sum(counts) < settings.rows:
            log.warning(
                "rows is %d, and the tasks give %d: raise rows_per_example (up to the wordings) or max_rows",
                *(settings.rows, sum(counts)),
            )
        return counts

    def _variants(self, task: InstructionTask) -> int:
        """Return how many rows an example can give: no more than it has wordings, or rows would be the same."""
        used = [task.all_wordings, *([task.all_inverted] if self.settings.inverted_share else [])]
        counts = [sum(w.has_context == context for w in wordings) for wordings in used for context in (False, True)]
        fewest = min(n for n in counts if n)
        return min(n for n in (self.settings.rows_per_example, self.settings.wordings, fewest) if n is not None)

    def rows(self, fits: Fits | None = None) -> Iterator[dict[str, Any]]:
        """Yield the rows to train on, tasks mixed."""
        chosen, counts = self.plan()
        if not sum(counts):
            raise DataError("no row is left to train on: " + self._why_none())
        tasks, numbers, variants, keys = [], [], [], []
        for i, (count, examples) in enumerate(zip(counts, chosen, strict=True)):
            if not count:
                continue
            taken = np.arange(count)
            own, variant = examples[taken % len(examples)], taken // len(examples)
            tasks.append(np.full(count, i, dtype=np.int32))
            numbers.append(own)
            variants.append(variant.astype(np.int32))
            pair_keys = self.stores[i].column("pair_keys")[own] + variant.astype(np.uint64)
            keys.append(ranks(pair_keys, task_seed(self.seed, self.tasks[i].name, "place") ^ MIXED_IN))
            self._writers[i, False] = self._writer(i, examples, RowKind.trained(self.settings), fits)
        order = np.argsort(np.concatenate(keys), kind="stable")
        columns = [np.concatenate(parts)[order] for parts in (tasks, numbers, variants)]
        self._spare_from = [min(count, len(examples)) for count, examples in zip(counts, chosen, strict=True)]
        missing: Counter[str] = Counter()
        for task, number, variant in zip(*(column.tolist() for column in columns), strict=True):
            row = self._writers[task, False].row(number, variant) or self._spare_row(task, chosen[task])
            if row is not None:
                yield row
            else:
                missing[self.tasks[task].name] += 1
        if missing:
            log.warning(
                "%d rows are missing, since examples are too long and no other ones are left: %s",
                *(missing.total(), ", ".join(f"{name} {n}" for name, n in missing.most_common(5))),
            )

    def _spare_row(self, task: int, examples: np.ndarray) -> dict[str, Any] | None:
        """Return the row of the task's next example that is not drawn yet, in place of one that does not fit."""
        row = None
        while row is None and self._spare_from[task] < len(examples):
            self._spare_from[task] += 1
            row = self._writers[task, False].row(int(examples[self._spare_from[task] - 1]))
        return row

    def held_out_rows(self, unseen: bool, fits: Fits | None = None) -> Iterator[dict[str, Any]]:
        """Yield the held-out rows of trained tasks, or with `unseen` those of held-out clusters."""
        chosen, _ = self.plan()
        for i, held in enumerate(self.held):
            if (i in self.unseen) == unseen:
                writer = self._writer(i, chosen[i], RowKind.held_out(self.settings), fits)
                self._writers[i, True] = writer
                yield from (row for number in held.tolist() if (row := writer.row(number)) is not None)

    def _writer(self, number: int, pool: np.ndarray, kind: RowKind, fits: Fits | None) -> RowWriter:
        limit = self.settings.similarity
        return RowWriter(self.stores[number], pool, kind, self.seed, limit, fits or (lambda prompt, completion: True))

    def _why_none(self) -> str:
        dropped = self.dropped()
        return ", ".join(f"{n:,} {cause}" for cause, n in dropped.counts.most_common()) or "the tasks have too few rows"

    def dropped(self) -> Dropped:
        """Return what was left out of all tasks, by cause."""
        out = Dropped()
        for store in self.stores:
            out.merge(store.dropped)
        for writer in self._writers.values():
            out.merge(writer.dropped)
        return out

    def stats(self) -> dict[str, Any]:
        """Return counts of each task and of what was left out; the rows were written before."""
        tasks = {}
        for i, (task, store) in enumerate(zip(self.tasks, self.stores, strict=True)):
            writers = [self._writers.get((i, k)) for k in (False, True)]
            trained, held = (dict(writer.counts) if writer else {} for writer in writers)
            left_out = sum((w.dropped.counts for w in writers if w), start=Counter(store.dropped.counts))
            tasks[task.name] = {
                **{"type": task.type, "cluster": task.cluster_name, "held out": i in self.unseen},
                **{"examples": len(store), "usable": int(self.usable[i].sum())},
                "not_drawn": int(self.usable[i].sum()) - (self._spare_from[i] if self._spare_from else 0),
                "rows": trained.pop("rows", 0),
                "held_out_rows": held.pop("rows", 0),
                **({"written": {name: n for name, n in sorted(trained.items()) if n}} if trained else {}),
                **({"held_out_written": {name: n for name, n in sorted(held.items()) if n}} if held else {}),
                **({"dropped": dict(left_out)} if left_out else {}),
                **({"labels": store.labels} if store.labels else {}),
            }
        dropped = self.dropped()
        return {"tasks": tasks, "dropped": dict(dropped.counts), "dropped_examples": dropped.examples}

    def close(self) -> None:
        """Close the files of the examples."""
        for store in self.stores:
            store.close()


def check_tasks(tasks: Sequence[InstructionTask], settings: InstructionSettings) -> frozenset[int]:
    """Return the numbers of the tasks of held-out clusters.

    Raises:
        DataError: Two tasks have one name, a held-out cluster does not exist, or no task is left to train on.
    """
    names = [task.name for task in tasks]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"two tasks are named {twice[0]!r}; give each another name")
    clusters = {task.cluster_name for task in tasks}
    if unknown := [c for c in settings.held_out_clusters if c not in clusters]:
        raise DataError(f"held_out_clusters names {unknown[0]!r}, and the clusters of the tasks are {sorted(clusters)}")
    unseen = frozenset(i for i, task in enumerate(tasks) if task.cluster_name in settings.held_out_clusters)
    if len(unseen) == len(tasks):
        raise DataError(
            "held_out_clusters names every cluster: no task is left to train on" if tasks else "there are no tasks"
        )
    return unseen


def build_instructions(
    tasks: Sequence[InstructionTask], seed: int = 0, settings: InstructionSettings | None = None, **changed: Any
) -> Iterator[dict[str, Any]]:
    """Yield the instruction rows of tasks, one after the other.

    Args:
        tasks: The tasks; `posttrain.methods.data.instruction_files.read_tasks` reads them from YAML files.
        seed: The same seed gives the same rows.
        settings: How rows are built. None: the defaults.
        changed: Settings by name, such as `rows=1000`, in place of `settings`.

    Raises:
        DataError: A task, its table or the settings together can't be used.
    """
    if settings is not None and changed:
        raise TypeError("give settings, or single ones by name, not both")
    with tempfile.TemporaryDirectory(prefix="posttrain-instructions-") as folder:
        builder = InstructionBuilder(tasks, seed, settings or InstructionSettings(**changed), Path(folder))
        try:
            builder.read()
            builder.split()
            yield from builder.rows()
        finally:
            builder.close()
