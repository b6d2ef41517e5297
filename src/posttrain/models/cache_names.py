"""Names of a model's cache of keys and values: `past_key_values` until transformers 5.23, `cache` from 5.24 on.

A model that brings its own code may have the older name under any transformers.
"""

from __future__ import annotations

import inspect
from typing import Any


def cache_argument(model: Any) -> str:
    """Return the name by which the model's forward pass, and its `generate`, take a cache."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


def cache_of(output: Any) -> Any:
    """Return the cache that a forward pass returned with its output."""
    cache = getattr(output, "cache", None)
    return output.past_key_values if cache is None else cache
