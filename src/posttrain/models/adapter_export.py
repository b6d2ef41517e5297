"""Write adapters in peft's format: they open with peft alone, and name their base in a way that is valid elsewhere.

An adapter that was trained on top of another one is written together with it, as one adapter on the original base:
B = [s1 B1, s2 B2] and A = [A1; A2] give B A = s1 B1 A1 + s2 B2 A2, with rank r1 + r2 and scale 1.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.config import ModelConfig
from posttrain.core.files import write_json
from posttrain.models.adapter_source import PREFIXES, AdapterSource
from posttrain.models.soft_prompt_files import is_soft_prompt, saved_settings
from posttrain.recipe.model_sources import find_model

WEIGHTS_FILE = "adapter_model.safetensors"
OWN_BASE = "base"
"""Folder beside an adapter that holds its base, if the base exists nowhere else."""
MAY_DIFFER = set(
    "peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode r lora_alpha "
    "lora_dropout target_modules exclude_modules layers_to_transform layers_pattern fan_in_fan_out use_rslora "
    "rank_pattern alpha_pattern init_lora_weights trainable_token_indices".split()
)
"""Settings that plain low-rank adapters may have beside the defaults of peft's LoraConfig."""
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights that leave the base as it is."""
TOKEN_ROWS = re.compile(r"base_model\.model\.(.+)\.token_adapter\.trainable_tokens_delta")
LOW_RANK = re.compile(r"base_model\.model\.(.+)\.(lora_(?:embedding_)?[AB])(?:\.weight)?")

Factors = dict[str, dict[str, Tensor]]
"""Module -> name (lora_A, lora_B, lora_embedding_A, lora_embedding_B) -> tensor."""


def write_adapter(
    peft_model: Any, folder: Path, source: ModelConfig, start: AdapterSource | None, new_tokens: Sequence[int] = ()
) -> str:
    """Write the trained adapters to `folder`, those of `start` included.

    Args:
        peft_model: The model; its base is the model at `source`.
        folder: Where to write; an earlier adapter there is replaced.
        source: The model that was opened.
        start: The adapter at `source`, merged into the base when it was opened. None: a whole model.
        new_tokens: Ids of tokens that got a row of the embedding when it was opened. If the adapter does not train
            them, it is written with the whole embedding, which no other folder has.

    Returns:
        "alone": one adapter on the base (a soft prompt that was trained further, too). "combined": one adapter on
        the base of `start`, which is in it. "on start": it belongs on the merged model of `start` and its base, and
        says so by naming the folder `base` beside it, which the caller has to write.
    """
    shutil.rmtree(folder, ignore_errors=True)
    peft_model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # an empty form of peft's
    if new_tokens:
        _add_embedding(peft_model, folder / WEIGHTS_FILE)
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    settings = saved_settings(peft_model, settings)
    config = peft_model.get_base_model().config
    if start is None:
        settings |= base_name(source.source, source.revision, folder, config)
        made = "alone"
    elif is_soft_prompt(start.settings):  # what is saved is the soft prompt as it is now, not a second one
        settings |= base_name(start.base, start.base_revision, folder, config)
        made = "alone"
    elif _combine(start, settings, folder, peft_model):
        settings |= base_name(start.base, start.base_revision, folder, config)
        made = "combined"
    else:
        settings |= {"base_model_name_or_path": OWN_BASE, "revision": None}
        made = "on start"
    write_json(folder / "adapter_config.json", settings)
    return made


def base_name(source: str, revision: str | None, folder: Path, config: Any = None) -> dict[str, str | None]:
    """Return what adapter_config.json in `folder` says of its base: a name that is not bound to this machine, if any.

    A model of the Hub is its name and commit, one in the run of `folder` its path from the run's folder, any other
    folder as the recipe names it.

    Args:
        source: Source of the base.
        revision: Its revision.
        folder: Where the adapter is written.
        config: The base's transformers configuration, which knows its commit.
    """
    if source.startswith(PREFIXES):
        return {"base_model_name_or_path": source, "revision": None}
    found = find_model(source)
    if found.kind == "hub":
        commit = getattr(config, "_commit_hash", None)
        return {"base_model_name_or_path": source, "revision": commit or revision}
    path = Path(found.location)
    cached = re.search(r"models--([^/]+)--([^/]+)/snapshots/([^/]+)/?$", path.as_posix())
    if cached:
        return {"base_model_name_or_path": f"{cached[1]}/{cached[2]}", "revision": cached[3]}
    run = next((p for p in folder.resolve().parents if (p / "recipe.yaml").is_file()), None)
    if run is not None and run in path.resolve().parents:
        name = path.resolve().relative_to(run).as_posix()
    else:
        name = path.as_posix()
    if not Path(name).is_absolute() and name.count("/") < 2:
        name = f"./{name}"  # else it looks like a name on the Hub
    return {"base_model_name_or_path": name, "revision": None}


def _combine(start: AdapterSource, settings: dict[str, Any], folder: Path, peft_model: Any) -> bool:
    """Put the adapter of `start` into the one in `folder`, and its `settings`; False if they don't make one adapter."""
    from peft import load_peft_weights
    from safetensors.torch import load_file, save_file

    file = folder / WEIGHTS_FILE
    if not (is_plain_adapter(start.settings) and is_plain_adapter(settings) and file.is_file()):
        return False
    where = {"revision": start.revision} if start.revision else {}
    parts = [load_peft_weights(start.location, device="cpu", **where), load_file(file)]
    rows, indices = _join_rows(parts, [start.settings, settings])
    first, second = low_rank_factors(parts[0], start.settings), low_rank_factors(parts[1], settings)
    names = {name for name, _ in peft_model.get_base_model().named_modules()}
    if first is None or second is None or not first.keys() <= names:
        return False
    both = {module: _stack(first.get(module), second.get(module)) for module in sorted({*first, *second})}
    weights = {
        f"base_model.model.{module}.{name}" + ("" if "embedding" in name else ".weight"): tensor.contiguous()
        for module, factors in both.items()
        for name, tensor in factors.items()
    }
    weights |= {f"base_model.model.{module}.token_adapter.trainable_tokens_delta": t for module, t in rows.items()}
    ranks = {module: _rank(factors) for module, factors in both.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    other = {module: r for module, r in ranks.items() if r != rank}
    ends = {module.rpartition(".")[2] for module in both}
    whole = {name for name in names if name.rpartition(".")[2] in ends} == both.keys()
    settings |= {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": other,
        "alpha_pattern": other,
        "use_rslora": False,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "target_modules": sorted(ends if whole else both),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "trainable_token_indices": indices or None,
    }
    save_file(weights, file, metadata={"format": "pt"})
    return True


def _join_rows(
    parts: list[dict[str, Tensor]], settings: list[dict[str, Any]]
) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """Take the trained rows of tokens out of the tensors; of two for one token the later counts.

    Returns:
        Rows and token ids of each module.
    """
    joined: dict[str, dict[int, Tensor]] = {}
    for weights, of in zip(parts, settings, strict=True):
        for key in [k for k in weights if TOKEN_ROWS.fullmatch(k)]:
            module = TOKEN_ROWS.fullmatch(key)[1]  # type: ignore[index]
            indices = of["trainable_token_indices"]
            if isinstance(indices, dict):
                indices = next(ids for name, ids in indices.items() if module == name or module.endswith(f".{name}"))
            joined.setdefault(module, {}).update(zip(indices, weights.pop(key).float(), strict=True))
    rows = {module: torch.stack(list(of.values())) for module, of in joined.items()}
    return rows, {module: list(of) for module, of in joined.items()}


def _add_embedding(peft_model: Any, file: Path) -> None:
    """Write the embedding and the output head beside the adapter, unless the adapter has the new tokens' rows."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from safetensors.torch import load_file, save_file

    base, weights = peft_model.get_base_model(), load_file(file)
    layers = [base.get_input_embeddings(), base.get_output_embeddings()]
    covered = {m[1] for key in weights if (m := TOKEN_ROWS.fullmatch(key))}
    inner = [layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer for layer in layers]
    added, seen = {}, set[int]()
    for layer, plain in zip(layers, inner, strict=True):
        name = next((n for n, m in base.named_modules() if m is layer), None)
        if name is None or name in covered or plain is None or hasattr(layer, "token_adapter"):
            continue
        if id(plain.weight) not in seen:  # once if both share it
            place = f"base_model.model.{name}" + (".base_layer" if layer is not plain else "")
            added[f"{place}.weight"] = plain.weight.detach().cpu().contiguous()
        seen.add(id(plain.weight))
    if added:
        save_file({**weights, **added}, file, metadata={"format": "pt"})


def is_plain_adapter(settings: dict[str, Any]) -> bool:
    """Return True for low-rank adapters without any variation: W + s B A, on matrices."""
    return not variations(settings)


def variations(settings: dict[str, Any]) -> list[str]:
    """Return what makes an adapter another one than a plain low-rank one, as its settings name it."""
    from peft import LoraConfig

    if settings.get("peft_type") != "LORA":
        return [str(settings.get("peft_type"))]
    if (start := settings.get("init_lora_weights", True)) not in PLAIN_STARTS:
        return [f"init_lora_weights: {start}"]
    usual = json.loads(json.dumps(LoraConfig().to_dict(), default=str))
    return [f"{k}: {v}" for k, v in settings.items() if k not in MAY_DIFFER and v and v != usual.get(k)]


def low_rank_factors(weights: dict[str, Tensor], settings: dict[str, Any]) -> Factors | None:
    """Return the factors of each module in float32, its scale in B; None if there are others, or A without B."""
    from peft.utils.other import get_pattern_key

    out: Factors = {}
    for key, tensor in weights.items():
        found = LOW_RANK.fullmatch(key)
        if found is None or tensor.ndim != 2:
            return None
        out.setdefault(found[1], {})[found[2]] = tensor.float()
    if any(len(factors) != 2 for factors in out.values()):
        return None
    alphas = settings.get("alpha_pattern") or {}
    for module, factors in out.items():
        rank = _rank(factors)
        alpha = alphas.get(get_pattern_key(alphas.keys(), module), settings["lora_alpha"])
        scale = alpha / (rank**0.5 if settings.get("use_rslora") else rank)
        for name in factors:
            if name.endswith("_B"):
                factors[name] = factors[name] * scale
    return out


def _rank(factors: dict[str, Tensor]) -> int:
    return next(t for name, t in factors.items() if name.endswith("_A")).shape[0]


def _stack(first: dict[str, Tensor] | None, second: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """Return the factors of the sum of two products."""
    if first is None or second is None:
        return first or second or {}
    return {name: torch.cat([first[name], second[name]], dim=0 if name.endswith("_A") else 1) for name in second}
