"""Settings that differ by tensor: numbers by depth, and by pattern of names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from posttrain.core.errors import ModelError
from posttrain.methods.merge.merge_settings import Values


def fits_name(pattern: str, name: str) -> bool:
    """Return True if a pattern such as `*.mlp.*` fits a tensor's name, or its module's: the name without its last part."""
    return fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[0], pattern)


def tensor_value(values: Values, name: str, depth: float, default: Values) -> float:
    """Return the number of a setting for one tensor.

    Args:
        values: The setting. A list has its first number at depth 0, its last at depth 1, and lines between them.
        name: Name of the tensor.
        depth: Where it is, from 0 to 1.
        default: The setting where no pattern fits; 1 where none of its own does.
    """
    if isinstance(values, Mapping):
        fitting = next((v for pattern, v in values.items() if fits_name(pattern, name)), default)
        return tensor_value(fitting, name, depth, 1.0)
    if not isinstance(values, list):
        return float(values)
    place = depth * (len(values) - 1)
    low = min(int(place), len(values) - 1)
    high = min(low + 1, len(values) - 1)
    return float(values[low] + (values[high] - values[low]) * (place - low))


def check_patterns(values: Values, names: Iterable[str], setting: str) -> None:
    """Check the patterns of a setting.

    Args:
        values: The setting.
        names: Names of all tensors.
        setting: Its name, for messages.

    Raises:
        ModelError: A pattern fits no tensor.
    """
    if not isinstance(values, Mapping):
        return
    names = list(names)
    for pattern in values:
        if not any(fits_name(pattern, name) for name in names):
            raise ModelError(
                f"{setting}: {pattern!r} fits no tensor of the models. Names are like {', '.join(names[1:3])}; * stands "
                "for any text"
            )
