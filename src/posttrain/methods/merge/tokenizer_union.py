"""Join tokenizers: the tokens of all, with the base's ids for the base's."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

from posttrain.core.errors import ModelError

log = logging.getLogger("posttrain")
JOINED_KINDS = ("BPE", "WordPiece", "WordLevel")
"""Models of the tokenizers library whose vocabularies are mappings, to which tokens can be added."""
SPECIAL_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def union_tokenizer(base: Any, others: Sequence[tuple[str, Any]]) -> Any:
    """Return a tokenizer with the tokens of the base, under their ids, and those of the others that it lacks.

    Merges of the others follow the base's, so a text is split as the base splits it, and then joined further where only
    another tokenizer has a token. Text is prepared (normalised, split at spaces) as the base does it. Added tokens stay
    added tokens.

    Args:
        base: The base's tokenizer.
        others: (Source, tokenizer) of the other models.

    Raises:
        ModelError: The tokenizers are of kinds that can't be joined.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    joined = _content(base, "the base")
    kind, vocabulary = joined["model"]["type"], dict(joined["model"]["vocab"])
    # Added tokens get their ids from the vocabulary when it is read, so they are in it: behind it they would move.
    vocabulary |= {token["content"]: token["id"] for token in joined["added_tokens"]}
    merges = _merges_of(joined["model"])
    for source, tokenizer in others:
        content = _content(tokenizer, source)
        model = content["model"]
        if model["type"] != kind:
            raise ModelError(
                f"tokenizer: union joins tokenizers of one kind, and that of {source} is {model['type']}, the base's "
                f"{kind}. Set tokenizer to base or to {source}"
            )
        if any(content[part] != joined[part] for part in ("normalizer", "pre_tokenizer")):
            log.warning(
                "the tokenizer of %s splits text otherwise than the base's, which is what the union does", source
            )
        new = sorted(content["model"]["vocab"].items(), key=lambda item: item[1])
        new += [(token["content"], token["id"]) for token in content["added_tokens"]]
        lacking = [token for token in dict.fromkeys(token for token, _ in new) if token not in vocabulary]
        vocabulary |= {token: number for number, token in enumerate(lacking, max(vocabulary.values()) + 1)}
        known = set(merges)
        merges += [pair for pair in _merges_of(model) if pair not in known]
        have = {token["content"] for token in joined["added_tokens"]}
        joined["added_tokens"] += [
            {**token, "id": vocabulary[token["content"]]}
            for token in content["added_tokens"]
            if token["content"] not in have
        ]
    joined["model"]["vocab"] = vocabulary
    if "merges" in joined["model"]:
        joined["model"]["merges"] = [list(pair) for pair in merges]
    joined["added_tokens"].sort(key=lambda token: token["id"])
    roles = {role: getattr(base, role) for role in SPECIAL_ROLES if getattr(base, role, None) is not None}
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(joined)),
        model_max_length=base.model_max_length,
        padding_side=base.padding_side,
        clean_up_tokenization_spaces=False,
        **roles,
    )
    made.chat_template = base.chat_template
    ids = made.get_vocab()
    moved = [token for token, number in base.get_vocab().items() if ids.get(token) != number]
    assert not moved, f"tokens of the base got other ids: {moved[:3]}"
    return made


def _merges_of(model: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the merges of a stored model, which older files hold as texts with a space between the parts."""
    return [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model.get("merges", [])]


def _content(tokenizer: Any, source: str) -> dict[str, Any]:
    """Return what the tokenizers library stores of a tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(f"tokenizer: union needs tokenizers of the tokenizers library, and that of {source} is none")
    content: dict[str, Any] = json.loads(backend.to_str())
    if content["model"]["type"] not in JOINED_KINDS:
        raise ModelError(
            f"tokenizer: union joins tokenizers of the kinds {', '.join(JOINED_KINDS)}, and that of {source} is "
            f"{content['model']['type']}. Set tokenizer to base or to one of the sources"
        )
    return content
