"""Write an ensemble of models, whose output distributions are pooled when it is sampled from or evaluated."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.config.settings import ModelConfig
from posttrain.core.errors import ModelError
from posttrain.methods.merge.merge_settings import BASE_SOURCE, MergeConfig
from posttrain.methods.merge.tokenizer_choice import choose_template, join_generation
from posttrain.models.ensemble_files import EnsembleMember, find_ensemble, write_ensemble
from posttrain.models.loading import check_made, load_settings, load_tokenizer, resolve, source_adapter
from posttrain.models.model_shape import model_shape
from posttrain.models.portable_files import finish_folder
from posttrain.models.soft_prompt_files import is_soft_prompt
from posttrain.models.vocabulary import check_same_vocabulary


@dataclass(frozen=True)
class _Member:
    """Hold what the choice of a tokenizer, of a template and of end tokens takes of a model."""

    source: str
    config: ModelConfig
    tokenizer: Any
    generation: Any


def write_pooled(config: MergeConfig, model: ModelConfig, folder: Path) -> dict[str, Any]:
    """Write the ensemble to `folder`.

    Args:
        config: Settings of the stage.
        model: The base, whose tokenizer the ensemble has.
        folder: Where to write; it is made.

    Returns:
        The stage's entry in the manifest.

    Raises:
        ModelError: The models don't share a vocabulary, or one can't be a member.
    """
    assert config.ensemble is not None
    its_key, named = (model.source, model.revision), config.named_sources()
    revisions = Counter(source for source, _ in {its_key, *named})
    base = _opened(model, model.source)
    others = {}
    for source, revision in named:
        name = source if revisions[source] == 1 else f"{source}@{revision or 'main'}"
        theirs: dict[str, Any] = {"source": source, "revision": revision, "chat_template": None, "add_tokens": []}
        others[source, revision] = _opened(model.model_copy(update=theirs), name)
    by_name = {other.source: other for other in others.values()}
    tokenizer = base.tokenizer
    for name, other in by_name.items():
        check_same_vocabulary(name, other.tokenizer, tokenizer)
    tokenizer.chat_template, with_template = choose_template(config, base, by_name)
    members = [base if m.source == BASE_SOURCE else others[m.source, m.revision] for m in config.models]
    folder.mkdir(parents=True)
    entries = []
    for setting, member in zip(config.models, members, strict=True):
        found, weight = resolve(member.config.source), setting.weight
        assert isinstance(weight, float)
        where = Path(found.location) if found.kind == "folder" else None
        entries.append((EnsembleMember(member.config.source, member.config.revision, weight), where))
    write_ensemble(folder, entries, config.ensemble.pool, config.ensemble.confidence)
    join_generation(with_template, members, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    finish_folder(folder)
    opened = {member.source: {"source": member.source} for member in members}
    pooled = f"{config.ensemble.pool} pool of distributions"
    record = {"algorithm": pooled, "base": base.source, "models": list(opened.values())}
    parameters = sum(model_shape(member.config).parameters for member in members)
    return {"parameters": parameters, "made": {"models pooled": len(members)}, "merged": record}


def _opened(config: ModelConfig, name: str) -> _Member:
    """Read what is needed of a model beside its weights."""
    from transformers import GenerationConfig

    found, adapter = resolve(config.source), source_adapter(config)
    folder = Path(found.location)
    check_made(config.source, folder)
    if adapter is not None and is_soft_prompt(adapter.settings):
        raise ModelError(f"{name} is a soft prompt, and its positions are others: it can't be a member of an ensemble")
    if found.kind == "folder" and find_ensemble(folder) is not None:
        raise ModelError(f"{name} is an ensemble: name its members")
    if config.add_tokens:
        raise ModelError("model.add_tokens adds rows to one model, and an ensemble has several: leave it out")
    settings = load_settings(config)
    if (folder / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(folder)
    else:
        generation = GenerationConfig() if settings is None else GenerationConfig.from_model_config(settings)
    return _Member(name, config, load_tokenizer(config), generation)
