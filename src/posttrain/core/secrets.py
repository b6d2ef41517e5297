"""Keys and passwords, taken out of what is shown and kept: messages, manifests, reports."""

from __future__ import annotations

import json
import os
import re
from html import escape
from urllib.parse import quote

REDACTED = "***"
SHORTEST = 8
"""Shortest value that is taken for a secret: shorter ones stand in ordinary text too."""
LONG_SECRET = 16
"""Length from which a value stands in no text by chance."""
_NAMES = re.compile(r"(API_?KEY|_KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
"""Names of environment variables whose values are secret."""
_IN_ADDRESS = re.compile(r"(?<=://)[^/\s@'\"]+@")
_IN_QUERY = re.compile(
    r"([?&](?:api[-_]?key|key|token|access[-_]token|secret|password|sig|signature)=)[^&\s'\"]+", re.I
)
_IN_HEADER = re.compile(r"\b(Bearer|Basic)\s+[A-Za-z0-9._~+/=-]{8,}", re.I)
_IN_FIELD = re.compile(
    r"\b((?:authorization|api[-_]?key|password|secret|access[-_]token)[\"']?\s*[:=]\s*[\"']?)(?!Bearer|Basic)[^\s\"',;&})]+",
    re.I,
)
_KEYS = re.compile(r"\b(sk-|hf_|gsk_|ghp_|github_pat_)(?:[A-Za-z0-9]{24,}|(?<=sk-)[A-Za-z0-9_-]{20,})")
_known: set[str] = set()


def add_secret(value: str) -> None:
    """Remember a key that was read, so that it is hidden from now on wherever it comes from."""
    if len(value) >= SHORTEST:
        _known.add(value)


def secret_values() -> list[str]:
    """Return the keys that are known, and the values of environment variables that are named like keys, longest first.

    Each also as it stands in JSON, in addresses and in HTML.
    """
    values = _known | {v for name, v in os.environ.items() if _NAMES.search(name) and len(v) >= SHORTEST}
    spellings = {s for v in values for s in (v, quote(v, safe=""), quote(v), json.dumps(v)[1:-1], escape(v))}
    return sorted(spellings, key=len, reverse=True)


def hide_values(text: str) -> str:
    """Return text without the values of `secret_values`."""
    for value in secret_values():
        text = text.replace(value, REDACTED)
    return text


def hide_secrets(text: str) -> str:
    """Return a message without known keys, and without what looks like one: user names and passwords in addresses,
    keys in their queries, contents of authorization headers, keys of well-known forms.
    """
    text = _IN_ADDRESS.sub(f"{REDACTED}@", hide_values(text))
    text = _IN_HEADER.sub(rf"\1 {REDACTED}", _IN_QUERY.sub(rf"\1{REDACTED}", text))
    text = _IN_FIELD.sub(rf"\1{REDACTED}", text)
    return _KEYS.sub(rf"\1{REDACTED}", text)


def holds_secret(text: str) -> bool:
    """Return True if a known key stands in a text; short ones may do so by chance."""
    return any(len(value) >= LONG_SECRET and value in text for value in secret_values())


def has_credentials(address: str) -> bool:
    """Return True if an address holds a user name, a password or a key."""
    return bool(_IN_ADDRESS.search(address) or _IN_QUERY.search(address))
