"""Stop strings: which one a token completes, and the text before it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int], bool], str]
"""(tokens, whether special tokens are left out) -> text."""


def before_stop(tokens: Sequence[int], stops: Sequence[str], decode: Decode) -> str | None:
    """Return the text before the stop string that the newest token completes; None: it completes none.

    An occurrence that was complete without the newest token does not count. Of several that it completes, the one that
    begins first cuts. Stop strings are searched with special tokens shown, so that they may name them; the text is
    without them, and a special token in which a stop string begins is left out as a whole.

    Args:
        tokens: The completion so far.
        stops: The stop strings.
        decode: (tokens, leave out special tokens) -> text.
    """
    if not tokens or not stops:
        return None
    # A stop string that the newest token completes lies within as many tokens as it has bytes, and some.
    tail = list(tokens[-max(len(s.encode()) for s in stops) - 8 :])
    now = decode(tail, False)
    if not any(s in now for s in stops):
        return None
    # Text up to here was there before. A character of several tokens is another one as long as it is incomplete.
    old = len(os.path.commonprefix([now, decode(tail[:-1], False)]))
    places = [now.find(s, max(0, old - len(s) + 1)) for s in stops]
    start = min((at for at in places if at >= 0), default=None)
    return None if start is None else _text(list(tokens), len(now) - start, decode)


def _text(tokens: list[int], dropped: int, decode: Decode) -> str:
    """Text of the tokens without its last `dropped` characters (as counted with special tokens), and without specials.

    Whole tokens are decoded without specials; of the token in which the cut lies its first characters are kept.
    """
    whole = decode(tokens, False)
    cut = max(0, len(whole) - dropped)
    for n in range(len(tokens) - 1, -1, -1):
        head = decode(tokens[:n], False)
        if len(head) <= cut and whole.startswith(head):
            one = tokens[n : n + 1]
            special = decode(one, True) != decode(one, False)
            return decode(tokens[:n], True) + ("" if special else whole[len(head) : cut])
    return whole[:cut]  # never: no tokens are no text, which any text starts with
