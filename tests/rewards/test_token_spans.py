"""Characters and tokens, where a character has several tokens or a token several characters."""

from __future__ import annotations

from typing import Any

import pytest

from posttrain.models.tiny_model import tiny_tokenizer
from posttrain.rewards.token_spans import token_spans, tokens_of

BYTES = tiny_tokenizer()
TEXT = "né 1+1=2\n∑ 漢字 🙂=3\nend"


def merging() -> Any:
    """A byte-level tokenizer with merges, trained on such text: tokens of several characters, some over line ends."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT, "1+1=2\n2+2=4\n", "漢字漢字", "end\nend"] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def prefixed() -> Any:
    """One that writes words with a mark for the space, the first without it; bytes it has no piece for as <0x..>."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = [("<unk>", 0.0), ("▁", -2.0), ("▁end", -1.0), ("=", -2.0), ("2", -2.0), ("1", -2.0), ("\n", -2.0)]
    pieces += [(f"<0x{b:02X}>", -6.0) for b in range(256)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("make", [tiny_tokenizer, merging, prefixed])
def test_every_character_has_its_tokens(make: Any) -> None:
    """Held against the tokenizer's own offsets, which it knows when it tokenizes and we do not when we sample, and
    against what all tokens up to a place decode to."""
    tokenizer = make()
    encoded = tokenizer(TEXT, return_offsets_mapping=True, add_special_tokens=False)
    tokens = encoded["input_ids"]
    assert tokenizer.decode(tokens) == TEXT
    spans = token_spans(tokenizer, tokens, TEXT)
    for i, c in enumerate(TEXT):
        ours = [t for t, (a, b) in enumerate(spans) if a <= i < b]
        theirs = [t for t, (a, b) in enumerate(encoded["offset_mapping"]) if a <= i < b]
        assert ours == theirs or make is prefixed, (c, ours, theirs)  # whose offsets are those of whole unknown words
        assert tokenizer.decode(tokens[: ours[-1] + 1]).startswith(TEXT[: i + 1])
        assert not tokenizer.decode(tokens[: ours[-1]]).startswith(TEXT[: i + 1])
        assert make is merging or len(ours) == len(c.encode())


def test_by_hand() -> None:
    tokens = BYTES("aé\n🙂b")["input_ids"]  # a, 2 bytes, newline, 4 bytes, b
    spans = token_spans(BYTES, tokens, "aé\n🙂b")
    assert spans == [(0, 1), (1, 2), (1, 2), (2, 3), (3, 4), (3, 4), (3, 4), (3, 4), (4, 5)]
    assert tokens_of(spans, 0, 2) == (0, 3) and tokens_of(spans, 3, 5) == (4, 9) and tokens_of(spans, 5, 9) == (0, 0)


def test_ends_of_turns_stops_and_broken_bytes() -> None:
    end = BYTES.eos_token_id
    ids = BYTES("ab")["input_ids"]
    assert token_spans(BYTES, [*ids, end], "ab") == [(0, 1), (1, 2), (2, 2)]
    assert token_spans(BYTES, [ids[0], end, ids[1]], "ab") == [(0, 1), (1, 1), (1, 2)]
    assert token_spans(BYTES, BYTES("ab;c")["input_ids"], "ab") == [(0, 1), (1, 2), (2, 2), (2, 2)]  # cut at a stop
    half = BYTES("é")["input_ids"][:1]
    assert token_spans(BYTES, [*half, ids[0]], "\ufffda") == [(0, 1), (1, 2)]
    three = BYTES("é")["input_ids"][:1] * 3  # three beginnings, of which nothing comes, and then a character
    whole = [*three, *BYTES("🙂")["input_ids"], ids[0]]
    expected = [(0, 1), (1, 2), (2, 3), *[(3, 4)] * 4, (4, 5)]
    assert token_spans(BYTES, whole, "\ufffd\ufffd\ufffd🙂a") == expected
    assert token_spans(BYTES, [ids[0], *half], "a\ufffd") == [(0, 1), (1, 2)]
    assert token_spans(BYTES, [], "") == []
    with pytest.raises(ValueError, match="decode to 'ab', and the text is 'b'"):
        token_spans(BYTES, ids, "b")
