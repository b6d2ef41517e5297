"""Settings of adapters: what is trained on a frozen model."""

from __future__ import annotations

import inspect
import re
from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from posttrain.config.base import Config
from posttrain.config.names import ADAPTERS
from posttrain.config.open_kinds import unknown_name
from posttrain.core.imports import is_import_path, load_object

LOW_RANK_SETTINGS = ("r", "alpha", "target")
SETTINGS = {
    **dict.fromkeys(("lora", "dora", "rslora"), LOW_RANK_SETTINGS),
    "prompt": ("tokens", "init", "text", "labels"),
    "prefix": ("tokens", "hidden"),
    "p_tuning": ("template", "hidden"),
    "p_tuning_v2": ("tokens", "init", "text", "labels"),
}
"""The settings that each kind has; a kind from outside has those of low rank, and `options`."""
SOFT_PROMPTS = tuple(kind for kind in SETTINGS if SETTINGS[kind] != LOW_RANK_SETTINGS)
"""Kinds that train virtual tokens, or their keys and values, and leave every weight as it is."""
NOT_MERGED = (
    "virtual tokens are no change of any weight, so they can't be merged. The adapter is the result, which posttrain and "
    "peft open; posttrain bake MODEL FOLDER writes it for programs without peft (docs/prompt-tuning.md)"
)
TEMPLATE = re.compile(r"(?:\{v:(\d{1,4})\})?\{context\}(?:\{v:(\d{1,4})\})?\{target\}")


class AdapterConfig(Config):
    """Adapters on a frozen model, through peft."""

    kind: str = Field(
        "lora", description=f"{', '.join(ADAPTERS)}, or package.module:name of a function that attaches adapters."
    )
    r: int = Field(16, ge=1, description="lora, rslora, dora: rank.")
    alpha: float = Field(32.0, gt=0, description="lora, rslora, dora: scale, alpha / r (alpha / sqrt(r) for rslora).")
    target: Literal["all-linear"] | list[str] = Field(
        "all-linear",
        description="lora, rslora, dora: module names to adapt; all-linear: every linear layer but the output head.",
    )
    tokens: int = Field(
        20, ge=1, le=4096, description="prompt, prefix, p_tuning_v2: number of virtual tokens before every sequence."
    )
    init: Literal["random", "vocabulary", "text", "labels"] = Field(
        "vocabulary",
        description="prompt, p_tuning_v2: initial values. vocabulary: of frequent tokens, drawn at random; text: of the tokens of `text`; labels: of `labels`, then of frequent tokens; random: uniform in [-0.5, 0.5] (prompt), standard normal (p_tuning_v2, which otherwise starts at the keys and values of these tokens).",
    )
    text: str | None = Field(
        None, min_length=1, description="init: text. Its tokens are repeated, or cut, to the number of virtual tokens."
    )
    labels: list[str] = Field(
        default_factory=list, description="init: labels. Names of the classes; one virtual token starts at each."
    )
    hidden: int | None = Field(
        None,
        ge=1,
        description="Width of prefix's MLP (None: that of a layer's keys), or of each direction of p_tuning's LSTM (None: half of the model's hidden size).",
    )
    template: str = Field(
        "{v:3}{context}{v:3}{target}",
        description="p_tuning: where virtual tokens stand, {v:NUMBER} before {context} (what precedes the answer), before {target} (the answer), or both.",
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="Settings of an adapter kind from outside: keyword-only parameters of its function.",
    )

    @property
    def is_soft_prompt(self) -> bool:
        """Return True for kinds that train virtual tokens and can't be merged into weights."""
        return self.kind in SOFT_PROMPTS

    def virtual_tokens(self) -> tuple[int, int]:
        """Return the number of virtual tokens before the context, and between context and target."""
        if self.kind != "p_tuning":
            return self.tokens, 0
        found = TEMPLATE.fullmatch(self.template)
        assert found is not None
        return int(found[1] or 0), int(found[2] or 0)

    def computed_tokens(self) -> tuple[int, int]:
        """Return `virtual_tokens` if they pass through the layers, and else (0, 0): adapters and prefixes."""
        return self.virtual_tokens() if self.kind in ("prompt", "p_tuning") else (0, 0)

    def continued_by(self) -> str | None:
        """Return the kind that trains the soft prompt of these settings further; None: no kind does."""
        deep = self.kind in ("prefix", "p_tuning_v2")
        return "p_tuning_v2" if deep else None if self.virtual_tokens()[1] else "prompt"

    @model_validator(mode="after")
    def _known(self) -> AdapterConfig:
        names: set[str] = set()
        if self.kind not in ADAPTERS:
            if not is_import_path(self.kind):
                raise ValueError(unknown_name(self.kind, ADAPTERS, "kind of adapter"))
            parameters = inspect.signature(load_object(self.kind)).parameters.values()
            names = {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
        unknown = sorted(self.options.keys() - names)
        if unknown:
            raise ValueError(f"options: {self.kind} has no setting {', '.join(unknown)} (it has: {sorted(names)})")
        own = SETTINGS.get(self.kind, LOW_RANK_SETTINGS)
        others = sorted(self.model_fields_set - {"kind", "options", *own})
        if others:
            raise ValueError(f"{self.kind} has no setting {', '.join(others)} (it has: {', '.join(own)})")
        return self

    @model_validator(mode="after")
    def _soft_prompt(self) -> AdapterConfig:
        if self.kind == "p_tuning" and (TEMPLATE.fullmatch(self.template) is None or not sum(self.virtual_tokens())):
            raise ValueError(
                f"template is {self.template!r}: expected {{v:NUMBER}} before {{context}}, before {{target}} or both, as "
                "in {v:3}{context}{v:3}{target}. Other text belongs into the rows (data.prompt)"
            )
        for init, name in (("text", "text"), ("labels", "labels")):
            if (self.init == init) != bool(getattr(self, name)):
                raise ValueError(
                    f"init is {self.init!r} and {name} is {'set' if getattr(self, name) else 'missing'}: init: {init} and "
                    f"{name} belong together"
                )
        if len(self.labels) > self.tokens:
            raise ValueError(f"{len(self.labels)} labels need as many virtual tokens, and tokens is {self.tokens}")
        return self

    @model_serializer(mode="wrap")
    def _only_its_own(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out the settings of other kinds: they would be refused when the settings are read again."""
        own = {"kind", "options", *SETTINGS.get(self.kind, LOW_RANK_SETTINGS)}
        return {name: value for name, value in dump(self).items() if name in own}
