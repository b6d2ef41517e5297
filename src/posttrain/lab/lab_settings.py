"""Settings that all kinds of laboratory share, and a tokenizer made of their texts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

END = "<|endoftext|>"
LabKind = Literal["sums", "reviews", "refine", "programs"]


@dataclass(frozen=True)
class LabSettings:
    """Hold the settings of a laboratory. `steps` is fixed, not the time, so that a seed makes the same model anywhere.

    Attributes:
        measured: Number of held-out problems or reviews on which the finished model is measured.
    """

    seed: int = 0
    kind: LabKind = "sums"
    steps: int = 800
    batch_size: int = 128
    lr: float = 3e-3
    width: int = 160
    layers: int = 4
    heads: int = 5
    train_problems: int = 4000
    held_out_problems: int = 512
    measured: int = 512


def byte_level_bpe(texts: Iterable[str], size: int, min_frequency: int, digits: bool, apart: str | None = None) -> Any:
    """Train a byte-level BPE tokenizer for transformers.

    Args:
        texts: Texts to train on.
        size: Most tokens that it has.
        min_frequency: How often a pair must occur to be merged.
        digits: Make every digit one token.
        apart: Pattern of what stays apart from the text around it; tokens may then hold several words of a line.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=apart is None)
    parts: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    if apart is not None:
        parts += [pre_tokenizers.Split("\n", "merged_with_previous"), pre_tokenizers.Split(Regex(apart), "isolated")]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*parts, level]) if parts else level
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
