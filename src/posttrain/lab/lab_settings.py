"""What both kinds of laboratory share: their settings, and a tokenizer made of their texts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

END = "<|endoftext|>"

Kind = Literal["sums", "reviews"]


@dataclass(frozen=True)
class Settings:
    """What is made. `steps` is fixed rather than the time, so that a seed means the same model on any machine."""

    seed: int = 0
    kind: Kind = "sums"
    steps: int = 800
    batch_size: int = 128
    lr: float = 3e-3
    width: int = 160
    layers: int = 4
    heads: int = 5
    train_problems: int = 4000
    held_out_problems: int = 512
    measured: int = 512
    """Held-out problems that the model is measured on at the end."""


def byte_level_bpe(texts: Iterable[str], size: int, min_frequency: int, digits: bool) -> Any:
    """Byte-level BPE of no more than `size` tokens, for transformers; digits: every one a token of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level]) if digits else level
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=min_frequency,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )
