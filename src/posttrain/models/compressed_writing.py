"""Write a model that has quantised weights in few bits, under the names that its type has in files."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain.models.compressed_tensors import compress_folder
from posttrain.models.quantized_weight import unchanged_weights
from posttrain.models.stored_parts import StoredPart, parts_of_wholes, stored_parts

NOT_IN_TRANSFORMERS = "can't read the experts of this type in few bits"
"""Note of a model whose experts transformers would leave random: it has no rule that puts quantised ones together."""
log = logging.getLogger("posttrain")


def write_compressed(hf: Any, folder: Path) -> str | None:
    """Write the quantised weights of a model in few bits, in a folder that has them in full.

    Args:
        hf: The model.
        folder: Where transformers has saved it.

    Returns:
        Why transformers can't read the folder. None: it can.

    Raises:
        ModelError: The type stores a quantised weight in one tensor with others.
    """
    weights = unchanged_weights(hf)
    if not weights:
        return None
    parts = stored_parts(hf)
    written = {part.name: part.of(weights[part.matrix.name]) for part in parts if part.matrix.name in weights}
    missing = weights.keys() - {part.matrix.name for part in parts}
    written |= {name: weights[name] for name in missing}  # no file has them: which is reported there
    tables = [id(hf.get_input_embeddings())]
    linear = [part for part in parts if id(part.matrix.module) not in tables]
    wholes = {
        key: ([part.name for part in slices], slices[0].matrix.transposed)
        for key, slices in parts_of_wholes(parts).items()
        if any(part.name in written for part in slices)
    }
    own = [part.name for part in linear if part.name in written]
    compress_folder(folder, written, own, _names_in_full(linear, set(written)), wholes)
    if wholes:
        log.warning(
            "%s: transformers keeps all experts of a layer of this type in one tensor, also in files, and can't read "
            "them in few bits: it would open the model with random experts. posttrain opens it as it is",
            hf.config.get_text_config().model_type,
        )
    return NOT_IN_TRANSFORMERS if wholes else None


def _names_in_full(parts: Sequence[StoredPart], written: set[str]) -> list[str]:
    """Return how config.json names what is in full: by module and, if that differs, by file; of experts patterns.

    A pattern stands for all experts of a layer, which may be thousands. If some of them are quantised, those that are
    not are named one by one.
    """
    in_bits = {id(part.matrix.module) for part in parts if part.name in written}
    names: list[str] = []
    for part in parts:
        expert = part.matrix.expert
        if part.name in written:
            continue
        if expert is None:
            names += [part.matrix.name, part.name]
        elif id(part.matrix.module) in in_bits:
            names.append(part.name)
        else:
            before = part.name.removesuffix(f".{expert}") if part.whole else part.name.rpartition(f".{expert}.")[0]
            if part.whole and ".experts." in before:  # a parameter of the experts, as "experts.down_proj"
                before = before.rpartition(".")[0]
            names.append(f"re:{re.escape(before)}\\..*" if before else part.name)
    return list(dict.fromkeys(names))
