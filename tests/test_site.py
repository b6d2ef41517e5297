"""The documentation as a site: it builds without a broken link, has every page, and requests nothing from elsewhere."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OUTSIDE = re.compile(r"<(?:script|link|img|iframe|source|video|audio)\b[^>]*?(?:src|href)=[\"']?(?:https?:)?//[^>]*>")


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    """Build the site of a folder into its subfolder site."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder / "site")]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200)


@pytest.mark.long
def test_the_site_is_whole_and_a_broken_link_fails(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="extra: docs")
    for path in (ROOT / "mkdocs.yml", *ROOT.glob("*.md")):
        shutil.copy(path, tmp_path)
    for name in ("docs", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("benchmarks", "examples", "src"):
        (tmp_path / name).symlink_to(ROOT / name)
    done = build(tmp_path)
    assert done.returncode == 0, done.stderr
    site = tmp_path / "site"
    wanted = {p.relative_to(ROOT / "docs").with_suffix(".html") for p in (ROOT / "docs").rglob("*.md")}
    missing = [page for page in wanted if page.name != "README.html" and not (site / page).is_file()]
    assert len(wanted) > 70 and not missing
    assert (site / "project" / "benchmarks" / "index.html").is_file() and (
        site / "search" / "search_index.js"
    ).is_file()
    for page in site.rglob("*.html"):
        assert not OUTSIDE.findall(page.read_text(encoding="utf-8")), page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet
    with (tmp_path / "docs" / "sft.md").open("a", encoding="utf-8") as page:
        page.write("\n[gone](gone.md) [no such heading](data.md#gone)\n")
    broken = build(tmp_path)
    assert broken.returncode != 0 and "gone.md" in broken.stderr and "#gone" in broken.stderr
