"""Opening models: Hub names, folders, GGUF files (converted once and cached), tiny random ones."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from posttrain.config import ModelConfig
from posttrain.core.errors import MissingExtraError, ModelError
from posttrain.core.files import (
    cache_folder,
    changed_artifacts,
    input_hash,
    is_weights,
    named_path,
    read_small_text,
    write_json,
)
from posttrain.core.hub import check_hub
from posttrain.core.process_memory import free_cycles
from posttrain.data.image_reader import keep_processor
from posttrain.data.sample_store import vocabulary_size
from posttrain.data.template_source import set_template_args
from posttrain.models.adapter_source import AdapterSource, find_adapter, merge_into_base
from posttrain.models.backends import backend_for
from posttrain.models.compressed_reading import is_read_here, read_compressed
from posttrain.models.ensemble import Ensemble
from posttrain.models.ensemble_files import NOT_TRAINED, EnsembleSource, find_ensemble
from posttrain.models.gguf_conversion import write_converted
from posttrain.models.max_length import context, why_short
from posttrain.models.model_types import auto_class
from posttrain.models.opening_errors import explained
from posttrain.models.quantization import (
    check_readable,
    finish_reading,
    method_of,
    reading_arguments,
    stored_quantization,
)
from posttrain.models.quantized_weight import forget_quantized
from posttrain.models.soft_prompt_files import is_soft_prompt, open_soft_prompt
from posttrain.models.tiny_model import tiny_model, tiny_tokenizer
from posttrain.models.vocabulary import add_tokens, check_same_vocabulary, embedding_rows, fit_embedding
from posttrain.recipe.model_sources import ENSEMBLE_FILE, find_model

CONVERTER = "1"
"""Part of the cache key: raised when the conversion of GGUF files changes."""
LAB_VERSION = "2"
"""Part of the name of a laboratory's folder: raised when what `posttrain lab` makes changes."""
SHOWN_TOKENS = 5
log = logging.getLogger("posttrain")


def quiet() -> None:
    """Switch off transformers' progress bars for loading and saving, and its notes on renamed methods."""
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")


@dataclass(frozen=True)
class Resolved:
    """Location of a model's files: a folder, a Hub name, or a type to make at random."""

    location: str
    kind: str  # folder | hub | tiny

    def sha256(self) -> str:
        """Compute one hash of the weight files, for the manifest; empty if there are none on this disk."""
        return _folder_hash(Path(self.location)) if self.kind == "folder" else ""


def resolve(source: str) -> Resolved:
    """Turn a model source into something transformers can open, converting a GGUF file on first use.

    Raises:
        ModelError: There is nothing of that name, with what was looked for; or it has to come from the Hub, which can't
            be reached.
    """
    found = find_model(source)
    if found.kind == "lab":
        kind, seed = found.location.split(":")
        return Resolved(str(_lab(int(seed), kind)), "folder")
    if found.kind == "gguf":
        return _convert(Path(found.location))
    if found.kind == "hub":
        check_hub([found.location])
    return Resolved(found.location, found.kind)


def lab_folder(seed: int, kind: str = "sums") -> Path:
    """Return the folder of the laboratory of a seed, made or not."""
    return cache_folder() / "lab" / f"{'' if kind == 'sums' else f'{kind}-'}{seed}-{LAB_VERSION}"


def _lab(seed: int, kind: str) -> Path:
    """The laboratory's folder; made, by a process of its own, where it is not there yet."""
    folder, asked = lab_folder(seed, kind), f"lab --kind {kind} --seed {seed}"
    if not (folder / "lab.json").exists():
        log.info("making a laboratory (%s; once, kept in %s)", asked, folder)
        if subprocess.run([sys.executable, "-m", "posttrain", *asked.split()], check=False).returncode:
            raise ModelError(f"the laboratory could not be made; posttrain {asked} says why")
    return folder


