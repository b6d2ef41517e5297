"""Extend a model's vocabulary by tokens of a domain, and measure the model in its own tokens before that."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from posttrain.config.settings import DataConfig
from posttrain.core import distributed
from posttrain.core.errors import ModelError
from posttrain.core.files import write_json
from posttrain.data.text_documents import Documents, document_sizes, prepare_documents
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

    def tokenize_again(self, data: DataConfig | None, old: Documents | None) -> Documents | None:
        """Return the same documents in the tokens of the new tokenizer; None if there are none.

        Args:
            data: Settings of the data that the documents are a part of.
            old: The documents in the old tokens.
        """
        if data is None or old is None:
            return None
        config = self.config
        found = prepare_documents(
            data,
            self.made.tokenizer,
            context=self.context.context,
            length=config.sequence_length,
            overlap=config.overlap,
        )
        places = {old.place(i) for i in range(len(old))}
        new = found.take(np.array([i for i in range(len(found)) if found.place(i) in places], dtype=np.int64))
        samples, (sizes, tokens) = new.samples, document_sizes(new.samples)
        new.stats.update(
            {name: old.stats[name] for name in ("held_out", "dropped", "sources", "rows") if name in old.stats},
            used=len(sizes),
            tokens=int(samples.lengths.sum()),
            loss_tokens=samples.loss_tokens,
            bytes=int(sizes.sum()),
            tokens_per_byte=float(tokens.sum()) / max(1, int(sizes.sum())),
            tokens_per_byte_before=float(old.samples.loss_tokens) / max(1, int(sizes.sum())),
        )
        return new

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
