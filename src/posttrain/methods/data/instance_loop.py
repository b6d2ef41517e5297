"""Give tasks their examples, a chunk at a time, each stored when it is finished."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.core.files import read_lines, write_lines
from posttrain.core.progress import Track
from posttrain.core.types import Rollout, RolloutGroup
from posttrain.data.text_similarity import words_of
from posttrain.methods.data import instruction_prompts as prompts
from posttrain.methods.data.data_stage import chunked
from posttrain.methods.data.instruction_filter import CUT, Drops, faults_of_instances
from posttrain.methods.data.seed_tasks import SeedTask
from posttrain.methods.data.task_loop import WrittenTask, shown_tasks

if TYPE_CHECKING:
    from posttrain.methods.data.self_instruct import AskModel, SelfInstructConfig
    from posttrain.rewards.stack import RewardStack

KINDS_SHOWN = 4
"""Seed tasks of each kind in the question whether a task is a classification."""
TASKS_SHOWN = 3
"""Seed tasks with their examples in the request for examples."""
VERDICT_TOKENS = 6
"""Longest verdict whether a task is a classification."""
JsonRecord = dict[str, Any]


class InstanceLoop:
    """Write examples of tasks, and choose those that become rows."""

    def __init__(
        self,
        config: SelfInstructConfig,
        seeds: Sequence[SeedTask],
        write: AskModel,
        folder: Path,
        seed: int,
        rewards: RewardStack | None,
    ) -> None:
        self.config, self.seeds, self.write, self.folder, self.seed = config, seeds, write, folder, seed
        self.rewards = rewards
        self._copies = [(one["input"], one["output"]) for t in seeds for one in t.instances]

    def __call__(self, tasks: Sequence[WrittenTask]) -> tuple[list[JsonRecord], JsonRecord]:
        """Return the rows, and counts of what was written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        records: list[JsonRecord] = []
        with Track(f"{self.config.name}: examples", len(tasks), 0) as track:
            for c, part in chunked(len(tasks), self.config.prompts_at_once).items():
                path = self.folder / f"chunk-{c:06d}.jsonl"
                if not path.exists():
                    write_lines(path, self._chunk({i: tasks[i] for i in part}))
                records += read_lines(path)
                track.update(len(records))
        rows, drops = [], Drops()
        for record in records:
            if record["why"]:
                drops.add(record["why"], record["instruction"])
            drops.add(CUT, count=record["cut"]) if record["cut"] else None
            for one in record["instances"]:
                if one["why"]:
                    drops.add(one["why"], f"{one['input']} -> {one['output']}")
                else:
                    rows.append(_row(tasks[record["task"]], record, one))
        kinds = Counter("classification" if r["classification"] else "other" for r in records if not r["why"])
        return rows, {"tasks": dict(kinds), "written": len(rows) + sum(drops.counts.values()), **drops.as_dict()}

    def _chunk(self, tasks: Mapping[int, WrittenTask]) -> list[JsonRecord]:
        kinds = self._kinds(tasks)
        records: list[JsonRecord] = [
            {"task": i, "instruction": t.instruction, "classification": kinds[i][0], "why": kinds[i][1], "cut": 0,
             "instances": []}
            for i, t in tasks.items()
        ]  # fmt: skip
        open_records = [r for r in records if not r["why"]]
        asks, seeds = [], []
        for r in open_records:
            rng = self._stream(r["task"], 1)
            shown = shown_tasks(self.seeds, r["classification"], TASKS_SHOWN, rng)
            asks.append(prompts.ask_instances(shown, r["instruction"], r["classification"]))
            seeds.append(int(rng.integers(2**62)))
        for r, rollout in zip(open_records, self.write(asks, seeds, self.config.answers), strict=True):
            if rollout.finish == "error":
                r["why"] = rollout.text or "refused"
                continue
            found, r["cut"] = prompts.read_instances(rollout.text, r["classification"], rollout.finish != "length")
            whys = faults_of_instances(found, self._copies, self.config.max_output)
            r["instances"] = [{**one, "why": why} for one, why in zip(found, whys, strict=True)]
            for one in [x for x in r["instances"] if not x["why"]][self.config.instances :]:
                one["why"] = f"after the first {self.config.instances} of its task"
            if not found and not r["cut"]:
                r["why"] = "an answer without an example"
        pairs = [(r, one) for r in open_records for one in r["instances"] if not one["why"]]
        self._vote(pairs)
        self._score([(r, one) for r, one in pairs if not one["why"]])
        return records

    def _stream(self, *place: int) -> Any:
        import numpy as np

        return np.random.default_rng([self.seed, 9, *place])

    def _kinds(self, tasks: Mapping[int, WrittenTask]) -> dict[int, tuple[bool | None, str]]:
        """Return whether each task is a classification, and why it can't be told."""
        asks, seeds = [], []
        for i, task in tasks.items():
            rng = self._stream(i, 0)
            shown = [t for kind in (True, False) for t in shown_tasks(self.seeds, kind, KINDS_SHOWN, rng)]
            asks.append(prompts.ask_kind([shown[k] for k in rng.permutation(len(shown))], task.instruction))
            seeds.append(int(rng.integers(2**62)))
        greedy = self.config.answers.model_copy(update={"temperature": 0.0, "max_tokens": VERDICT_TOKENS})
        out: dict[int, tuple[bool | None, str]] = {}
        for i, rollout in zip(tasks, self.write(asks, seeds, greedy), strict=True):
            verdict = None if rollout.finish == "error" else prompts.read_kind(rollout.text)
            out[i] = verdict, "" if verdict is not None else "no verdict whether it is a classification"
        return out

    def _vote(self, pairs: Sequence[tuple[JsonRecord, JsonRecord]]) -> None:
        """Replace outputs with the one that most answers give."""
        votes = self.config.votes
        if votes == 1 or not pairs:
            return
        asks, seeds = [], []
        for number, (r, one) in enumerate(pairs):
            ask = prompts.ask_output(r["instruction"], one["input"])
            rng = self._stream(r["task"], 2, number)
            asks += [ask] * votes
            seeds += rng.integers(2**62, size=votes).tolist()
        answers = self.write(asks, seeds, self.config.answers)
        for k, (_, one) in enumerate(pairs):
            texts = [prompts.read_output(a.text) for a in answers[k * votes : (k + 1) * votes] if _whole(a)]
            counts = Counter(" ".join(words_of(t)) for t in texts if words_of(t)).most_common(2)
            one["votes"] = counts[0][1] if counts else 0
            if one["votes"] < 2 or (len(counts) > 1 and counts[1][1] == one["votes"]):
                one["why"] = "no output with most votes"
            else:
                one["written"], one["output"] = (
                    one["output"],
                    next(t for t in texts if " ".join(words_of(t)) == counts[0][0]),
                )

    def _score(self, pairs: Sequence[tuple[JsonRecord, JsonRecord]]) -> None:
        """Drop what has too low a reward."""
        if self.rewards is None or not pairs:
            return
        groups = []
        for r, one in pairs:
            turns = [{"role": "user", "content": prompts.prompt_of(r["instruction"], one["input"])}]
            example = {"messages": turns, "answer": "", "source": f"task {r['task']}"}
            groups.append(RolloutGroup((), example, [Rollout((), (), "end", one["output"])]))
        for (_, one), group in zip(pairs, self.rewards(groups).groups, strict=True):
            rollout = group.rollouts[0]
            if rollout.failures:
                one["why"] = "a reward failed"
                continue
            one["reward"] = rollout.reward
            if rollout.reward < self.config.threshold:
                one["why"] = "a reward below the threshold"


def _whole(answer: Rollout) -> bool:
    return answer.finish not in ("error", "length")


def _row(task: WrittenTask, record: JsonRecord, one: JsonRecord) -> JsonRecord:
    """Return a row for supervised fine-tuning."""
    about = {"instruction": task.instruction, "classification": record["classification"], "task": record["task"]}
    about |= {"origin": "deepened" if task.depth else "written", "similarity": task.similarity, "depth": task.depth}
    about |= {name: one[name] for name in ("reward", "votes") if name in one}
    return {"prompt": prompts.prompt_of(task.instruction, one["input"]), "completion": one["output"], **about}
