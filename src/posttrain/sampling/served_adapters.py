"""Adapters that a server adds to one model, by name: checked against the model, opened with their tokenizers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from posttrain.config import ModelConfig
from posttrain.core.errors import ModelError
from posttrain.core.files import named_path
from posttrain.models.adapter_source import AdapterSource
from posttrain.models.language_model import LanguageModel
from posttrain.models.loading import load_tokenizer, resolve, source_adapter
from posttrain.models.quantization import stored_quantization
from posttrain.models.row_adapters import RowAdapter, check_by_rows, read_row_adapter
from posttrain.models.vocabulary import vocabulary_difference
from posttrain.recipe.model_sources import find_model
from posttrain.sampling.protocol import stop_tokens

log = logging.getLogger("posttrain")


@dataclass(frozen=True, eq=False)
class ServedAdapter:
    """Hold what the answers under an adapter's name are computed with.

    Attributes:
        matrices: Its layers.
        tokenizer: Its tokenizer, with its chat template; the base's if it has none.
        ends: Tokens that end an answer.
    """

    matrices: RowAdapter
    tokenizer: Any
    ends: frozenset[int]


def find_served(config: ModelConfig, named: Mapping[str, str]) -> dict[str, AdapterSource]:
    """Return the adapters of a server by name, once it is known that they are of its model. No weights are read.

    Args:
        config: The model.
        named: Source of each adapter: a run's folder, a folder of peft, or a name on the Hub.

    Raises:
        ModelError: A source is no adapter, belongs to another model, has another vocabulary, or is of a kind that can't
            be added to some rows of a batch.
    """
    found: dict[str, AdapterSource] = {}
    ours = load_tokenizer(config) if named else None
    for name, source in named.items():
        source = adapter_folder(source)
        own = config.model_copy(update={"source": source})
        adapter = source_adapter(own)
        if adapter is None:
            raise ModelError(
                f"adapter {name}: expected a folder with adapter_config.json, and {source} holds a whole model. "
                "Start a server for it"
            )
        _check_base(name, adapter, config.source)
        check_by_rows(adapter)
        if adapter.has_tokenizer() and (difference := vocabulary_difference(load_tokenizer(own), ours)):
            raise ModelError(
                f"adapter {name}: its vocabulary differs from that of {config.source}: {difference}. Start a "
                f"server for it alone: posttrain serve {source}"
            )
        if config.quantization is None and stored_quantization(Path(adapter.location)) is not None:
            log.warning(
                "adapter %s was trained beside weights in few bits, and those of %s are full: answers may differ a "
                "little from those in training", name, config.source,
            )  # fmt: skip
        found[name] = adapter
    return found


def adapter_folder(source: str) -> str:
    """Return the adapter that a run trained and merged, for the run's folder; any other source as it is."""
    run = named_path(source)
    made = run / "model"
    if not (run / "manifest.json").is_file() or (made / "adapter_config.json").is_file():
        return source
    stages = sorted(run.glob("stages/*/model"), key=lambda path: int(path.parent.name.partition("-")[0]))
    beside = stages[-1].parent / "adapter" if stages else made
    return str(beside) if (beside / "adapter_config.json").is_file() else source


def _check_base(name: str, adapter: AdapterSource, served: str) -> None:
    """Raise ModelError for an adapter of another model than the one that is served."""
    ours = find_model(served)
    try:
        theirs = find_model(adapter.base)
        same = theirs == ours
        if not same and theirs.kind == ours.kind == "folder":  # a copy of it
            sums = [resolve(source).sha256() for source in (adapter.base, served)]
            same = sums[0] == sums[1] != ""
    except ModelError:  # it is not on this machine
        same = False
    if not same:
        raise ModelError(
            f"adapter {name} belongs to the model {adapter.base}, and {served} is served. Serve its own base; if both "
            f"are the same weights, name {served} as base_model_name_or_path in {adapter.location}/adapter_config.json"
        )


def open_served(model: LanguageModel, config: ModelConfig, source: str, adapter: AdapterSource) -> ServedAdapter:
    """Read an adapter that `find_served` returned.

    Args:
        model: The model.
        config: Its settings.
        source: Source of the adapter.
        adapter: The adapter.

    Raises:
        ModelError: Its weights can't be read or do not fit the model.
    """
    from transformers import GenerationConfig

    tokenizer = load_tokenizer(config.model_copy(update={"source": adapter_folder(source)}))
    settings = model.base.generation_config
    if (Path(adapter.location) / "generation_config.json").is_file():  # which tokens end a turn
        settings = GenerationConfig.from_pretrained(adapter.location)
    ends = stop_tokens(SimpleNamespace(generation_config=settings), tokenizer)
    return ServedAdapter(read_row_adapter(model, adapter), tokenizer, frozenset(ends))
