"""Extend a model's vocabulary by tokens of a domain, and measure the model in its own tokens before that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from posttrain.config.settings import DataConfig
from posttrain.core import distributed
from posttrain.core.errors import ModelError
from posttrain.core.files import write_json
from posttrain.data.text_documents import Documents, document_stats, prepare_documents
from posttrain.methods.pretrain.pretrain_settings import PretrainConfig
from posttrain.methods.pretrain.retention import BEFORE, GENERAL, document_rows
from posttrain.methods.sft_measurement import FOLDER, score_rows
from posttrain.models.language_model import LanguageModel
from posttrain.models.loading import OpenedModel
from posttrain.models.vocabulary import embedding_rows, fit_embedding, token_tables
from posttrain.models.vocabulary_extension import extend_tokenizer, set_part_rows
from posttrain.trainer.stage import StageContext

SHOWN_NEW_TOKENS = 20


class NewVocabulary:
    """Hold a tokenizer with new tokens, and the text that measures the model before it gets them."""

    def __init__(
        self,
        config: PretrainConfig,
        context: StageContext,
        trained: Documents,
        held_out: Documents | None,
        general: Documents | None,
    ) -> None:
        """Make the new tokens of the text that is trained on.

        Args:
            config: Settings of the stage.
            context: The model's tokenizer and length.
            trained: Text of the domain.
            held_out: Text of the domain that is measured.
            general: General text that is measured.
        """
        assert config.vocabulary is not None
        self.config, self.context, self.settings = config, context, config.vocabulary
        self.measured = {FOLDER: held_out, GENERAL: general}
        self.made = extend_tokenizer(context.tokenizer, _texts(trained, context.tokenizer), self.settings.new_tokens)

    def tokenize_again(
        self, parts: Mapping[str, tuple[DataConfig | None, Documents | None]]
    ) -> dict[str, Documents | None]:
        """Return the same documents in the tokens of the new tokenizer; None where there are none.

        Args:
            parts: By name, the settings of the data that documents are a part of, and the documents in the old tokens.
        """
        prepared: dict[int, Documents] = {}  # what is trained on and what is held out may be parts of the same data
        new: dict[str, Documents | None] = {}
        for name, (data, old) in parts.items():
            new[name] = None
            if data is not None and old is not None:
                if id(data) not in prepared:
                    prepared[id(data)] = self._prepare(data)
                new[name] = _same_documents(prepared[id(data)], old)
        return new

    def _prepare(self, data: DataConfig) -> Documents:
        config, context = self.config, self.context.context
        return prepare_documents(
            data, self.made.tokenizer, context=context, length=config.sequence_length, overlap=config.overlap
        )

    def extend(self, opened: OpenedModel, folder: Path) -> OpenedModel:
        """Measure the model as it is, then give it the new tokenizer and rows for its tokens.

        Args:
            opened: The model.
            folder: The stage's folder.

        Raises:
            ModelError: The run has several processes, or the model's embedding can't be resized.
        """
        if distributed.world() > 1:
            raise ModelError("vocabulary: the embedding is extended in one process; run this stage without torchrun")
        self._measure(opened, folder / BEFORE)
        rows, new = embedding_rows(opened.hf), sorted(self.made.parts)
        fit_embedding(opened.hf, self.made.tokenizer, new)
        if self.settings.initialize == "subtokens":
            set_part_rows(opened.hf, self.made.parts)
        first = self.made.tokenizer.convert_ids_to_tokens(new[:SHOWN_NEW_TOKENS])
        note = {"new_tokens": len(new), "first": first, "rows_before": rows, "rows": embedding_rows(opened.hf)}
        return replace(
            opened,
            tokenizer=self.made.tokenizer,
            notes={**opened.notes, "vocabulary": note},
            new_tokens=(*opened.new_tokens, *new),
        )

    def _measure(self, opened: OpenedModel, folder: Path) -> None:
        missing = {
            name: text
            for name, text in self.measured.items()
            if text is not None and not (folder / f"{name}.json").is_file()
        }
        if not missing:  # a run that is resumed
            return
        folder.mkdir(parents=True, exist_ok=True)
        model = LanguageModel(opened.hf)
        for name, text in missing.items():
            rows = document_rows(text, score_rows(model, text.samples, self.config.systems))
            write_json(folder / f"{name}.json", {"rows": rows})


def _same_documents(found: Documents, old: Documents) -> Documents:
    """Return those documents of all in new tokens that `old` has in the old ones."""
    places = {old.place(i) for i in range(len(old))}
    new = found.take(np.array([i for i in range(len(found)) if found.place(i) in places], dtype=np.int64))
    kept = ("held_out", "dropped", "sources", "rows")
    new.stats.update({name: old.stats[name] for name in kept if name in old.stats}, **document_stats(new.samples))
    new.stats["tokens_per_byte_before"] = old.samples.loss_tokens / max(1, new.stats["bytes"])
    return new


def _texts(data: Documents, tokenizer: Any) -> Iterator[str]:
    """Yield the text of each piece, without its context."""
    for sample in data.samples:
        tokens = [t for t, weight in zip(sample.tokens, sample.weights, strict=True) if weight]
        yield tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def parameters_besides_rows(model: LanguageModel) -> list[nn.Parameter]:
    """Return the parameters that are trained, without the embedding, the output head and rows that adapters train.

    Raises:
        ModelError: Nothing else is trained: no rows are.
    """
    tables = set() if hasattr(model.hf, "peft_config") else {id(table) for table in token_tables(model.hf)}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rest = [p for name, p in trained.items() if id(p) not in tables and "trainable_tokens" not in name]
    if len(rest) == len(trained):
        raise ModelError("vocabulary.train_first: the adapter trains no rows of the embedding; leave train_first out")
    return rest
