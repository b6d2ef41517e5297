"""Continue the byte-pair merges of a tokenizer on texts of a domain, and give the new tokens rows.

New merges are appended after the old ones. An encoder carries out the merge that comes first in the list, so it makes
the old tokens of a word first, and no old merge can follow a new one (none has a new token as a part). Hence a text
without the new tokens encodes as before, and one with them becomes the old tokens if each new token is replaced by its
parts. A tokenizer that takes whole words from its vocabulary before it merges (ignore_merges) is an exception: a word
that is a new token as a whole is taken at once.
"""

from __future__ import annotations

import copy
import heapq
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from posttrain.core.errors import ModelError
from posttrain.data.sample_store import vocabulary_size
from posttrain.models.vocabulary import token_tables

TEXTS_AT_A_TIME = 1000
"""Texts that are encoded at a time."""


@dataclass(frozen=True)
class ExtendedTokenizer:
    """Hold a tokenizer with new tokens.

    Attributes:
        tokenizer: The tokenizer.
        parts: By the id of each new token, the old tokens that it replaces.
    """

    tokenizer: Any
    parts: Mapping[int, tuple[int, ...]]


def extend_tokenizer(tokenizer: Any, texts: Iterable[str], count: int) -> ExtendedTokenizer:
    """Return a copy of a tokenizer with `count` more merges, those of the most frequent pairs of tokens in the texts.

    The pairs are counted within words, as the tokenizer divides a text into them (Sennrich et al., arXiv 1508.07909).
    Equal counts are decided by the ids. Fewer are made if no pair occurs twice any more.

    Args:
        tokenizer: A fast tokenizer with byte-level pairs (GPT-2, Llama 3, Qwen, SmolLM).
        texts: The texts.
        count: Number of new tokens.

    Raises:
        ModelError: The tokenizer is of another kind, or no pair occurs twice.
    """
    settings = _settings(tokenizer)
    backend = tokenizer.backend_tokenizer
    words = _words(backend, texts, {int(token["id"]) for token in settings["added_tokens"]})
    spelling, first = _Spelling(backend), vocabulary_size(tokenizer)
    merges = _merges(words, count, first, spelling)
    if not merges:
        raise ModelError("vocabulary: no pair of tokens occurs twice in the text, so there is no new token to make")
    model, parts = settings["model"], dict[int, tuple[int, ...]]()
    as_text = bool(model["merges"]) and isinstance(model["merges"][0], str)
    for new, pair in enumerate(merges, first):
        texts_of_pair = [spelling.of(token) for token in pair]
        model["vocab"][spelling.of(new)] = new
        model["merges"].append(" ".join(texts_of_pair) if as_text else texts_of_pair)
        parts[new] = tuple(old for token in pair for old in parts.get(token, (token,)))
    from tokenizers import Tokenizer

    extended = copy.deepcopy(tokenizer)
    extended._tokenizer = Tokenizer.from_str(json.dumps(settings))
    return ExtendedTokenizer(extended, parts)


def _settings(tokenizer: Any) -> dict[str, Any]:
    """Return the tokenizer's own description. Raises ModelError for one that is not of byte-level pairs."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    settings: dict[str, Any] = {} if backend is None else json.loads(backend.to_str())
    kind = (settings.get("model") or {}).get("type")
    if kind != "BPE" or '"ByteLevel"' not in json.dumps(settings.get("pre_tokenizer")):
        found = f"{kind} without byte-level words" if kind == "BPE" else str(kind or type(tokenizer).__name__)
        raise ModelError(
            f"vocabulary: the tokenizer is {found}, and new tokens continue the merges of byte-level pairs (GPT-2, "
            "Llama 3, Qwen, SmolLM). Name tokens in model.add_tokens instead, or leave vocabulary out"
        )
    return settings


class _Spelling:
    """Give the vocabulary's text of tokens, new ones included."""

    def __init__(self, backend: Any) -> None:
        self.backend, self.new, self.texts = backend, dict[int, str](), set[str]()

    def of(self, token: int) -> str:
        return self.new.get(token) or str(self.backend.id_to_token(token))

    def add(self, token: int, pair: tuple[int, int]) -> bool:
        """Note the text of a new token; return False if another token has it."""
        text = self.of(pair[0]) + self.of(pair[1])
        if self.backend.token_to_id(text) is not None or text in self.texts:
            return False
        self.new[token] = text
        self.texts.add(text)
        return True


def _words(backend: Any, texts: Iterable[str], added: set[int]) -> Counter[tuple[int, ...]]:
    """Count the words of texts, as tuples of tokens."""
    words: Counter[tuple[int, ...]] = Counter()
    waiting: list[str] = []

    def count() -> None:
        for encoded in backend.encode_batch(waiting, add_special_tokens=False):
            by_word: dict[int, list[int]] = defaultdict(list)
            for token, word in zip(encoded.ids, encoded.word_ids, strict=True):
                if word is not None and token not in added:
                    by_word[word].append(token)
            words.update(tuple(word) for word in by_word.values())
        waiting.clear()

    for text in texts:
        waiting.append(text)
        if len(waiting) == TEXTS_AT_A_TIME:
            count()
    count()
    return words


def _merges(words: Counter[tuple[int, ...]], count: int, first: int, spelling: _Spelling) -> list[tuple[int, int]]:
    """Return the pairs that are merged, in order; the new token of the n-th has the id `first` + n."""
    spelled = [(list(word), number) for word, number in sorted(words.items()) if len(word) > 1]
    counts: Counter[tuple[int, int]] = Counter()
    places: dict[tuple[int, int], set[int]] = defaultdict(set)
    for i, (word, number) in enumerate(spelled):
        for pair in zip(word, word[1:], strict=False):
            counts[pair] += number
            places[pair].add(i)
    # The newest count of a pair is on the heap; entries with an earlier count are stale.
    heap = [(-number, pair) for pair, number in counts.items()]
    heapq.heapify(heap)
    merges: list[tuple[int, int]] = []
    while heap and len(merges) < count:
        negative, pair = heapq.heappop(heap)
        if counts[pair] != -negative or -negative < 2:
            continue
        new = first + len(merges)
        if not spelling.add(new, pair):
            continue
        merges.append(pair)
        changed: set[tuple[int, int]] = set()
        for i in places.pop(pair):
            word, number = spelled[i]
            before = Counter(zip(word, word[1:], strict=False))
            word[:] = merge_pair(word, pair, new)
            after = Counter(zip(word, word[1:], strict=False))
            for other in before.keys() | after.keys():
                if after[other] != before[other]:
                    counts[other] += number * (after[other] - before[other])
                    changed.add(other)
                if other in after:
                    places[other].add(i)
        for other in changed - {pair}:
            heapq.heappush(heap, (-counts[other], other))
    return merges


def merge_pair(word: Sequence[int], pair: tuple[int, int], new: int) -> list[int]:
    """Return a word in which each occurrence of a pair, from the left, is one token.

    Args:
        word: Its tokens.
        pair: Two tokens.
        new: The token that takes their place.
    """
    out: list[int] = []
    for token in word:
        if out and (out[-1], token) == pair:
            out[-1] = new
        else:
            out.append(token)
    return out


@torch.no_grad()
def set_part_rows(hf: Any, parts: Mapping[int, Sequence[int]]) -> None:
    """Set the rows of new tokens to the mean of the rows of their parts, in place: embedding, output head and its bias.

    Args:
        hf: A transformers model.
        parts: By the id of each new token, its parts.
    """
    for table in token_tables(hf):
        for new, old in parts.items():
            table[new] = table[list(old)].float().mean(0).to(table.dtype)
