"""The two parts of an evaluation's items: those that something may be chosen by, and those that are reported.

An item belongs to the validation part if the SHA-256 of its prompt with its pictures (of its text, if it has no
prompt), as a fraction of 2^256, is below the evaluation's `validation`. So the parts share no prompt whatever the order
of the rows, the seed or the tokenizer, and evaluations with the same share put the same prompt on the same side.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal

from posttrain.config.evaluation import EvaluationBase
from posttrain.core.errors import DataError, RecipeError
from posttrain.data.rows import PreparedItems

ItemPart = Literal["validation", "report"]


def is_validation(row: Mapping[str, Any], share: float) -> bool:
    """Return True if an item belongs to the validation part.

    Args:
        row: Its row, with `messages` (the turns before the answer) or, without any, `completion` (the text).
        share: Share of the items that do.
    """
    turns = [
        [turn["role"], turn["content"], *(picture.digest for picture in turn.get("images", ()))]
        for turn in row.get("messages") or []
    ]
    key = json.dumps(turns or row.get("completion"), ensure_ascii=False, sort_keys=True, default=str)
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()) < share * 2**256


def item_part(data: Any, task: EvaluationBase, part: ItemPart) -> Any:
    """Return the items of one part of an evaluation's data.

    Args:
        data: What the evaluation read.
        task: Its settings.
        part: validation or report. Without `validation` in the settings all items are reported.

    Raises:
        DataError: A part would be empty.
        RecipeError: The data are of a kind that has no rows.
    """
    if not task.validation:
        if part == "report":
            return data
        raise DataError(
            f"evaluation {task.name} has no items for validation: set its validation to a share, such as 0.5"
        )
    if not isinstance(data, PreparedItems):
        raise RecipeError(
            f"evaluation {task.name}: validation divides rows and problems, and this evaluation reads something else "
            "(a subclass of posttrain.data.rows.PreparedItems is expected): leave it out"
        )
    rows: Any = getattr(data, "rows", None) or [item.problem for item in data.items]
    numbers: dict[bool, list[int]] = {True: [], False: []}
    for number, row in enumerate(rows):
        numbers[is_validation(row, task.validation)].append(number)
    if not all(numbers.values()):
        raise DataError(
            f"evaluation {task.name}: validation {task.validation:g} of {len(data)} items leaves "
            f"{len(numbers[True])} to choose by and {len(numbers[False])} to report: add items, or set another share"
        )
    out = data.take(numbers[part == "validation"])
    out.stats.update(used=len(out), validation=len(numbers[True]))
    return out
