"""Write adapters in peft's format: they open with peft alone, and name their base in a way that is valid elsewhere.

An adapter that was trained on top of another one is written together with it, as one adapter on the original base:
B = [s1 B1, s2 B2] and A = [A1; A2] give B A = s1 B1 A1 + s2 B2 A2, with rank r1 + r2 and scale 1.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.config import ModelConfig
from posttrain.core.files import write_json
from posttrain.models.adapter_source import PREFIXES, AdapterSource
from posttrain.recipe.model_sources import find_model

OWN_BASE = "base"
"""Folder beside an adapter that holds its base, if the base exists nowhere else."""
MAY_DIFFER = set(
    "peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode r lora_alpha "
    "lora_dropout target_modules exclude_modules layers_to_transform layers_pattern fan_in_fan_out use_rslora "
    "rank_pattern alpha_pattern init_lora_weights".split()
)
"""Settings that plain low-rank adapters may have beside the defaults of peft's LoraConfig."""
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights that leave the base as it is."""
LOW_RANK = re.compile(r"base_model\.model\.(.+)\.(lora_(?:embedding_)?[AB])(?:\.weight)?")

Factors = dict[str, dict[str, Tensor]]
"""Module -> name (lora_A, lora_B, lora_embedding_A, lora_embedding_B) -> tensor."""


def write_adapter(peft_model: Any, folder: Path, source: ModelConfig, start: AdapterSource | None) -> str:
    """Write the trained adapters to `folder`, those of `start` included.

    Args:
        peft_model: The model; its base is the model at `source`.
        folder: Where to write; an earlier adapter there is replaced.
        source: The model that was opened.
        start: The adapter at `source`, merged into the base when it was opened. None: a whole model.

    Returns:
        "alone": one adapter on the base. "combined": one adapter on the base of `start`, which is in it. "on start": it
        belongs on the merged model of `start` and its base, and says so by naming the folder `base` beside it, which
        the caller has to write.
    """
    shutil.rmtree(folder, ignore_errors=True)
    peft_model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # an empty form of peft's
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    config = peft_model.get_base_model().config
    if start is None:
        settings |= base_name(source.source, source.revision, folder, config)
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

    file = folder / "adapter_model.safetensors"
    if not (_is_plain(start.settings) and _is_plain(settings) and file.is_file()):
        return False
    where = {"revision": start.revision} if start.revision else {}
    first = _factors(load_peft_weights(start.location, device="cpu", **where), start.settings)
    second = _factors(load_file(file), settings)
    names = {name for name, _ in peft_model.get_base_model().named_modules()}
    if first is None or second is None or not first.keys() <= names:
        return False
    both = {module: _stack(first.get(module), second.get(module)) for module in sorted({*first, *second})}
    weights = {
        f"base_model.model.{module}.{name}" + ("" if "embedding" in name else ".weight"): tensor.contiguous()
        for module, factors in both.items()
        for name, tensor in factors.items()
    }
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
    }
    save_file(weights, file, metadata={"format": "pt"})
    return True


def _is_plain(settings: dict[str, Any]) -> bool:
    """Return True for low-rank adapters without any variation: W + s B A, on matrices."""
    from peft import LoraConfig

    if settings.get("peft_type") != "LORA" or settings.get("init_lora_weights", True) not in PLAIN_STARTS:
        return False
    usual = json.loads(json.dumps(LoraConfig().to_dict(), default=str))
    return not any(v and v != usual.get(k) for k, v in settings.items() if k not in MAY_DIFFER)


def _factors(weights: dict[str, Tensor], settings: dict[str, Any]) -> Factors | None:
    """Return the factors of each module in float32, its scale in B; None if there are other tensors."""
    from peft.utils.other import get_pattern_key

    out: Factors = {}
    for key, tensor in weights.items():
        found = LOW_RANK.fullmatch(key)
        if found is None or tensor.ndim != 2:
            return None
        out.setdefault(found[1], {})[found[2]] = tensor.float()
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
