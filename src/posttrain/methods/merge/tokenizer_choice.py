"""Choose the tokenizer, the chat template and the end tokens of a merged model."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

from posttrain.core.errors import ModelError
from posttrain.core.files import named_path, read_small_text
from posttrain.methods.merge.merge_settings import BASE_SOURCE, UNION, MergeConfig
from posttrain.methods.merge.tokenizer_union import union_tokenizer
from posttrain.models.vocabulary import vocabulary_difference


class NamedModel(Protocol):
    """A model with what is chosen here: `StoredModel`, or a member of an ensemble."""

    @property
    def source(self) -> str:
        """Return its name."""

    @property
    def tokenizer(self) -> Any:
        """Return its tokenizer."""

    @property
    def generation(self) -> Any:
        """Return its generation settings."""


Named = TypeVar("Named", bound=NamedModel)


def model_named(name: str, base: Named, others: Mapping[str, Named]) -> Named | None:
    """Return the model that a setting names; None if it names none.

    Args:
        name: base, or a source.
        base: The base.
        others: The other models by source.
    """
    return base if name == BASE_SOURCE else others.get(name)


def choose_tokenizer(config: MergeConfig, base: Named, others: Mapping[str, Named]) -> tuple[Any, Named | None]:
    """Return the tokenizer that the result gets, and the model that it comes from (None: a union).

    Args:
        config: Settings of the stage.
        base: The base.
        others: The other models by source.

    Raises:
        ModelError: The setting names no model, or the vocabularies differ and nothing is set.
    """
    if config.tokenizer == UNION:
        return union_tokenizer(base.tokenizer, [(name, model.tokenizer) for name, model in others.items()]), None
    if config.tokenizer is not None:
        chosen = model_named(config.tokenizer, base, others)
        if chosen is None:
            raise ModelError(
                f"tokenizer: {config.tokenizer!r} is neither {UNION} nor one of the sources: "
                f"{', '.join((BASE_SOURCE, *others))}"
            )
        return copy.deepcopy(chosen.tokenizer), chosen
    for name, model in others.items():
        if difference := vocabulary_difference(model.tokenizer, base.tokenizer):
            raise ModelError(
                f"the vocabulary of {name} differs from the base's: {difference}. Set tokenizer to base, to one of the "
                "sources, or to union"
            )
    return copy.deepcopy(base.tokenizer), base


def choose_template(config: MergeConfig, base: Named, others: Mapping[str, Named]) -> tuple[Any, Named]:
    """Return the result's chat template, and the model that it comes from (the base for a template from elsewhere).

    Args:
        config: Settings of the stage.
        base: The base.
        others: The other models by source.

    Raises:
        ModelError: The templates differ and nothing is set, or the setting is no source, no file and no template.
    """
    if config.chat_template is None:
        template = base.tokenizer.chat_template
        different = [name for name, model in others.items() if model.tokenizer.chat_template != template]
        if different:
            what = "has no chat template" if template is None else "has another chat template"
            raise ModelError(
                f"the base {base.source} {what} than {', '.join(different)}: set chat_template to base, to one of the "
                "sources, or to a template"
            )
        return template, base
    chosen = model_named(config.chat_template, base, others)
    if chosen is not None:
        return chosen.tokenizer.chat_template, chosen
    path = named_path(config.chat_template)
    if "{" in config.chat_template:
        return config.chat_template, base
    if not path.is_file():
        raise ModelError(
            f"chat_template: {config.chat_template!r} is none of the sources ({', '.join((BASE_SOURCE, *others))}), no file and "
            "no template"
        )
    try:
        return read_small_text(path), base
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"chat_template {str(path)!r} can't be read: {error}") from error


def join_generation(first: NamedModel, models: Sequence[NamedModel], tokenizer: Any) -> Any:
    """Return generation settings of a model, with the tokens that end a turn in any of the models.

    Args:
        first: The model whose settings are taken, and whose end tokens come first.
        models: All models.
        tokenizer: Tokenizer of the result, in whose ids they are.
    """
    out = copy.deepcopy(first.generation)
    ends = [end for model in [first, *models] for end in mapped_ids(model.generation.eos_token_id, model, tokenizer)]
    ends = list(dict.fromkeys(ends))
    out.eos_token_id = ends if len(ends) > 1 else ends[0] if ends else None
    for name in ("pad_token_id", "bos_token_id"):
        setattr(out, name, next(iter(mapped_ids(getattr(out, name, None), first, tokenizer)), None))
    return out


def mapped_ids(ids: Any, model: NamedModel, tokenizer: Any) -> list[int]:
    """Return token ids of a model as ids of another tokenizer; those that it does not have are left out.

    Args:
        ids: One id, several or None.
        model: The model.
        tokenizer: The other tokenizer.
    """
    listed = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    known = tokenizer.get_vocab()
    return [known[token] for token in model.tokenizer.convert_ids_to_tokens(listed) if token in known]
