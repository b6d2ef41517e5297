"""Rollouts on the disk: one Parquet file a step, written whole or not at all, a row for every rollout."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.core.errors import DataError
from posttrain.core.files import numbered
from posttrain.core.image_tokens import image_spans
from posttrain.core.types import PartialRollout, Rollout, RolloutGroup

COLUMN_TYPES: dict[tuple[str, ...], Any] = {
    ("step", "group", "rollout", "problem"): int,
    ("source", "prompt", "completion", "finish"): str,
    ("prompt_tokens", "tokens", "logprobs", "turns", "pieces", "images"): list,
    ("parts", "steps", "failures", "notes"): dict,
    ("reward", "advantage"): float | None,
}
"""Columns of a file that is read, and the type of their values."""


def rollouts_path(folder: Path, step: int) -> Path:
    """Return the file of a step's rollouts."""
    return folder / f"step-{step:06d}.parquet"


def write_rollouts(
    folder: Path,
    step: int,
    groups: Sequence[RolloutGroup],
    advantages: Sequence[Sequence[float | None]] | None,
    prompts: Sequence[str],
    problems: Sequence[int],
    turns: Callable[[Rollout], Sequence[tuple[bool, str]]] | None = None,
) -> Path:
    """Write the rollouts of a step, group by group, as a whole or not at all, with small copies of a prompt's pictures.

    Args:
        folder: Folder of the files.
        step: Number of the step.
        groups: The rollouts.
        advantages: One for each rollout; None: it took no part.
        prompts: Rendered prompt of each group.
        problems: Number of the problem of each group.
        turns: Returns the parts of a rollout's text, each with True if the model wrote it.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = []
    for g, group in enumerate(groups):
        images = [span.picture.preview() for span in image_spans(group.prompt)]
        for i, r in enumerate(group.rollouts):
            rows.append(
                {
                    "step": step,
                    "group": g,
                    "rollout": i,
                    "problem": problems[g],
                    "source": str(group.example.get("source", "")),
                    "prompt": prompts[g],
                    "completion": r.text,
                    "finish": r.finish,
                    "images": images,
                    "prompt_tokens": list(group.prompt),
                    "tokens": list(r.tokens),
                    "logprobs": list(r.logprobs),
                    "mask": None if r.mask is None else [bool(m) for m in r.mask],
                    "reward": r.reward if math.isfinite(r.reward) else None,
                    "advantage": advantages[g][i] if advantages is not None else None,
                    "answer": json.dumps(group.example.get("answer"), ensure_ascii=False, default=str),
                    "parts": json.dumps(dict(r.rewards)),
                    "steps": json.dumps({name: [list(s) for s in steps] for name, steps in r.steps.items()}),
                    "turns": json.dumps(list(turns(r)) if turns is not None else [], ensure_ascii=False),
                    "pieces": json.dumps([[p.tokens, p.step, p.temperature] for p in r.pieces]),
                    "failures": json.dumps(dict(r.failures), ensure_ascii=False),
                    "notes": json.dumps(dict(r.notes), ensure_ascii=False),
                }
            )
    schema = pa.schema(
        [
            *((name, pa.int64()) for name in ("step", "group", "rollout", "problem")),
            *((name, pa.string()) for name in ("source", "prompt", "completion", "finish")),
            ("images", pa.list_(pa.string())),
            ("prompt_tokens", pa.list_(pa.int32())),
            ("tokens", pa.list_(pa.int32())),
            ("logprobs", pa.list_(pa.float32())),
            ("mask", pa.list_(pa.bool_())),
            ("reward", pa.float64()),
            ("advantage", pa.float64()),
            *((name, pa.string()) for name in ("answer", "parts", "steps", "turns", "pieces", "failures", "notes")),
        ]
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = rollouts_path(folder, step)
    work = path.with_name(f".{path.name}.writing")
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), work, compression="zstd")
    os.replace(work, path)
    return path


def rollout_steps(folder: Path) -> list[int]:
    """Return the steps whose rollouts are in a folder, in ascending order."""
    return list(numbered(folder, "step-", ".parquet"))


def read_rollouts(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a file, with values in place of the JSON of some columns.

    Older files without `mask`, `images`, `steps`, `turns`, `pieces` and `notes` are read as rollouts without these.

    Raises:
        DataError: It can't be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path).to_pylist()
        for row in rows:
            _read_columns(row)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, pa.ArrowException) as error:
        raise DataError(f"{path} can't be read as rollouts: {error}. Put it back from a copy") from error
    return rows  # type: ignore[no-any-return]


def _read_columns(row: dict[str, Any]) -> None:
    """Put values in place of the JSON of some columns, and check that the others are there.

    Raises:
        KeyError, TypeError, ValueError: A column is missing, or holds something else.
    """
    for name in ("answer", "parts", "steps", "failures", "notes", "turns", "pieces"):
        row[name] = json.loads(row.get(name) or ("[]" if name in ("turns", "pieces") else "{}"))
    row.setdefault("mask", None)
    row.setdefault("images", [])
    for names, kind in COLUMN_TYPES.items():
        for name in names:
            if not isinstance(row[name], kind):
                raise TypeError(f"the column {name} holds {type(row[name]).__name__}")
    if not all(isinstance(turn, list) and len(turn) == 2 and isinstance(turn[1], str) for turn in row["turns"]):
        raise TypeError("the column turns holds no turns")
    if not all(isinstance(piece, list) and len(piece) == 3 for piece in row["pieces"]):
        raise TypeError("the column pieces holds no pieces")


def groups_of(rows: Sequence[Mapping[str, Any]]) -> list[RolloutGroup]:
    """Return the groups that the rows of one step came from; a rollout without a reward has NaN."""
    by_group: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_group.setdefault(row["group"], []).append(row)
    out = []
    for _, members in sorted(by_group.items()):
        rollouts = [
            Rollout(
                tuple(r["tokens"]),
                tuple(r["logprobs"]),
                r["finish"],
                r["completion"],
                r["parts"],
                math.nan if r["reward"] is None else r["reward"],
                r["mask"],
                {name: [(a, b, score) for a, b, score in steps] for name, steps in r["steps"].items()},
                tuple(PartialRollout(*p) for p in r["pieces"]),
                r["failures"],
                r["notes"],
            )
            for r in members
        ]
        first = members[0]
        example = {"answer": first["answer"], "source": first["source"], "prompt": first["prompt"]}
        out.append(RolloutGroup(tuple(first["prompt_tokens"]), example, rollouts))
    return out
