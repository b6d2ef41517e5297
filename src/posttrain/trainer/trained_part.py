"""Train some of a model's parameters, and keep the others as they are."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from posttrain.core.errors import ModelError

EXAMPLE_NAMES = 5


def train_only(hf: Any, patterns: Sequence[str] | None) -> None:
    """Let only those parameters get gradients whose name, or whose module's name, fits a pattern.

    A tied parameter has several names, and is trained if one of them fits.

    Args:
        hf: The transformers model.
        patterns: Patterns such as `*.mlp.gate`, in which * stands for any text. None: nothing is changed.

    Raises:
        ModelError: A pattern fits no parameter.
    """
    if patterns is None:
        return
    named = dict(hf.named_parameters(remove_duplicate=False))
    fitting = {
        pattern: {n for n in named if fnmatchcase(n, pattern) or fnmatchcase(n.rpartition(".")[0], pattern)}
        for pattern in patterns
    }
    for pattern, names in fitting.items():
        if not names:
            layers = [n for n in named if ".0." in n] or list(named)
            raise ModelError(
                f"train: {pattern!r} fits no parameter of the model. There are {', '.join(layers[:EXAMPLE_NAMES])} and "
                "others; * stands for any text"
            )
    trained = {id(named[name]) for names in fitting.values() for name in names}
    for parameter in named.values():
        parameter.requires_grad_(id(parameter) in trained)
