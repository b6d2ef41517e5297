"""Make pages of the repository read the same on GitHub and on the site (hooks of mkdocs.yml).

Links to files outside docs/ (figures, scripts, the changelog) lead to copies of these files below project/ on the
site: a page for Markdown, a list for a folder, else the file. Markdown that only GitHub reads as a list is adapted.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
SCHEME = re.compile(r"[a-z]+:|/")


def place_on_site(path: str) -> str:
    """Return where a path of the repository is on the site, relative to its root."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    full = ROOT / path
    if full.is_dir():
        readme = posixpath.join(path, "README.md")
        return place_on_site(readme) if (ROOT / readme).is_file() else f"project/{path}/index.md"
    return f"project/{path}"


def links_in(text: str, folder: str) -> list[str]:
    """Return the paths in the repository that a page links to, if they exist.

    Args:
        text: The page.
        folder: Its folder in the repository.
    """
    targets = [m[2] for m in LINK.finditer(text) if not SCHEME.match(m[2])]
    paths = [posixpath.normpath(posixpath.join(folder, target)) for target in targets]
    return [p for p in paths if not p.startswith("..") and (ROOT / p).exists()]


def on_files(files: Files, config: Any) -> Files:
    """Add what pages link to outside docs/, and what those pages link to."""
    todo = [(DOCS / f.src_uri).relative_to(ROOT).as_posix() for f in files.documentation_pages()]
    seen = set(todo)
    while todo:
        page = todo.pop()
        text = (ROOT / page).read_text(encoding="utf-8")
        for path in links_in(text, posixpath.dirname(page)):
            uri = place_on_site(path)
            if path in seen or not uri.startswith("project/") or files.get_file_from_path(uri):
                continue
            seen.add(path)
            if (ROOT / path).is_dir() and uri.endswith("/index.md"):
                files.append(File.generated(config, uri, content=_listing(path), inclusion=InclusionLevel.NOT_IN_NAV))
                continue
            path = posixpath.join(path, "README.md") if (ROOT / path).is_dir() else path
            files.append(
                File.generated(config, uri, abs_src_path=str(ROOT / path), inclusion=InclusionLevel.NOT_IN_NAV)
            )
            if path.endswith(".md"):
                todo.append(path)
    return files


def _listing(path: str) -> str:
    """Return a page that names the files of a folder; they are not on the site, unless another page links to them."""
    names = sorted(p.name for p in (ROOT / path).iterdir() if p.is_file())
    return f"# {path}\n\nFiles of this folder in the repository:\n\n" + "".join(f"- `{name}`\n" for name in names)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Return the page with links that lead to the site's copies, and with lists as Python-Markdown reads them."""
    uri = page.file.src_uri
    source = uri.removeprefix("project/") if uri.startswith("project/") else f"docs/{uri}"

    def moved(match: re.Match[str]) -> str:
        start, target, anchor, end = match.groups()
        if SCHEME.match(target):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path.startswith("..") or not (ROOT / path).exists():
            return match[0]  # reported as a broken link
        found = posixpath.relpath(place_on_site(path), posixpath.dirname(uri) or ".")
        return f"{start}{found}{anchor or ''}{end}"

    return LINK.sub(moved, lists_apart("\n".join(indented(markdown.splitlines()))))


def lists_apart(markdown: str) -> str:
    """Return the text with an empty line before each list that follows a paragraph."""
    out: list[str] = []
    fenced = False
    for line in markdown.splitlines():
        before = out[-1] if out else ""
        item = re.match(r"(\s*)([-*]|\d+\.) ", line)
        if item and not fenced and before.strip() and not _in_list(out):
            out.append("")
        fenced ^= line.lstrip().startswith("```")
        out.append(line)
    return "\n".join(out) + "\n"


def _in_list(lines: list[str]) -> bool:
    """Return True if the paragraph that the lines end with is an item of a list."""
    for line in reversed(lines):
        if not line.strip() or line.startswith("#"):
            return False
        if re.match(r"\s*([-*]|\d+\.) ", line):
            return True
    return False


def indented(lines: list[str]) -> list[str]:
    """Return the lines with twice the indentation inside lists, which GitHub nests by two spaces, not by four."""
    out, inside, fence = [], False, None
    for line in lines:
        spaces = len(line) - len(line.lstrip(" "))
        if fence is None and re.match(r"([-*]|\d+\.) ", line):
            inside = True
        elif fence is None and line.strip() and not spaces:
            inside = False
        added = (spaces if fence is None else fence) if inside and line.strip() else 0  # code keeps its own shape
        if line.lstrip().startswith("```"):
            fence = added if fence is None else None
        out.append(" " * added + line)
    return out
