"""Stop strings by hand: what the newest token completes, and what is left of the text."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from posttrain.models.tiny_model import tiny_tokenizer
from posttrain.sampling.stop_strings import before_stop

TOKENIZER = tiny_tokenizer()
WORDS = ["<s>", "a", "b", "ab", "bc", " c", "cab", "abcab"]
"""Token 0 is special."""


def words(tokens: Sequence[int], plain: bool) -> str:
    return "".join(WORDS[t] for t in tokens if t or not plain)


def spelled(tokens: Sequence[int], plain: bool) -> str:
    """Byte-level: a character may be several tokens."""
    return str(TOKENIZER.decode(list(tokens), skip_special_tokens=plain))


@pytest.mark.parametrize(
    ("said", "stops", "left"),
    [
        (["a", "b"], ["ab"], ""),
        (["ab", "a"], ["ab"], None),  # complete without the newest token
        (["ab", "ab"], ["ab"], "ab"),  # the one before it does not count
        (["a", "bc"], ["ab"], ""),  # what is behind it is dropped too
        (["b", "cab"], ["ab"], "bc"),  # a part of a token is kept
        (["b", "abcab"], ["ab"], "b"),  # the first that it completes
        (["ab", "cab"], ["ab", "bcab"], "a"),  # the one that begins first
        (["a", "b", "bc"], ["bb", "bc"], "a"),
        (["a", "b"], ["ba", "c"], None),
        (["a", "<s>", "b", " c"], [" c"], "ab"),  # special tokens are not shown
        (["a", "<s>", "b"], ["<s>b"], "a"),  # but may be named
        (["a", "<s>", "b"], ["s>b"], "a"),  # one that is cut into is left out
        (["a", "b"], [], None),
        ([], ["a"], None),
    ],
)
def test_by_hand(said: list[str], stops: list[str], left: str | None) -> None:
    assert before_stop([WORDS.index(w) for w in said], stops, words) == left


def test_characters_of_several_tokens() -> None:
    tokens = TOKENIZER.encode("é日<|im_start|>日本é本")
    assert len(tokens) == 2 + 3 + 1 + 3 + 3 + 2 + 3  # bytes, and one for the special token
    texts = [before_stop(tokens[:n], ["本", "é日<"], spelled) for n in range(1, len(tokens) + 1)]
    assert {n: t for n, t in enumerate(texts, 1) if t is not None} == {6: "", 12: "é日日", 17: "é日日本é"}


def test_far_from_the_beginning() -> None:
    """Only the last tokens are looked at; the text is whole."""
    tokens = [1, 0, 3] * 100 + [1, 4]
    assert before_stop(tokens, ["aabc"], words) is None  # "…abab" + "a" + "bc": no aabc is new
    assert before_stop(tokens, ["babc"], words) == "aab" * 99 + "aa"