def _folder_hash(folder: Path) -> str:
    """One hash for a model's folder: of the hashes of its weight files."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.bin")):
        digest.update(f"{path.name} {input_hash(path)}\n".encode())
    ensemble = find_ensemble(folder)
    if ensemble is not None:
        parts = [
            resolve(member.source).sha256() for member in ensemble.member_settings(ModelConfig(source=str(folder)))
        ]
        digest.update(f"{read_small_text(folder / ENSEMBLE_FILE)} {parts}".encode())
    return digest.hexdigest()


@lru_cache(maxsize=8)
def _convert(gguf: Path) -> Resolved:
    """GGUF to the Hugging Face layout in the cache, whole or not at all; later calls find it there."""
    sha = input_hash(gguf)
    target = cache_folder() / "models" / f"{gguf.stem}-{sha[:16]}-{CONVERTER}"
    if not (target / "config.json").exists():
        if importlib.util.find_spec("gguf") is None:
            raise MissingExtraError("opening a GGUF file needs the package gguf: pip install 'posttrain[gguf]'")
        log.info("converting %s (once; kept in %s)", gguf.name, target)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".converting-") as scratch:
            work = Path(scratch) / "model"
            quiet()
            write_converted(gguf, work)
            write_json(work / "source.json", {"file": gguf.name, "converter": CONVERTER})
            try:
                os.rename(work, target)
            except OSError:
                if not (target / "config.json").exists():  # else another process was first: its files serve
                    shutil.rmtree(target, ignore_errors=True)
                    os.rename(work, target)
    return Resolved(str(target), "folder")


def pick_device(name: str) -> torch.device:
    """Pick a device: auto is CUDA (this rank's), else MPS, else CPU. Raises ModelError for one that is not there."""
    if name == "auto":
        if torch.cuda.is_available():
            # Ray shows each process its own GPU alone, torchrun shows all.
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"device {name!r} is not one torch knows: use auto, cpu, cuda, cuda:1 or mps") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"device {name!r} was asked for, but torch sees no GPU (posttrain doctor tells more)")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Pick a dtype: auto is bfloat16 on a GPU that has it, float32 elsewhere."""
    if name == "auto":
        half = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if half else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def load_tokenizer(config: ModelConfig) -> Any:
    """Load the model's tokenizer (an adapter without has its base's), with what the recipe adds and sets."""
    return tokenizer_and_new_ids(config)[0]


def tokenizer_and_new_ids(config: ModelConfig) -> tuple[Any, list[int]]:
    """Do what `load_tokenizer` does, and return also the ids of tokens that the recipe adds to the source's."""
    from transformers import AutoTokenizer

    found, adapter = resolve(config.source), source_adapter(config)
    if found.kind == "tiny":
        tokenizer = tiny_tokenizer()
    elif adapter is not None and not adapter.has_tokenizer():
        tokenizer = load_tokenizer(base_settings(config, adapter))
    else:
        with explained(config.source):
            own = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
            tokenizer = AutoTokenizer.from_pretrained(found.location, **own)
        keep_processor(tokenizer, found.location, **own)
    new = add_tokens(tokenizer, config.add_tokens)
    if config.chat_template is not None:
        path = named_path(config.chat_template)
        is_file = "{" not in config.chat_template and path.is_file()
        try:
            tokenizer.chat_template = read_small_text(path) if is_file else config.chat_template
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"model.chat_template {str(path)!r} can't be read: {error}") from error
    set_template_args(tokenizer, config.chat_template_args)
    return tokenizer, new


def source_adapter(config: ModelConfig) -> AdapterSource | None:
    """Return the adapter at a source; None for a whole model."""
    found = resolve(config.source)
    return find_adapter(found.location, found.kind, config.revision)


def source_ensemble(config: ModelConfig) -> EnsembleSource | None:
    """Return the ensemble at a source; None for one model."""
    found = resolve(config.source)
    return find_ensemble(Path(found.location)) if found.kind == "folder" else None


