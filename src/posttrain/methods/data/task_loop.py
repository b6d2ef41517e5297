"""Write new tasks in rounds, each stored when it is finished, so that an interrupted stage resumes after the last."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.core.files import read_lines, write_lines
from posttrain.core.progress import Track
from posttrain.data.text_similarity import RougeIndex, rouge_l, words_of
from posttrain.methods.data import instruction_prompts as prompts
from posttrain.methods.data.data_stage import chunked
from posttrain.methods.data.instruction_filter import CUT, Drops, fault_of_instruction
from posttrain.methods.data.seed_tasks import SeedTask

if TYPE_CHECKING:
    from posttrain.methods.data.self_instruct import AskModel, SelfInstructConfig

FRUITLESS = 5
"""Rounds without a new task after which no more is asked for."""
SIMILAR = "too similar to a task that is kept"
ENOUGH = "written after the last that was wanted"


@dataclass(slots=True)
class WrittenTask:
    """Hold a task that the model wrote.

    Attributes:
        instruction: What is to be done. Empty if it was cut off.
        why: Why it was dropped. Empty: it is kept.
        similarity: ROUGE-L to the nearest seed task.
        nearest: That task.
        depth: How often it was made harder.
        parent: Number of the kept task that it was made of. None: of none.
    """

    instruction: str
    why: str = ""
    similarity: float = 0.0
    nearest: str = ""
    depth: int = 0
    parent: int | None = None


class TaskLoop:
    """Write tasks until enough are kept.

    Attributes:
        kept: Tasks so far.
        drops: Those that were dropped.
    """

    def __init__(
        self, config: SelfInstructConfig, seeds: Sequence[SeedTask], write: AskModel, folder: Path, seed: int
    ) -> None:
        self.config, self.seeds, self.write, self.folder, self.seed = config, seeds, write, folder, seed
        self.kept: list[WrittenTask] = []
        self.drops = Drops()
        self.written = 0
        self.stopped = ""
        self._index = RougeIndex(config.similarity, (t.instruction for t in seeds))
        self._seed_words = [words_of(t.instruction) for t in seeds]

    def __call__(self) -> tuple[list[WrittenTask], dict[str, Any]]:
        """Return the kept tasks, and counts of what was written."""
        config = self.config
        self.folder.mkdir(parents=True, exist_ok=True)
        with Track(f"{config.name}: tasks", config.instructions, 0) as track:
            fruitless, number = 0, 0
            while len(self.kept) < config.instructions and not self.stopped:
                number += 1
                before = len(self.kept)
                self._round(f"round-{number:06d}", partial(self._new, number), config.instructions)
                fruitless = fruitless + 1 if len(self.kept) == before else 0
                track.update(len(self.kept), written=self.written)
                if fruitless == FRUITLESS:
                    self.stopped = f"{FRUITLESS} rounds in a row gave no new task"
                elif number == config.rounds:
                    self.stopped = f"{config.rounds} rounds were made"
            for depth in range(1, config.deepen + 1):
                parents = [i for i, t in enumerate(self.kept) if t.depth == depth - 1]
                for c, part in chunked(len(parents), config.prompts_at_once).items():
                    chosen = [parents[i] for i in part]
                    self._round(f"deeper-{depth}-{c:06d}", partial(self._deeper, depth, chosen), None)
        counts = {"written": self.written, **self.drops.as_dict()}
        return self.kept, {**counts, "stopped": self.stopped} if self.stopped else counts

    def _round(self, name: str, make: Callable[[], list[WrittenTask]], most: int | None) -> None:
        """Add a round's tasks: those that are stored, or new ones."""
        path = self.folder / f"{name}.jsonl"
        if path.exists():
            tasks = [WrittenTask(**record) for record in read_lines(path)]
        else:
            tasks = make()
            kept: list[str] = []
            for task in tasks:
                self._judge(task, kept, most)
            write_lines(path, [asdict(t) for t in tasks])
        for task in tasks:
            self.written += 1
            if task.why:
                self.drops.add(task.why, task.instruction)
            else:
                self.kept.append(task)
                self._index.add(task.instruction)

    def _judge(self, task: WrittenTask, kept: list[str], most: int | None) -> None:
        """Note why a task is dropped, or how near a seed it is; `kept`: those of its round before it."""
        config = self.config
        if task.why:
            return
        task.why = fault_of_instruction(task.instruction, config.blocked, config.min_words, config.max_words)
        if task.why:
            return
        words = words_of(task.instruction)
        scores = [rouge_l(words, other) for other in self._seed_words]
        nearest = max(range(len(scores)), key=scores.__getitem__)
        task.similarity, task.nearest = round(scores[nearest], 4), self.seeds[nearest].instruction
        near = self._index.nearest(task.instruction)[1] is not None
        if near or any(rouge_l(words, words_of(other)) >= config.similarity for other in kept):
            task.why = SIMILAR
        elif most is not None and len(self.kept) + len(kept) >= most:
            task.why = ENOUGH
        else:
            kept.append(task.instruction)

    def _new(self, number: int) -> list[WrittenTask]:
        import numpy as np

        config = self.config
        rng = np.random.default_rng([self.seed, 8, number])
        asks = []
        for _ in range(config.requests_per_round):
            shown = _draw(rng, [t.instruction for t in self.seeds], config.seeds_shown)
            shown += _draw(rng, [t.instruction for t in self.kept], config.written_shown)
            asks.append(prompts.ask_instructions(_draw(rng, shown, len(shown)), config.tasks_per_request))
        seeds = rng.integers(2**62, size=len(asks)).tolist()
        out: list[WrittenTask] = []
        for rollout in self.write(asks, seeds, config.sampler):
            if rollout.finish == "error":
                out.append(WrittenTask("", rollout.text if rollout.text else "refused"))
                continue
            tasks, cut = prompts.read_instructions(rollout.text, rollout.finish != "length")
            out += [WrittenTask(t) for t in tasks] + [WrittenTask("", CUT)] * cut
            if not tasks and not cut:
                out.append(WrittenTask("", "an answer without a list of tasks"))
        return out

    def _deeper(self, depth: int, parents: Sequence[int]) -> list[WrittenTask]:
        import numpy as np

        asks, seeds = [], []
        for i in parents:
            rng = np.random.default_rng([self.seed, 10, depth, i])
            asks.append(prompts.ask_deeper(self.kept[i].instruction, prompts.DEEPEN[rng.integers(len(prompts.DEEPEN))]))
            seeds.append(int(rng.integers(2**62)))
        out = []
        for i, rollout in zip(parents, self.write(asks, seeds, self.config.answers), strict=True):
            text = " ".join(rollout.text.removeprefix("New task:").split())
            why = "refused" if rollout.finish == "error" else CUT if rollout.finish == "length" else ""
            out.append(WrittenTask("" if why else text, why or ("" if text else "empty"), depth=depth, parent=i))
        return out


def _draw(rng: Any, items: Sequence[str], count: int) -> list[str]:
    return [items[i] for i in rng.permutation(len(items))[:count]]


def shown_tasks(seeds: Sequence[SeedTask], classification: bool, count: int, rng: Any) -> list[Mapping[str, Any]]:
    """Draw seed tasks of a kind.

    Args:
        seeds: All of them.
        classification: The kind.
        count: How many.
        rng: Draws them.
    """
    fitting = [t for t in seeds if t.classification == classification]
    return [fitting[i].as_dict() for i in rng.permutation(len(fitting))[:count]]
