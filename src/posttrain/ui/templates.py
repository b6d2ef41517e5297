"""Fill the templates of the pages, which share style, charts and filters with the reports."""

from __future__ import annotations

import functools
from importlib import resources
from typing import Any

import jinja2

from posttrain.core.secrets import hide_values
from posttrain.report.build import chart_files, page_files

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
"""Content security policy of the pages: nothing comes from, or goes to, another place than this server."""
SCRIPTS = ("actions.js", "chat.js", "live.js")


@functools.cache
def _templates() -> jinja2.Environment:
    reports = page_files()[1]
    own = {name: text for name, text in _files().items() if name.endswith(".j2")}
    assert reports.loader is not None
    return reports.overlay(loader=jinja2.ChoiceLoader([jinja2.DictLoader(own), reports.loader]))


@functools.cache
def _files() -> dict[str, str]:
    folder = resources.files("posttrain.ui").joinpath("page")
    return {f.name: f.read_text(encoding="utf-8") for f in folder.iterdir() if f.is_file()}


def render_ui(name: str, /, **values: Any) -> str:
    """Return a page as text, without keys that are known.

    Args:
        name: File of the template, which escapes every text among the values.
        values: What it shows.
    """
    return hide_values(_templates().get_template(name).render(**values))


def static_file(name: str) -> tuple[str, str] | None:
    """Return the text of a file that the pages load, and its type; None if there is no such file."""
    style, charts = chart_files()
    if name == "style.css":
        return f"{style}\n{_files()['ui.css']}", "text/css; charset=utf-8"
    if name == "charts.js":
        return charts, "text/javascript; charset=utf-8"
    if name in SCRIPTS:
        return _files()[name], "text/javascript; charset=utf-8"
    return None
