"""The text of a completion in pieces, as its tokens are drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from posttrain.data.tool_calls import CALL_MARK

DecodePlain = Callable[[Sequence[int]], str]
"""Tokens -> text without special tokens."""


class TextPieces:
    """Turn tokens into pieces of text that never have to be taken back.

    Held back are characters of which tokens are missing, a text that may become a stop string, and with tools all from
    where a call may begin: what the answer is then, its end decides.

    Attributes:
        sent: The text that was handed out.
        held: True if text is held back.
    """

    def __init__(self, decode: DecodePlain, stops: Sequence[str] = (), tools: bool = False) -> None:
        self.decode, self.stops, self.tools = decode, [*stops, *([CALL_MARK] if tools else [])], tools
        self.text = self.sent = ""
        self._tokens: list[int] = []
        self._known = self._start = 0
        self.held = False

    def add(self, token: int) -> str:
        """Take a token in, and return the text that is certain now and was not before."""
        self._tokens.append(token)
        # Only the newest tokens are decoded, with those before them: some decoders trim a text's first space.
        before = self.decode(self._tokens[self._start : self._known])
        now = self.decode(self._tokens[self._start :])
        complete = not now.endswith("\ufffd")
        if complete and len(now) > len(before):
            self.text += now[len(before) :]
            self._start, self._known = self._known, len(self._tokens)
        end = len(self.text) - self._doubtful()
        self.held = end < len(self.text) or not complete
        piece = self.text[len(self.sent) : end]
        self.sent += piece
        return piece

    def finish(self, text: str) -> str:
        """Return what of the whole text was not handed out."""
        return text[len(self.sent) :] if text.startswith(self.sent) else ""

    def _doubtful(self) -> int:
        """Return the length of the text's end that is held back."""
        if self.tools and (begin := self._call()) >= 0:
            return len(self.text) - begin
        lengths = (
            size
            for stop in self.stops
            for size in range(1, min(len(stop), len(self.text) + 1))
            if self.text.endswith(stop[:size])
        )
        return max(lengths, default=0)

    def _call(self) -> int:
        """Return where a call may begin; -1: nowhere."""
        start = self.text.lstrip()[:1]
        return 0 if start in ("{", "[") and start else self.text.find(CALL_MARK)
