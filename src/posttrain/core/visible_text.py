"""Text from rows, models and servers as a terminal may show it: nothing in it moves the cursor or hides anything."""

from __future__ import annotations

import io
import logging
import re
import sys
import warnings

from posttrain.core.secrets import hide_secrets

_HIDDEN = re.compile(
    "["
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters but tab and line feed
    "\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"  # invisible, or change direction
    "\u115f\u1160\u3164\uffa0\u2800"  # letters without a shape
    "\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff"  # halves of characters, and no characters
    "\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"  # joiners and beams of rare scripts
    "\U000e0000-\U000e0fff"  # tags and selectors, in which text can be hidden
    "]"
)
_PICTURES = 0x2400
"""First of Unicode's pictures of the control characters."""


def _picture(found: re.Match[str]) -> str:
    code = ord(found[0])
    if code < 0x20:
        return chr(_PICTURES + code)
    return "\N{SYMBOL FOR DELETE}" if code == 0x7F else f"<U+{code:04X}>"


def visible(text: object) -> str:
    """Return text with a visible symbol for each character that a terminal would obey or not show.

    Control characters (escape sequences begin with one) become Unicode's pictures of them; overrides of the writing
    direction, invisible characters and lone surrogates become <U+202E> and the like. Tabs, line feeds and the joiners
    of scripts and emoji stay.
    """
    return _HIDDEN.sub(_picture, str(text))


class _VisibleFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return visible(hide_secrets(super().format(record)))


def show_text_as_it_is() -> None:
    """Let nothing that comes from files, models or servers be obeyed by the terminal: warnings, log lines, errors."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal without Unicode ends no command
    handler = logging.StreamHandler()
    handler.setFormatter(_VisibleFormatter("%(message)s"))
    handler.setLevel(logging.WARNING)
    logging.getLogger("posttrain").addHandler(handler)
    plain = warnings.formatwarning
    warnings.formatwarning = lambda *args, **more: visible(plain(*args, **more))
