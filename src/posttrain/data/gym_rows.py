"""Items of reasoning-gym's data sets: problems by name, and rows for training on what comes with them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl

import yaml

from posttrain.config.rl import ReasoningGymConfig
from posttrain.core.errors import DataError, MissingExtraError

PREFIX = "reasoning-gym:"
ITEMS = ReasoningGymConfig.model_fields["size"].default
"""How many are made where nothing says how many: as for problems."""


def items(name: str, size: int, seed: int, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The first `size` items of a data set: question, answer, metadata. Item i is made from seed + i by most sets.

    Raises DataError for a name that reasoning-gym doesn't have and for options that it doesn't take, MissingExtraError
    where it is not installed.
    """
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as error:
        raise MissingExtraError("reasoning-gym is not installed: pip install 'posttrain[reasoning]'") from error
    if name not in DATASETS:
        near = difflib.get_close_matches(name, sorted(DATASETS), 3)
        hint = f"did you mean one of {near}?" if near else f"it has {len(DATASETS)}, such as {sorted(DATASETS)[:5]}"
        raise DataError(f"reasoning-gym has no data set {name!r}: {hint}")
    try:
        made = create_dataset(name, size=size, seed=seed, **options)
        return [made[i] for i in range(size)]
    except Exception as error:  # its settings are checked by assertions and constructors of many kinds
        raise DataError(f"reasoning-gym {name}: {type(error).__name__}: {error} (options: {dict(options)})") from error


def rows(source: str) -> list[dict[str, Any]]:
    """Rows of the data source reasoning-gym:NAME or reasoning-gym:NAME?size=2000&seed=1&OPTION=VALUE.

    Columns: question, answer, and what else the set tells of an item (gsm_symbolic: answer_cot, the worked answer).
    Raises as `items`, and DataError for a source that can't be read.
    """
    name, mark, query = source.removeprefix(PREFIX).partition("?")
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True) if mark else []
        options = {key: yaml.safe_load(value) for key, value in pairs}
    except (ValueError, yaml.YAMLError) as error:
        raise DataError(
            f"data source {source!r}: {error}; expected {PREFIX}NAME, or {PREFIX}NAME?size=2000&seed=1&OPTION=VALUE"
        ) from error
    numbers = {"size": options.pop("size", ITEMS), "seed": options.pop("seed", 0)}
    for (key, number), least in zip(numbers.items(), (1, 0), strict=True):
        if not isinstance(number, int) or isinstance(number, bool) or number < least:
            raise DataError(f"data source {source!r}: {key} is {number!r}; expected a whole number from {least}")
    made = items(name, numbers["size"], numbers["seed"], options)
    return [{**item["metadata"], "question": item["question"], "answer": item["answer"]} for item in made]
