"""Model sources that are adapters on another model: find them, open their base, and merge them into it.

A stage, a judge or a chat that is given such a source gets the model that the adapter makes of its base. The adapter is
added to the weights in float32, so what a stage trains next lies on top of it, and its reference is that model.
"""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from posttrain.core.errors import ModelError
from posttrain.models.adapters import merge
from posttrain.models.vocabulary import embedding_rows, resize_embedding, set_mean_rows

TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
PREFIXES = ("tiny:", "lab:", "package:")


@dataclass(frozen=True)
class AdapterSource:
    """A source that holds an adapter instead of a whole model.

    Attributes:
        location: Folder, or name on the Hub.
        revision: Of the adapter, on the Hub.
        settings: Content of adapter_config.json.
        base: Source of the model that the adapter belongs to.
        base_revision: Of that model, on the Hub.
    """

    location: str
    revision: str | None
    settings: dict[str, Any]
    base: str
    base_revision: str | None

    def has_tokenizer(self) -> bool:
        """Return True if the adapter comes with a tokenizer; else its base has it."""
        if Path(self.location).is_dir():
            return any((Path(self.location) / name).is_file() for name in TOKENIZER_FILES)
        return any(_hub_file(self.location, name, self.revision) for name in TOKENIZER_FILES)


def _hub_file(name: str, file: str, revision: str | None) -> str | None:
    from transformers.utils.hub import cached_file

    quiet = {f"_raise_exceptions_for_{what}": False for what in ("gated_repo", "missing_entries", "connection_errors")}
    try:
        return cached_file(name, file, revision=revision, **quiet)  # type: ignore[no-any-return]
    except OSError:  # a name that no repository can have: opening the model says so
        return None


def find_adapter(location: str, kind: str, revision: str | None = None) -> AdapterSource | None:
    """Return the adapter at a resolved source; None for a whole model.

    Args:
        location: Folder, or name on the Hub.
        kind: folder or hub; other kinds are never adapters.
        revision: Revision on the Hub.

    Raises:
        ModelError: adapter_config.json can't be read or names no base, or the weights of a whole model lie beside it.
    """
    if kind not in ("folder", "hub"):
        return None
    folder = Path(location)
    file = folder / "adapter_config.json" if kind == "folder" else _hub_file(location, "adapter_config.json", revision)
    if file is None or not Path(file).is_file():
        return None
    try:
        settings = json.loads(Path(file).read_text(encoding="utf-8"))
        base = settings.get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise ModelError(f"{file}: expected the settings of an adapter as JSON ({error})") from error
    if kind == "folder" and any(path for pattern in WEIGHTS for path in folder.glob(pattern)):
        raise ModelError(
            f"{folder} holds the weights of a whole model and an adapter (adapter_config.json): is the adapter part of "
            "these weights, or does it come on top? Leave one of the two in the folder"
        )
    if not base or not isinstance(base, str):
        raise ModelError(
            f"{file}: the adapter names no base model. Set base_model_name_or_path there to the model that it was "
            "trained on"
        )
    base = _find_base(base, folder) if kind == "folder" else base
    if Path(base).exists() and Path(base).resolve() == folder.resolve():
        raise ModelError(f"{file}: base_model_name_or_path names the adapter's folder itself; name the base model")
    return AdapterSource(location, revision, settings, base, settings.get("revision"))


def _find_base(name: str, folder: Path) -> str:
    """Return the source that an adapter in `folder` calls its base.

    A relative path is looked for in the folder, then in those around it: a run's adapter names its base as it is seen
    from the run's folder, and stays valid if the whole run is moved.
    """
    if name.startswith(PREFIXES) or Path(name).is_absolute():
        return name
    if (folder / name).is_dir():
        return str(folder / name)
    if name.count("/") > 1 or name.startswith("."):  # else it may be a name on the Hub
        for around in folder.resolve().parents:
            if (around / name).exists():
                return str(around / name)
    return name


def merge_into_base(base: Any, adapter: AdapterSource, tokens: int = 0) -> tuple[Any, float]:
    """Return the base with the adapter merged into its weights, and the largest difference of logits that this made.

    Args:
        base: The transformers model that the adapter belongs to, on its device. It is used up.
        adapter: The adapter.
        tokens: Size of its tokenizer, for which the base gets rows first: the adapter may have trained them.

    Raises:
        ModelError: peft can't load the adapter, it does not fit the base, or its kind can't be merged.
    """
    from peft import PeftModel, load_peft_weights, set_peft_model_state_dict

    device = str(next(base.parameters()).device)
    where = {"revision": adapter.revision} if adapter.revision else {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what does not fit is an error below
            weights = load_peft_weights(adapter.location, device=device, **where)
            _fit_rows(base, adapter, weights, tokens)
            model = PeftModel.from_pretrained(base, adapter.location, torch_device=device, **where)
            if model.active_peft_config.is_prompt_learning:
                kind = model.active_peft_config.peft_type.value
                raise ModelError(
                    f"adapter {adapter.location}: {kind} adds virtual tokens in a way that posttrain does not compute "
                    "and that can't be merged into weights. Start from a soft prompt that it knows (prompt, prefix or "
                    "p_tuning), an adapter inside the layers (lora, dora, ...), or from its base"
                )
            result = set_peft_model_state_dict(model, weights)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"adapter {adapter.location}: it can't be loaded on its base {adapter.base}: {' '.join(first[:3])}"
        ) from error
    tuned = [key for key in result.missing_keys if model.base_model.prefix in key or "modules_to_save" in key]
    wrong = [*result.unexpected_keys, *tuned]
    if wrong or not weights:
        raise ModelError(
            f"adapter {adapter.location} does not fit its base {adapter.base}: "
            f"{len(result.unexpected_keys)} of its {len(weights)} tensors have no place there and {len(tuned)} are "
            f"missing ({', '.join(wrong[:3])}). Was it trained on another model, or is its file damaged?"
        )
    hf, difference = merge(model, f"adapter {adapter.location}")
    for p in hf.parameters():  # peft froze them
        p.requires_grad_(p.is_floating_point())
    return hf, difference


def _fit_rows(base: Any, adapter: AdapterSource, weights: dict[str, Any], tokens: int) -> None:
    """Give the base's embedding the rows of the adapter's; without an embedding in the adapter, those of its tokens."""
    rows, names = embedding_rows(base), set[str]()
    for module in (base.get_input_embeddings(), base.get_output_embeddings()):
        names |= {name for name, m in base.named_modules() if m is module and m is not None}
    whole = [
        tensor.shape[0]
        for key, tensor in weights.items()
        if re.sub(r"^base_model\.model\.|(\.base_layer|\.modules_to_save)?\.weight$", "", key) in names
    ]
    whole += [t.shape[1] for key, t in weights.items() if key.endswith("lora_embedding_A")]
    wanted = max(whole) if whole else max(tokens, rows)
    if wanted != rows:
        known = torch.arange(min(rows, wanted))
        resize_embedding(base, wanted, f"adapter {adapter.location}")
        set_mean_rows(base, list(range(rows, wanted)), known)
