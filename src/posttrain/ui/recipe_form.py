"""Turn the settings of a recipe into the fields of a form; only those that a person changes become overrides."""

from __future__ import annotations

import re
from dataclasses import dataclass

import yaml

from posttrain.recipe.parsing import load_recipe, shipped
from posttrain.recipe.schema import SettingInfo, dotted, settings

_WORDS = ("text", "integer", "number", "settings", "none")
OPEN_BLOCKS = 3
"""Parts of a block's name up to which it is shown unfolded: stages.sft, and not stages.sft.data.quality."""


@dataclass(frozen=True)
class FormField:
    """Hold a field.

    Attributes:
        key: Name of the setting, as overrides have it.
        value: Its value in the recipe as text, else its default.
        choices: Values to choose from; empty: any text.
        at_default: Whether the recipe leaves it at its default.
    """

    key: str
    type: str
    value: str
    description: str
    choices: tuple[str, ...]
    at_default: bool

    @property
    def name(self) -> str:
        """Return the last part of the key."""
        return self.key.rpartition(".")[2]


@dataclass(frozen=True)
class FormBlock:
    """Hold the fields of a block of settings."""

    name: str
    fields: list[FormField]

    @property
    def changed(self) -> int:
        """Return how many of its settings the recipe has."""
        return sum(not f.at_default for f in self.fields)


def recipe_blocks(recipe: str) -> list[FormBlock]:
    """Return the settings of a recipe by block: its own first, then the model, the stages, the evaluations.

    Raises:
        RecipeError: There is no such recipe, or it is wrong.
    """
    data = load_recipe(recipe).model_dump(mode="json")
    blocks: dict[str, list[FormField]] = {}
    for setting in settings(data):
        if setting.block or setting.type == "[settings, …]" or setting.key == ("output",):  # the page says where
            continue
        block = dotted(setting.key[:-1], data) if len(setting.key) > 1 else "the run"
        blocks.setdefault(block, []).append(_field(dotted(setting.key, data), setting))
    return [FormBlock(name, fields) for name, fields in blocks.items()]


def _field(key: str, setting: SettingInfo) -> FormField:
    value = setting.value or setting.default
    choices = tuple(part for part in setting.type.split(" | "))
    if len(choices) < 2 or any(c in _WORDS or not re.fullmatch(r"[\w.-]+", c) for c in choices if c != "none"):
        choices = ()
    if choices and value not in choices:  # module:function, where names of the package's own are listed
        choices = ()
    value = "" if value == "required" else value
    return FormField(key, setting.type, value, setting.description, choices, not setting.value)


def recipe_choices() -> list[tuple[str, str]]:
    """Return the recipes of posttrain: name and description."""
    out = []
    for name, file in shipped().items():
        found = re.search(r"^description:.*(?:\n[ ]+.*)*", file.read_text(encoding="utf-8"), re.MULTILINE)
        text = yaml.safe_load(found[0]).get("description", "") if found else ""
        out.append((name, str(text)))
    return out


def override(key: str, text: str) -> str:
    """Return a field that was changed as an override."""
    value = text.strip()
    return f"{key}={'null' if value == 'none' else value}"
