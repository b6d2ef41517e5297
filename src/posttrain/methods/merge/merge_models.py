"""Open the models that are merged, and write the result as a model's folder."""

from __future__ import annotations

import copy
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from posttrain.config.settings import ModelConfig
from posttrain.core.errors import ModelError
from posttrain.data.sample_store import vocabulary_size
from posttrain.methods.merge.experts import Routers, mixture_settings, plan_experts
from posttrain.methods.merge.lora_result import write_difference
from posttrain.methods.merge.merge_settings import BASE_SOURCE, MergeConfig
from posttrain.methods.merge.merge_weights import Sources, WeightMerge, plan_merge, plan_stack
from posttrain.methods.merge.model_layout import ModelLayout, layout_of
from posttrain.methods.merge.stored_model import StoredModel, open_stored
from posttrain.methods.merge.tokenizer_choice import choose_template, choose_tokenizer, join_generation, mapped_ids
from posttrain.methods.merge.vocabulary_rows import arrange_rows
from posttrain.methods.merge.weight_writer import write_weights
from posttrain.models.portable_files import NEEDS_NEW, finish_folder


def open_sources(
    config: MergeConfig, model: ModelConfig, scratch: Callable[[], Path]
) -> tuple[StoredModel, dict[tuple[str, str | None], StoredModel]]:
    """Open the base and the models that are merged.

    Args:
        config: Settings of the stage.
        model: The base.
        scratch: Makes an empty folder, for a model that has to be written as files first.

    Returns:
        The base, and the others by (source, revision). The name of a source of which several revisions are opened is
        source@revision.
    """
    base, its_key = open_stored(model, scratch()), (model.source, model.revision)
    named = config.named_sources()
    revisions = Counter(source for source, _ in {its_key, *named})
    opened = {}
    for key in named:
        source, revision = key
        if key == its_key:
            opened[key] = base
            continue
        found = open_stored(model.model_copy(update={"source": source, "revision": revision}), scratch())
        name = source if revisions[source] == 1 else f"{source}@{revision or 'main'}"
        opened[key] = replace(found, source=name)
    return base, opened


def write_merged(
    config: MergeConfig,
    base: StoredModel,
    sources: Sources,
    folder: Path,
    seed: int,
    on_tensor: Callable[[int, int], None] = lambda done, total: None,
    trust_remote_code: bool = False,
    routers: Routers | None = None,
) -> dict[str, Any]:
    """Write the merged model to `folder`.

    Args:
        config: Settings of the stage.
        base: The base.
        sources: The other models by (source, revision).
        folder: Where to write; it is made.
        seed: Decides random masks.
        on_tensor: Called with the numbers of tensors that are written and of all.
        trust_remote_code: Run code that ships with the base.
        routers: Weights of the routers, for a mixture of experts.

    Returns:
        The stage's entry in the manifest.

    Raises:
        ModelError: The models don't fit together.
    """
    others = {model.source: model for model in sources.values()}
    tokenizer, owner = choose_tokenizer(config, base, others)
    tokenizer.chat_template, with_template = choose_template(config, base, others)
    base, sources, lacked = _for_tokenizer(config, base, sources, tokenizer, owner)
    if config.experts is not None and routers is not None:
        plan = plan_experts(config, base, sources, routers)
    else:
        plan = plan_merge(config, base, sources, seed) if config.models else plan_stack(config, base, sources)
    settings = result_settings(base, plan, tokenizer)
    settings = settings if config.experts is None else mixture_settings(settings, base, config)
    _check_shapes(plan, layout_of(settings, base.source, trust_remote_code), base)
    folder.mkdir(parents=True)
    merged = [
        base if m.source == BASE_SOURCE else sources[m.source, m.revision] for m in config.models or config.slices
    ]
    opened = {model.source: {"source": model.source, **model.notes} for model in merged}
    algorithm = "stack of layers" if config.algorithm is None else config.algorithm.name
    algorithm = algorithm if config.experts is None else f"experts ({settings.model_type})"
    record = {"algorithm": algorithm, "base": base.source, "models": list(opened.values())}
    record |= {"rows that a source lacked": lacked} if lacked else {}
    made: dict[str, Any] = {"models merged": len(opened)}

    def write_rest() -> None:
        join_generation(with_template, merged, tokenizer).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    if config.adapter is not None:
        found = write_difference(config.adapter, base, plan, folder, on_tensor)
        write_rest()
        finish_folder(folder)
        return {"parameters": found.parameters, "made": {**made, **found.made}, "merged": {**record, **found.record}}
    files = write_weights(
        folder,
        plan.tensors,
        plan.compute,
        int(config.max_shard_gb * 1e9),
        lambda done: on_tensor(done, len(plan.tensors)),
    )
    settings.save_pretrained(folder)
    write_rest()
    for file in base.folder.glob("*.py"):  # code that the model's type needs
        shutil.copy2(file, folder)
    notes = {} if finish_folder(folder) else {"transformers": NEEDS_NEW}
    made |= {"tensors": len(plan.tensors), "bytes": sum(f.stat().st_size for f in files)}
    parameters = sum(t.numbers for t in plan.tensors)
    return {"parameters": parameters, "made": made, "merged": {**record, "shards": len(files)}, **notes}


