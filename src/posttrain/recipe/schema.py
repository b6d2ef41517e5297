"""What settings there are: walked for the reference, for overrides, and for the nearest right key (no torch)."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from posttrain.config import Recipe


@dataclass(frozen=True)
class Setting:
    """One line of the reference: dotted key, type and default as text, description."""

    key: str
    type: str
    default: str
    description: str


def settings(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[Setting]:
    """Every setting at any depth, in the order of config.py. N stands for the index or name of a list's item."""
    for name, info in model.model_fields.items():
        key = f"{prefix}{name}"
        yield Setting(key, _type_text(info.annotation), _default_text(info), info.description or "")
        told: set[str] = set()  # alternatives have settings in common: told once, as the first has them
        for inner, many in _inner_models(info.annotation):
            for setting in settings(inner, f"{key}.N." if many else f"{key}."):
                if setting.key not in told:
                    told.add(setting.key)
                    yield setting


def _default_text(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    default = info.get_default(call_default_factory=True)
    if isinstance(default, BaseModel):
        return ""
    return "none" if default is None else str(default).lower() if isinstance(default, bool) else str(default)


def _type_text(tp: Any) -> str:
    origin, args = get_origin(tp), get_args(tp)
    if origin is Annotated:
        return _type_text(args[0])
    if origin is Literal:
        return " | ".join(str(a) for a in args)
    if origin in (Union, types.UnionType):
        return " | ".join(_type_text(a) for a in args)
    if origin in (list, tuple, dict):
        inside = ", ".join(_type_text(a) for a in args)
        return f"{{{inside.replace(', ', ': ', 1)}}}" if origin is dict else f"[{inside}{', …' * (origin is list)}]"
    if isinstance(tp, type) and issubclass(tp, BaseModel):
        return "settings"
    return {str: "text", int: "integer", float: "number", bool: "true | false", type(None): "none"}.get(tp, str(tp))


def options(tp: Any) -> list[Any]:
    """The alternatives of an annotation, unions and Annotated taken apart."""
    origin, args = get_origin(tp), get_args(tp)
    if origin is Annotated:
        return options(args[0])
    if origin in (Union, types.UnionType):
        return [o for a in args for o in options(a)]
    return [tp]


def _inner_models(tp: Any) -> Iterator[tuple[type[BaseModel], bool]]:
    for option in options(tp):
        if isinstance(option, type) and issubclass(option, BaseModel):
            yield option, False
        elif get_origin(option) is list:
            for inner in options(get_args(option)[0]):
                if isinstance(inner, type) and issubclass(inner, BaseModel):
                    yield inner, True


TAGS = ("method", "kind")
"""Settings that say which of several classes the rest belongs to."""


def model_for(tp: Any, value: Any) -> type[BaseModel] | None:
    """The settings class that a value is checked by; of several, the one whose method or kind it names."""
    found = [o for o in options(tp) if isinstance(o, type) and issubclass(o, BaseModel)]
    for tag in TAGS:
        name = value.get(tag) if isinstance(value, Mapping) else None
        for model in found:
            if name is not None and tag in model.model_fields and name in get_args(model.model_fields[tag].annotation):
                return model
    return next(iter(found), None)


def child(tp: Any, name: str | int, value: Any) -> Any:
    """The annotation one key further down; None where the schema has no such key."""
    model = model_for(tp, value)
    if model is not None and name in model.model_fields:
        return model.model_fields[str(name)].annotation
    for option in options(tp):
        if get_origin(option) in (list, tuple) and isinstance(name, int):
            return get_args(option)[0]
        if get_origin(option) is dict and isinstance(name, str):
            return get_args(option)[1]
    return None


def inside(value: Any, name: str | int) -> Any:
    """value[name], or None."""
    if isinstance(value, dict):
        return value.get(name)
    return value[name] if isinstance(value, list) and isinstance(name, int) and -1 < name < len(value) else None


ALIASES = {
    "learning_rate": "lr",
    "per_device_train_batch_size": "batch_size",
    "train_batch_size": "batch_size",
    "global_batch_size": "batch_size",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "model_name_or_path": "source",
    "model_name": "source",
    "pretrained_model_name_or_path": "source",
    "dataset_name": "source",
    "dataset": "data",
    "path": "source",
    "max_length": "max_tokens",
    "max_seq_length": "max_tokens",
    "cutoff_len": "max_tokens",
    "lr_scheduler_type": "schedule",
    "lr_scheduler": "schedule",
    "warmup_ratio": "warmup",
    "warmup_steps": "warmup",
    "clip_grad_norm": "max_grad_norm",
    "gradient_checkpointing": "activation_checkpointing",
    "torch_compile": "compile",
    "torch_dtype": "dtype",
    "save_steps": "checkpoint_every",
    "save_total_limit": "keep_checkpoints",
    "output_dir": "output",
    "lora": "adapter",
    "lora_r": "r",
    "lora_rank": "r",
    "rank": "r",
    "lora_alpha": "alpha",
    "target_modules": "target",
    "use_dora": "kind",
    "use_rslora": "kind",
    "dataset_split": "split",
    "seed_data": "shuffle_seed",
    "data_seed": "shuffle_seed",
    "tasks": "evaluate",
    "eval": "evaluate",
}
"""Names that people bring from other tools, and ours."""

NOTES = {
    "gradient_accumulation_steps": "batch_size is the samples of one step, over all ranks; each step is cut into "
    "micro-batches by systems.tokens_per_micro_batch, and the result is the same for any value",
    "packing": "batches are always packed, without padding; systems.tokens_per_micro_batch is the budget",
    "bf16": "model.dtype chooses the compute dtype (bfloat16 on a GPU by default)",
    "fp16": "model.dtype chooses the compute dtype (bfloat16 on a GPU by default)",
    "assistant_only_loss": "data.loss_on chooses which tokens are learnt: completion, assistant or all",
    "completion_only_loss": "data.loss_on chooses which tokens are learnt: completion, assistant or all",
    "train_on_inputs": "data.loss_on chooses which tokens are learnt: completion, assistant or all",
    "report_to": "track holds tensorboard, wandb and trackio",
    "logging_steps": "every step is logged",
}
"""Names that have no setting of their own here, and what takes their place."""


def unknown_key(key: tuple[str | int, ...], model: type[BaseModel]) -> str:
    """What to say of a key that `model` does not have: the note, the right key here, or where it lives."""
    name, here = str(key[-1]), list(model.model_fields)
    if name in NOTES:
        return f"no such setting; {NOTES[name]}"
    near = difflib.get_close_matches(name, [*here, *(a for a in ALIASES if ALIASES[a] in here)], n=1)
    for meant in (ALIASES.get(name, name), *(ALIASES.get(n, n) for n in near)):
        if meant in here:
            return f"no such setting. Did you mean {meant}?"
        found = _elsewhere(meant, key, model)
        if found:
            return f"no such setting here. Did you mean {found}?"
    anywhere = {s.key.rsplit(".", 1)[-1] for s in settings()}
    close = difflib.get_close_matches(name, [*anywhere, *ALIASES], n=1)
    found = _elsewhere(ALIASES.get(close[0], close[0]), key, model) if close else ""
    return f"no such setting here. Did you mean {found}?" if found else f"no such setting; there are: {', '.join(here)}"


def _elsewhere(name: str, key: tuple[str | int, ...], model: type[BaseModel]) -> str:
    """The full key of a setting called `name`: inside the same settings, else the one that shares most with `key`."""
    prefix = "".join(f"{k}." for k in key[:-1])
    below = [s.key for s in settings(model, prefix) if s.key.rsplit(".", 1)[-1] == name]
    if below:
        return min(below, key=lambda k: k.count(".")).replace(".N.", ".0.")
    given = [str(k) for k in key]

    def shared(candidate: str) -> int:
        pairs = zip(candidate.split("."), given, strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a not in (b, "N")), len(given))

    places = [s.key for s in settings() if s.key.rsplit(".", 1)[-1] == name]
    if not places:
        return ""
    best = max(places, key=lambda k: (shared(k), -k.count(".")))
    same = shared(best)
    return ".".join([*given[:same], *best.split(".")[same:]]).replace(".N.", ".0.")
