"""Make what transformers 5 writes readable by transformers 4, and by other users of the machine.

transformers 5 keeps everything about rotary positions in `rope_parameters`, where transformers 4 does not look: it
would open the weights with the defaults of the model type, without a word. Both spellings are written. The same holds
for the class of a tokenizer and the list of its special tokens.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from posttrain.core.files import write_json

NEEDS_NEW = "5 or newer"
"""Note of a model that transformers 4 can't compute."""
log = logging.getLogger("posttrain")


def finish_folder(folder: Path) -> bool:
    """Complete a folder that transformers wrote: settings for transformers 4, and permissions by the umask.

    Returns:
        False if transformers 4 would compute something else from the folder: it has no words for what is set there.
    """
    both = not (folder / "config.json").is_file() or _add_old_settings(folder / "config.json")
    if not both:
        log.info("%s: only transformers 5 computes this model (transformers 4 has no such rotary positions)", folder)
    if (folder / "tokenizer_config.json").is_file():
        _add_old_tokenizer(folder / "tokenizer_config.json")
    set_permissions(folder)
    return both


def set_permissions(folder: Path) -> None:
    """Let files be read as the umask says: safetensors writes them for their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~umask)


def _add_old_settings(file: Path) -> bool:
    """Write transformers 4's settings of rotary positions and of the dtype; False if it has none for the positions."""
    from transformers import AutoConfig

    settings = json.loads(file.read_text(encoding="utf-8"))
    new, both = dict(settings), True
    for name in [None, *(n for n, part in settings.items() if isinstance(part, dict) and "rope_parameters" in part)]:
        part = settings if name is None else settings[name]  # the configuration itself, text_config
        rope = old_rope(part)
        both = both and rope is not None
        if name is None:
            new |= rope or {}
        else:
            new[name] = {**part, **(rope or {})}
    if "dtype" in settings:
        new.setdefault("torch_dtype", settings["dtype"])
    try:
        before = AutoConfig.from_pretrained(file.parent).to_dict()
    except (OSError, ValueError):  # a type that comes with code: left as it is
        return both
    write_json(file, new)
    after = AutoConfig.from_pretrained(file.parent).to_dict()
    if any(before.get(name) != after.get(name) for name in ("rope_parameters", "text_config", "dtype")):
        write_json(file, settings)  # transformers 5 would read the old words first, and others
        return False
    return both


def old_rope(settings: dict[str, Any]) -> dict[str, Any] | None:
    """Return transformers 4's settings of rotary positions for a configuration of transformers 5.

    Empty if there are none. None if transformers 4 has no words for them: positions that differ by the kind of layer in
    another way than Gemma 3's and OLMo 3's.
    """
    rope, kind = settings.get("rope_parameters"), str(settings.get("model_type", ""))
    if not isinstance(rope, dict) or not rope:
        return {}
    old: dict[str, Any] = {}
    whole: dict[str, Any] = rope
    if any(isinstance(value, dict) for value in rope.values()):
        whole, local = (rope.get(f"{name}_attention") or {} for name in ("full", "sliding"))
        if not whole or not local or set(rope) - {"full_attention", "sliding_attention"}:
            return None
        if kind.startswith("gemma3") and local.get("rope_type", "default") == "default":
            old["rope_local_base_freq"] = local["rope_theta"]
        elif local != whole and not (
            kind == "olmo3" and local == {"rope_type": "default", "rope_theta": whole.get("rope_theta")}
        ):
            return None
    scaling = {k: v for k, v in whole.items() if k not in ("rope_theta", "partial_rotary_factor")}
    if whole.get("rope_type") == "longrope":
        if "original_max_position_embeddings" in whole:
            old["original_max_position_embeddings"] = whole["original_max_position_embeddings"]
        if kind == "phi3":  # it takes these three only
            scaling = {"type": "longrope", **{name: scaling[name] for name in ("short_factor", "long_factor")}}
    scaled = whole.get("rope_type", "default") != "default"
    old |= {"rope_theta": whole.get("rope_theta"), "rope_scaling": scaling if scaled else None}
    if "partial_rotary_factor" in whole:
        old["partial_rotary_factor"] = whole["partial_rotary_factor"]
    if kind == "gpt_neox":
        old |= {"rotary_emb_base": whole.get("rope_theta"), "rotary_pct": whole.get("partial_rotary_factor", 1.0)}
    return {k: v for k, v in old.items() if k not in settings}


def _add_old_tokenizer(file: Path) -> None:
    """Name the tokenizer's class as transformers 4 knows it, and special tokens as it reads them."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    for name in ("is_local", "local_files_only"):  # of the moment of loading, not of the tokenizer
        settings.pop(name, None)
    extra = settings.get("extra_special_tokens")
    if isinstance(extra, list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    write_json(file, settings)