def base_settings(config: ModelConfig, adapter: AdapterSource) -> ModelConfig:
    """Return the settings by which an adapter's base is opened: what else the recipe sets is for the adapter's."""
    stored = stored_quantization(Path(adapter.location))
    quantization = config.quantization if stored is None else stored
    own: dict[str, Any] = {"chat_template": None, "chat_template_args": {}, "add_tokens": []}
    base = {"source": adapter.base, "revision": adapter.base_revision, "quantization": quantization}
    return config.model_copy(update={**base, **own})


def load_settings(config: ModelConfig) -> Any:
    """Load the configuration of the transformers model at a source; an adapter's is its base's. None: a tiny model."""
    from transformers import AutoConfig

    found, adapter = resolve(config.source), source_adapter(config)
    if adapter is not None:
        return load_settings(base_settings(config, adapter))
    if (ensemble := source_ensemble(config)) is not None:
        members = [load_settings(member) for member in ensemble.member_settings(config)]
        return min((m for m in members if m is not None), key=lambda m: context(m) or 2**31, default=None)
    if found.kind == "tiny":
        return None
    with explained(config.source):
        settings = AutoConfig.from_pretrained(
            found.location, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    if not is_read_here(found.location, settings) or config.quantization is not None:
        check_readable(config, settings)
    return settings


def context_length(config: ModelConfig) -> int | None:
    """Return how long a sequence may be in tokens, by the model's configuration alone (None: it names nothing).

    Warns if that is less than the model is made for: see `max_length`.
    """
    settings = load_settings(config)
    if settings is None:
        return 2048
    found_length, made_for = context(settings), getattr(settings.get_text_config(), "max_position_embeddings", None)
    if found_length is not None and found_length < (made_for or 0):
        warnings.warn(why_short(settings), stacklevel=2)
    return found_length


@dataclass(frozen=True)
class OpenedModel:
    """Hold a transformers model on its device.

    Attributes:
        hf: The model.
        tokenizer: Its tokenizer.
        notes: What was changed on opening it, for the manifest.
        new_tokens: Ids of tokens whose rows of the embedding were set on opening: nothing has trained them.
    """

    hf: Any
    tokenizer: Any
    notes: dict[str, Any]
    new_tokens: tuple[int, ...] = ()


def load_model(config: ModelConfig, dtype: torch.dtype | None = None, inference: bool = False) -> tuple[Any, Any]:
    """Load a transformers model, on its device, and its tokenizer.

    Args:
        config: Source of the model.
        dtype: Overrides the configured one.
        inference: Hold quantised weights packed only, if possible. Such a model is neither trained nor saved.

    Raises:
        ModelError: The source can't be opened, with what to do.
    """
    opened = open_model(config, dtype, inference)
    return opened.hf, opened.tokenizer


def open_model(config: ModelConfig, dtype: torch.dtype | None = None, inference: bool = False) -> OpenedModel:
    """Do what `load_model` does, and tell what was changed: adapters that were merged, rows that tokens were given.

    Args:
        config: Source of the model.
        dtype: Overrides the configured one.
        inference: As there.

    Raises:
        ModelError: The source can't be opened, with what to do.
    """
    quiet()
    device = pick_device(config.device)
    dtype = dtype or pick_dtype(config.dtype, device)
    backend_for(device).tune()
    found, adapter = resolve(config.source), source_adapter(config)
    check_made(config.source, Path(found.location))
    if (ensemble := source_ensemble(config)) is not None:
        if not inference:
            raise ModelError(f"model source {config.source!r} is {NOT_TRAINED}")
        return _open_ensemble(ensemble, config, dtype)
    if adapter is not None:
        _check_causal(config, adapter)
        return merge_start(open_model(base_settings(config, adapter), dtype), adapter, config)
    tokenizer, new = tokenizer_and_new_ids(config)
    if found.kind != "tiny":
        settings = load_settings(config)
        rows = getattr(settings.get_text_config(), "vocab_size", 0) if inference else 0
        fits = not new and vocabulary_size(tokenizer) <= rows  # no row of the embedding is to be written
        hf, notes = read_weights(auto_class(settings), found.location, config, device, dtype, fits)
        return with_rows(OpenedModel(hf, tokenizer, notes), new, config)
    with explained(config.source):
        hf = tiny_model(found.location, len(tokenizer) - len(new))
    if config.quantization is None:
        return with_rows(OpenedModel(hf.to(device=device, dtype=dtype), tokenizer, {}), new, config)
    with tempfile.TemporaryDirectory() as folder:  # weights are quantised while they are read
        hf.save_pretrained(folder)
        hf, notes = read_weights(auto_class(hf.config), folder, config, device, dtype)
    return with_rows(OpenedModel(hf, tokenizer, notes), new, config)


def _open_ensemble(ensemble: EnsembleSource, config: ModelConfig, dtype: torch.dtype) -> OpenedModel:
    """Open all members; they must have the vocabulary of the ensemble's tokenizer."""
    from transformers import GenerationConfig

    tokenizer, new = tokenizer_and_new_ids(config)
    if new:
        raise ModelError(f"model source {config.source!r} is an ensemble: leave model.add_tokens out")
    members = [open_model(member, dtype, inference=True) for member in ensemble.member_settings(config)]
    for member, opened in zip(ensemble.members, members, strict=True):
        check_same_vocabulary(member.source, opened.tokenizer, tokenizer)
    hf = Ensemble([opened.hf for opened in members], ensemble.weights, ensemble.pool, ensemble.confidence).eval()
    if (ensemble.folder / "generation_config.json").is_file():  # which tokens end a turn
        hf.generation_config = GenerationConfig.from_pretrained(ensemble.folder)
    return OpenedModel(hf, tokenizer, {})


def check_made(source: str, folder: Path) -> None:
    """Check a model that a finished run made; of changed files that are no weights it warns.

    Args:
        source: The model's source, for messages.
        folder: Its folder, which may be a run's.

    Raises:
        ModelError: Its weights are not what the run wrote.
    """
    for run in list(folder.parents)[:3]:  # RUN/model, RUN/stages/NUMBER-NAME/model
        changed = changed_artifacts(run, f"{folder.relative_to(run).as_posix()}/")
        bad = [name for name in changed if is_weights(name)]
        if bad:
            raise ModelError(
                f"model source {source!r}: {run / bad[0]} is not what the run wrote (its checksum differs, or it is "
                "missing). Put it back from a copy, or run the recipe again with --fresh"
            )
        for name in changed:
            log.warning("%s was changed after the run wrote it, or is missing", run / name)


def with_rows(opened: OpenedModel, new: Sequence[int], config: ModelConfig) -> OpenedModel:
    """Return the model with a row of the embedding for every token of its tokenizer.

    Args:
        opened: The model.
        new: Ids of tokens that the recipe added.
        config: Source of the model.
    """
    rows = embedding_rows(opened.hf)
    fresh = fit_embedding(opened.hf, opened.tokenizer, new, config.source)
    if not fresh:
        return opened
    named = opened.tokenizer.convert_ids_to_tokens(fresh[:SHOWN_TOKENS])
    note = {"new_tokens": len(fresh), "first": named, "rows_before": rows, "rows": embedding_rows(opened.hf)}
    return replace(opened, notes={**opened.notes, "vocabulary": note}, new_tokens=tuple(fresh))


def describe_vocabulary(config: ModelConfig) -> str | None:
    """Return what `with_rows` will do to the model at a source, from its configuration alone; None: nothing."""
    settings, (tokenizer, new) = load_settings(config), tokenizer_and_new_ids(config)
    size, rows = vocabulary_size(tokenizer), getattr(settings and settings.get_text_config(), "vocab_size", None)
    rows = size - len(new) if settings is None else rows
    if rows is None or not (new or size > rows):
        return None
    adapter = source_adapter(config)
    if adapter is not None and not new:  # the rows that its base lacks are the adapter's own
        return None
    fresh = sorted({*new, *range(rows, size)})
    names = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(fresh[:SHOWN_TOKENS])))
    return (
        f"the tokenizer has {size:,} tokens and the embedding {rows:,} rows: {len(fresh):,} tokens have no trained row "
        f"({names}{', ...' if len(fresh) > SHOWN_TOKENS else ''}); theirs start at the mean of the others"
    )


