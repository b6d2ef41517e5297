"""Make items of reasoning-gym's data sets: problems by name, and rows to train on what comes with them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl

import yaml

from posttrain.core.errors import DataError, MissingExtraError

GYM_PREFIX = "reasoning-gym:"
DEFAULT_SIZE = 500
"""Number of items if a source does not say, as for problems."""


def make_items(name: str, size: int, seed: int, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the first items of a data set: question, answer, metadata.

    Args:
        name: Name of the data set.
        size: Number of items.
        seed: Most sets make item i from seed + i.
        options: Settings of the data set.

    Raises:
        DataError: reasoning-gym has no such data set, or does not take the options.
        MissingExtraError: reasoning-gym is not installed.
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


def gym_source_rows(source: str) -> list[dict[str, Any]]:
    """Return the rows of the data source reasoning-gym:NAME or reasoning-gym:NAME?size=2000&seed=1&OPTION=VALUE.

    Columns: question, answer, and the metadata of an item (gsm_symbolic: answer_cot, the worked answer). Raises as
    `make_items`, and DataError for a source of another form.
    """
    name, mark, query = source.removeprefix(GYM_PREFIX).partition("?")
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True) if mark else []
        options = {key: yaml.safe_load(value) for key, value in pairs}
    except (ValueError, yaml.YAMLError) as error:
        raise DataError(
            f"data source {source!r}: {error}; expected {GYM_PREFIX}NAME, or "
            f"{GYM_PREFIX}NAME?size=2000&seed=1&OPTION=VALUE"
        ) from error
    numbers = {"size": options.pop("size", DEFAULT_SIZE), "seed": options.pop("seed", 0)}
    for (key, number), least in zip(numbers.items(), (1, 0), strict=True):
        if not isinstance(number, int) or isinstance(number, bool) or number < least:
            raise DataError(f"data source {source!r}: {key} is {number!r}; expected a whole number from {least}")
    made = make_items(name, numbers["size"], numbers["seed"], options)
    return [{**item["metadata"], "question": item["question"], "answer": item["answer"]} for item in made]
