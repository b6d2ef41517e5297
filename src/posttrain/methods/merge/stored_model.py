"""Models as files of weights, of which one tensor is read at a time.

Files are mapped into memory while a tensor is read, and no longer: what stays is a copy of that tensor. An adapter is
added to its base tensor by tensor. What can't be read like this (kinds of adapters other than plain low-rank ones, tokens
without a row, files of pickled weights, models that are made) is opened once and written as files beside the result.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.config import ModelConfig
from posttrain.core.errors import ModelError
from posttrain.data.sample_store import vocabulary_size
from posttrain.methods.merge.model_layout import ModelLayout, layout_of
from posttrain.methods.merge.vocabulary_rows import RowPlan
from posttrain.methods.merge.weight_writer import CODES
from posttrain.models.adapter_export import is_plain_adapter, low_rank_factors
from posttrain.models.adapter_source import AdapterSource
from posttrain.models.loading import (
    base_settings,
    check_made,
    load_settings,
    open_model,
    quiet,
    resolve,
    source_adapter,
    tokenizer_and_new_ids,
)
from posttrain.models.quantization import method_of
from posttrain.models.soft_prompt_files import is_soft_prompt

HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py"]
STORED_DTYPES = {code: dtype for dtype, code in CODES.items() if dtype.is_floating_point}
"""Dtypes of weights in files; others (integers, bytes) are taken from the base as they are."""
log = logging.getLogger("posttrain")


@dataclass(frozen=True)
class StoredTensor:
    """Hold where a tensor is.

    Attributes:
        file: File of weights.
        key: Its name there.
        shape: Its shape.
        dtype: As the file has it; None for what is no floating-point number.
    """

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None


@dataclass(frozen=True)
class StoredModel:
    """Hold a model as files.

    Attributes:
        source: Its source, for messages.
        folder: Folder of its files.
        config: Its transformers configuration.
        layout: Names of its tensors.
        tensors: Where they are; tied ones once.
        tokenizer: Its tokenizer.
        generation: Its generation settings.
        deltas: Low-rank factors (B, A) by name of the tensor that they are added to, scale included.
        notes: What reading it takes beside its files, for the manifest.
        rows: How its tables of tokens are arranged for another tokenizer. None: as they are.
    """

    source: str
    folder: Path
    config: Any
    layout: ModelLayout
    tensors: dict[str, StoredTensor]
    tokenizer: Any
    generation: Any
    deltas: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    rows: RowPlan | None = None

    def stored_name(self, name: str) -> str:
        """Return the name under which a tensor is stored: of a tied one that of the other."""
        return name if name in self.tensors else self.layout.tied.get(name, name)

    def has(self, name: str) -> bool:
        """Return True if the model has a tensor, tied or not."""
        return self.stored_name(name) in self.tensors

    def entry(self, name: str) -> StoredTensor:
        """Return where a tensor is."""
        return self.tensors[self.stored_name(name)]

    def read(self, name: str) -> Tensor:
        """Read a tensor, in float32 if it is of floating-point numbers, with what an adapter adds to it."""
        from safetensors import safe_open

        stored = self.stored_name(name)
        entry = self.tensors[stored]
        with safe_open(entry.file, framework="pt") as file:
            value: Tensor = file.get_tensor(entry.key)
            # A copy, because the file's mapping must end here: pages that were read count as this process's memory.
            value = value.clone() if entry.dtype in (None, torch.float32) else value.to(torch.float32)
        if stored in self.deltas:
            b, a = self.deltas[stored]
            value += (b @ a).T if stored in self.layout.transposed else b @ a
        return self.rows.arrange(name, value) if self.rows is not None and name in self.layout.vocabulary else value


def open_stored(config: ModelConfig, scratch: Path) -> StoredModel:
    """Open the model at a source as files.

    Args:
        config: The source.
        scratch: Empty folder for the files of a model that has to be written first.

    Raises:
        ModelError: It can't be opened, is quantised, or has a soft prompt.
    """
    quiet()
    if config.quantization is not None:
        raise ModelError("model.quantization makes weights in 4 bits, and merging changes weights: leave it out")
    found, adapter = resolve(config.source), source_adapter(config)
    check_made(config.source, Path(found.location))
    if adapter is not None:
        return _open_adapter(config, adapter, scratch)
    settings, (tokenizer, new) = load_settings(config), tokenizer_and_new_ids(config)
    if settings is None:
        return _written(config, scratch)
    if method_of(settings) is not None:
        raise ModelError(
            f"model source {config.source!r} has quantised weights, and merging changes weights: use the model in 16 or "
            "32 bit"
        )
    folder = Path(found.location) if found.kind == "folder" else _download(config)
    files = sorted(folder.glob("*.safetensors"))
    layout = layout_of(settings, config.source, config.trust_remote_code)
    rows = layout.shapes[layout.vocabulary[0]][0]
    if not files or new or vocabulary_size(tokenizer) > rows:
        return _written(config, scratch)
    return StoredModel(
        config.source, folder, settings, layout, _entries(files, layout, config.source), tokenizer,
        _generation(folder, settings),
    )  # fmt: skip


def _download(config: ModelConfig) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(config.source, revision=config.revision, allow_patterns=HUB_FILES))


def _generation(folder: Path, settings: Any) -> Any:
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_model_config(settings)


def _entries(files: list[Path], layout: ModelLayout, source: str) -> dict[str, StoredTensor]:
    """Return where the tensors are. Files that an index does not name, such as copies in another format, are left out."""
    from safetensors import safe_open

    index = files[0].with_name("model.safetensors.index.json")
    if index.is_file():
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if missing := sorted(named - {file.name for file in files}):
            raise ModelError(f"model source {source!r}: {missing[0]} is missing, which {index.name} names")
        files = [file for file in files if file.name in named]
    elif (single := files[0].with_name("model.safetensors")) in files:
        files = [single]
    out: dict[str, StoredTensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():
                    part = opened.get_slice(key)
                    shape, dtype = tuple(part.get_shape()), STORED_DTYPES.get(part.get_dtype())
                    out[layout.canonical(key)] = StoredTensor(file, key, shape, dtype)
        except Exception as error:  # safetensors has errors of several kinds for a damaged file
            raise ModelError(f"model source {source!r}: {file.name} can't be read ({error})") from error
    for name, other in layout.tied.items():  # some files hold a tied tensor twice, some under the other name alone
        twin = out.pop(name, None)
        if twin is not None and other not in out:
            out[other] = twin
    return out


def _open_adapter(config: ModelConfig, adapter: AdapterSource, scratch: Path) -> StoredModel:
    """Open an adapter's base, and add a plain low-rank adapter tensor by tensor; others are merged and written first."""
    from peft import load_peft_weights

    if is_soft_prompt(adapter.settings):
        raise ModelError(
            f"model source {config.source!r} is a soft prompt, which changes no weight of its model: it can't be merged"
        )
    if not is_plain_adapter(adapter.settings):
        return _written(config, scratch)
    where = {"revision": adapter.revision} if adapter.revision else {}
    factors = low_rank_factors(load_peft_weights(adapter.location, device="cpu", **where), adapter.settings)
    base = open_stored(base_settings(config, adapter), scratch)
    tokenizer, new = tokenizer_and_new_ids(config)
    deltas: dict[str, tuple[Tensor, Tensor]] = {}
    for module, parts in (factors or {}).items():
        name = base.stored_name(f"{module}.weight")
        fits = (
            set(parts) == {"lora_A", "lora_B"} and name in base.tensors and f"{module}.weight" not in base.layout.tied
        )
        product = (parts["lora_B"].shape[0], parts["lora_A"].shape[1]) if fits else ()
        product = product[::-1] if name in base.layout.transposed else product
        if not fits or base.tensors[name].shape != product:
            factors = None
            break
        deltas[name] = parts["lora_B"], parts["lora_A"]
    rows = base.layout.shapes[base.layout.vocabulary[0]][0]
    if factors is None or new or vocabulary_size(tokenizer) > rows or base.deltas:
        return _written(config, scratch)
    own = Path(adapter.location)
    generation = _generation(own, base.config) if (own / "generation_config.json").is_file() else base.generation
    notes = {"adapter": f"{len(deltas)} matrices, added to {adapter.base}"}
    return StoredModel(
        config.source, base.folder, base.config, base.layout, base.tensors, tokenizer, generation, deltas, notes
    )


def _written(config: ModelConfig, scratch: Path) -> StoredModel:
    """Open a model as posttrain does, write it as files, and open those."""
    log.info("%s is opened whole, and written as files to merge", config.source)
    opened = open_model(config.model_copy(update={"device": "cpu"}), torch.float32)
    opened.hf.save_pretrained(scratch)
    settings, source = opened.hf.config, config.source
    layout = layout_of(settings, source, config.trust_remote_code)
    tensors = _entries(sorted(scratch.glob("*.safetensors")), layout, source)
    notes = {"written": "opened whole, in float32"}
    tokenizer, generation = opened.tokenizer, opened.hf.generation_config
    return StoredModel(source, scratch, settings, layout, tensors, tokenizer, generation, {}, notes)
