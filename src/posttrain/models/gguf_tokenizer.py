"""A tokenizer's fields in a GGUF file: vocabulary, merges, how text is split before merging, ends, chat template.

llama.cpp has the ways of splitting text built in, under names. A tokenizer whose way is none of those that are known
here is refused: under a wrong name a program would feed the model other tokens, and nothing would tell.
"""

from __future__ import annotations

import json
from typing import Any

from posttrain.core.errors import ModelError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of tokens in the file."""
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORD_SPLIT = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
SPLITS = {
    CONTRACTIONS + WORD_SPLIT + r"\p{N}" + REST: "qwen2",
    CONTRACTIONS + WORD_SPLIT + r"\p{N}{1,3}" + REST: "llama-bpe",
}
"""Regular expression of a byte-level tokenizer -> llama.cpp's name of it."""


def add_tokenizer(writer: Any, tokenizer: Any, rows: int, ends: list[int]) -> None:
    """Write a tokenizer.

    Args:
        writer: `gguf.GGUFWriter`.
        tokenizer: A fast tokenizer.
        rows: Rows of the embedding: tokens in the file.
        ends: Tokens that end generation, by the model's generation settings.

    Raises:
        ModelError: It is of a kind that llama.cpp does not know, or that is not known here.
    """
    described = _description(tokenizer)
    model = described["model"]
    if model.get("type") != "BPE":
        raise ModelError(
            f"a GGUF file can be written of byte-pair tokenizers, and this one is {model.get('type')!r}: convert it "
            "with llama.cpp's convert_hf_to_gguf.py"
        )
    pieces, kinds = _tokens(tokenizer, described, rows)
    merges = [" ".join(m) if isinstance(m, list) else m for m in model.get("merges") or []]
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(pieces, merges))
        writer.add_add_space_prefix(_space_prefix(described))
        kinds = [BYTE if _is_byte(p) else k for p, k in zip(pieces, kinds, strict=True)]
        kinds = [UNKNOWN if p == model.get("unk_token") else k for p, k in zip(pieces, kinds, strict=True)]
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(split_name(described))
    writer.add_token_list(pieces)
    writer.add_token_types(kinds)
    if merges:
        writer.add_token_merges(merges)
    _add_special(writer, tokenizer, rows, ends)


def _description(tokenizer: Any) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            f"{type(tokenizer).__name__} has no fast tokenizer (tokenizer.json), which a GGUF file is written from"
        )
    found: dict[str, Any] = json.loads(backend.to_str())
    return found


def split_name(described: dict[str, Any]) -> str:
    """Return llama.cpp's name of how a byte-level tokenizer splits text before merging.

    Args:
        described: The contents of its tokenizer.json.

    Raises:
        ModelError: It is none of the known ones.
    """
    outer = described.get("pre_tokenizer") or {}
    steps = outer.get("pretokenizers", [outer])
    kinds = [s.get("type") for s in steps]
    last = steps[-1]
    if kinds == ["ByteLevel"] and last.get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and last.get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True):
        name = SPLITS.get((steps[0].get("pattern") or {}).get("Regex", ""))
        if name is not None:
            return name
    raise ModelError(
        f"how this tokenizer splits text before merging ({', '.join(map(str, kinds))}) has no name here that llama.cpp "
        f"knows (known: gpt-2, smollm, {', '.join(SPLITS.values())}): convert the model with llama.cpp's "
        "convert_hf_to_gguf.py"
    )


def _tokens(tokenizer: Any, described: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Return the text and kind of each row of the embedding."""
    added = {t["id"]: t for t in described.get("added_tokens") or []}
    pieces, kinds = [f"[PAD{i}]" for i in range(rows)], [UNUSED] * rows
    vocabulary = tokenizer.get_vocab()
    beyond = [t for t, i in vocabulary.items() if i >= rows]
    if beyond:
        raise ModelError(
            f"the tokenizer has {len(beyond)} tokens without a row of the embedding ({beyond[0]!r}, ...), and a GGUF "
            "file holds both in one list: remove them from the tokenizer, or train the model with them"
        )
    for piece, i in vocabulary.items():
        pieces[i], kinds[i] = piece, NORMAL
        if i in added:
            kinds[i] = CONTROL if added[i].get("special") else USER_DEFINED
    return pieces, kinds


def _is_byte(piece: str) -> bool:
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


def _scores(pieces: list[str], merges: list[str]) -> list[float]:
    """Return scores that make llama.cpp merge in the order of `merges`: the earlier, the higher."""
    rank: dict[str, int] = {}
    for i, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", ""), i)
    return [-float(rank[p]) if p in rank else (0.0 if _is_byte(p) else -1e6) for p in pieces]


def _space_prefix(described: dict[str, Any]) -> bool:
    normal, before = described.get("normalizer") or {}, described.get("pre_tokenizer") or {}
    steps = normal.get("normalizers", [normal])
    return any(s.get("type") == "Prepend" for s in steps) or before.get("prepend_scheme") in ("always", "first")


def _add_special(writer: Any, tokenizer: Any, rows: int, ends: list[int]) -> None:
    """Write which tokens begin and end text, and the chat template."""
    own = tokenizer.eos_token_id
    ends = [e for e in dict.fromkeys(ends) if 0 <= e < rows] or ([] if own is None else [own])
    if own in ends:  # the tokenizer's own first; programs stop at each of these
        ends = [own, *(e for e in ends if e != own)]
    if len(ends) > 3:
        raise ModelError(
            f"a GGUF file names at most three tokens that end text, and the model has {len(ends)}: shorten "
            "eos_token_id in its generation_config.json"
        )
    adders = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    for add, end in zip(adders, ends, strict=False):
        add(end)
    named = ((tokenizer.bos_token_id, writer.add_bos_token_id), (tokenizer.pad_token_id, writer.add_pad_token_id))
    for token, add in (*named, (tokenizer.unk_token_id, writer.add_unk_token_id)):
        if token is not None and token < rows:
            add(token)
    encoded = list(tokenizer("a")["input_ids"])
    writer.add_add_bos_token(bool(encoded) and encoded[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(len(encoded) > 1 and encoded[-1] == own)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)