def read_weights(
    kind: Any, location: str, config: ModelConfig, device: torch.device, dtype: torch.dtype, inference: bool = False
) -> tuple[Any, dict[str, Any]]:
    """Read a transformers model onto a device; return it with notes for the manifest.

    Args:
        kind: An Auto class of transformers.
        location: Folder, or name on the Hub.
        config: The model's settings in the recipe.
        device: Device of the model.
        dtype: Compute dtype.
        inference: Hold quantised weights packed only, if possible.

    Raises:
        ModelError: The source can't be opened, with what to do.
    """
    from transformers import AutoConfig

    free_cycles(Path(location))
    own = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    with explained(config.source):
        settings = AutoConfig.from_pretrained(location, **own)
    if is_read_here(location, settings) and config.quantization is None:
        with explained(config.source):
            return read_compressed(kind, Path(location), settings, device, dtype, inference)
    check_readable(config, settings)
    arguments = reading_arguments(config, settings, device, dtype)
    try:
        with explained(config.source, every=not arguments):
            hf = kind.from_pretrained(location, dtype=dtype, attn_implementation="eager", **arguments, **own)
    except (RuntimeError, ImportError, AttributeError, NotImplementedError) as error:
        if not arguments:
            raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"model source {config.source!r}: its quantised weights can't be read here: {first}"
        ) from error
    hf = hf if "device_map" in arguments else hf.to(device)
    return hf, finish_reading(hf, config, method_of(settings), dtype)


