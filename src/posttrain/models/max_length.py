"""Length limits of sequences: the context, and the length from which frequencies depend on the batch.

With two rope types transformers chooses the rotary frequencies of a whole call by its largest position: `longrope`
(arXiv 2402.13753; Phi-3 and 4) has factors for short text and others for long, `dynamic` stretches them ever further
beyond the context. A short sequence packed beside a long one would be another sequence, and a completion that passes
the length would be drawn with frequencies that the learner does not use. Neither a tree that shares prefixes nor keys
that are kept can hold both kinds at once. So what is computed stays within the length up to which there is one kind,
where everything is as transformers has it for each sequence alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.core.errors import ModelError

PAIRS = (("short_factor", "long_factor"), ("short_mscale", "long_mscale"))
"""What `longrope` has one of for short text and one for long. Where both are alike, length changes nothing."""


def context(settings: Any) -> int | None:
    """Return the longest sequence in tokens, by a transformers configuration (None: it names none)."""
    text = settings.get_text_config()
    named = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    lengths = [int(n) for n in (named, alike_up_to(settings)) if n]
    return min(lengths, default=None)


def alike_up_to(settings: Any) -> int | None:
    """Return the longest call whose rotary frequencies are those of any shorter one (None: they never change)."""
    text = settings.get_text_config()
    named = getattr(text, "max_position_embeddings", None)
    lengths = []
    for rope in _ropes(text):
        kind = _kind(rope)
        if "dynamic" in kind:
            lengths.append(named)
        elif kind in ("longrope", "su") and any(rope.get(short) != rope.get(long) for short, long in PAIRS):
            own = rope.get("original_max_position_embeddings")
            lengths.append(own or getattr(text, "original_max_position_embeddings", None) or named)
    return min((int(n) for n in lengths if n), default=None)


def check_length(settings: Any, length: int) -> None:
    """Raise ModelError for a sequence of so many tokens that its frequencies would change those beside it."""
    bound = alike_up_to(settings)
    if bound is not None and length > bound:
        raise ModelError(f"a sequence has {length} tokens. {why_short(settings)}")


def why_short(settings: Any) -> str:
    """Write what bounds sequences at `alike_up_to`, and what to do; a sentence or two for messages."""
    text = settings.get_text_config()
    kinds = sorted({_kind(rope) for rope in _ropes(text)} - {"default"})
    bound = alike_up_to(settings)
    remedy = "or choose a rope_type whose frequencies are fixed (yarn, linear) in its config.json"
    if not any("dynamic" in kind for kind in kinds):
        remedy = (
            "or use the frequencies for long text at every length: copy the numbers of long_factor over those of "
            "short_factor in its config.json, which the trained model then keeps"
        )
    return (
        f"{text.model_type}: with sequences of more than {bound} tokens its rotary frequencies (rope_type "
        f"{', '.join(kinds)}) depend on the longest sequence computed at once, so results would depend on what is "
        f"batched together. Keep sequences to {bound} tokens, {remedy}"
    )


def _ropes(text: Any) -> list[Mapping[str, Any]]:
    """The settings of rotary positions: one, or one for each type of layers."""
    found = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    return [r for r in (found, *found.values()) if isinstance(r, Mapping)]


def _kind(rope: Mapping[str, Any]) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")