def _for_tokenizer(
    config: MergeConfig, base: StoredModel, sources: Sources, tokenizer: Any, owner: StoredModel | None
) -> tuple[StoredModel, Sources, dict[str, int]]:
    """Return the base and the sources with rows for the result's tokenizer, and how many rows each lacked."""
    size = vocabulary_size(tokenizer)
    rows = size if owner is None else max(owner.entry(owner.layout.vocabulary[0]).shape[0], size)
    every = list({id(model): model for model in (base, *sources.values())}.values())  # one may be the base itself
    models, lacked = arrange_rows(every, tokenizer, rows, owner, config.missing_rows)
    if config.adapter is not None and models[0].rows is not None:
        raise ModelError(
            "the result has another vocabulary than the base, which an adapter can't give it: leave adapter out"
        )
    arranged = {id(model): one for model, one in zip(every, models, strict=True)}
    return models[0], {key: arranged[id(model)] for key, model in sources.items()}, lacked


def result_settings(base: StoredModel, plan: WeightMerge, tokenizer: Any) -> Any:
    """Return the configuration of the result: the base's, with its layers, rows, dtype and ties as they are.

    Args:
        base: The base.
        plan: The merge.
        tokenizer: The result's tokenizer, by whose ids the configuration names tokens.
    """
    settings = copy.deepcopy(base.config)
    text = settings.get_text_config()
    if plan.from_layers:
        for name, value in vars(base.config.get_text_config()).items():
            if isinstance(value, list | tuple) and len(value) == base.layout.layers and name != "architectures":
                setattr(text, name, [getattr(m.config.get_text_config(), name)[i] for m, i in plan.from_layers])
        text.num_hidden_layers = len(plan.from_layers)
    if base.rows is not None:
        for part in (settings, text):
            part.vocab_size = base.entry(base.layout.vocabulary[0]).shape[0]
            for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
                given = getattr(part, name, None)
                ids = mapped_ids(given, base, tokenizer)
                setattr(part, name, ids if isinstance(given, list) else next(iter(ids), None))
    if not plan.tied and base.layout.tied:
        settings.tie_word_embeddings = text.tie_word_embeddings = False
    kinds = [t.dtype for t in plan.tensors if t.dtype.is_floating_point]
    settings.dtype = max(set(kinds), key=lambda kind: (kinds.count(kind), kind.itemsize))
    return settings


def _check_shapes(plan: WeightMerge, layout: ModelLayout, base: StoredModel) -> None:
    """Check the result's tensors against what its configuration says, before they are computed."""
    expected = layout.shapes
    stored = {tensor.name: tensor.shape for tensor in plan.tensors}
    for name, shape in stored.items():
        if name in expected and expected[name] != shape:
            raise ModelError(
                f"{name} would be {list(shape)}, and the base {base.source} has a configuration with "
                f"{list(expected[name])}: layers of models with other sizes can't be stacked on it"
            )