def merge_start(base: OpenedModel, adapter: AdapterSource, config: ModelConfig) -> OpenedModel:
    """Return the model that an adapter makes of its base: merged in memory, or with a soft prompt (a peft model).

    Args:
        base: The base; it is used up.
        adapter: The adapter.
        config: Source of the adapter.

    Raises:
        ModelError: The adapter does not fit, or can't be merged.
    """
    from transformers import GenerationConfig

    tokenizer, new = tokenizer_and_new_ids(config)
    own_ends = Path(adapter.location) / "generation_config.json"  # which tokens end a turn
    if is_soft_prompt(adapter.settings):
        if new:
            raise ModelError(f"model source {config.source!r} has a soft prompt: leave model.add_tokens out")
        if own_ends.is_file():
            base.hf.generation_config = GenerationConfig.from_pretrained(adapter.location)
        notes = {**base.notes, "start": {"adapter": config.source, "base": adapter.base}}
        return replace(base, hf=open_soft_prompt(base.hf, adapter), tokenizer=tokenizer, notes=notes)
    log.info("merging the adapter %s into its base, %s", adapter.location, adapter.base)
    forget_quantized(base.hf)
    hf, difference = merge_into_base(base.hf, adapter, vocabulary_size(tokenizer) - len(new))
    if own_ends.is_file():
        hf.generation_config = GenerationConfig.from_pretrained(adapter.location)
    start = {"adapter": config.source, "base": adapter.base, "merge_difference": difference}
    return with_rows(OpenedModel(hf, tokenizer, {**base.notes, "start": start}), new, config)


def _check_causal(config: ModelConfig, adapter: AdapterSource) -> None:
    task = adapter.settings.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise ModelError(
            f"model source {config.source!r} is an adapter of another kind of model (task_type {task}), where a causal "
            "language model is needed"
        )
