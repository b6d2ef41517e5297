"""Carry out what the pages' buttons ask for: each a function of what is served and the body of the request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from posttrain.core.errors import DataError, RecipeError
from posttrain.report.load import JsonDict
from posttrain.ui.chat_models import VoteRequest, append_vote, read_request
from posttrain.ui.pages import UiState
from posttrain.ui.recipe_form import override
from posttrain.ui.started_runs import inspect_rows

MOST_ROWS = 200


def start_run(state: UiState, body: JsonDict) -> JsonDict:
    """Start a recipe with the settings that were changed; return the key of its run."""
    changed = body.get("settings", {})
    if not isinstance(body.get("recipe"), str) or not isinstance(changed, dict):
        raise RecipeError("expected the name of a recipe, and settings by name")
    overrides = [override(str(key), str(text)) for key, text in changed.items()]
    return {"run": str(state.started.start(body["recipe"], overrides, state.index.roots[0]))}


def stop_run(state: UiState, body: JsonDict) -> JsonDict:
    """Ask a run that was started here to stop."""
    state.started.stop(state.index.entry(str(body.get("run", ""))).folder)
    return {}


def resume_run(state: UiState, body: JsonDict) -> JsonDict:
    """Resume an interrupted run."""
    state.started.resume(state.index.entry(str(body.get("run", ""))).folder)
    return {}


def inspect_data(state: UiState, body: JsonDict) -> JsonDict:
    """Return what `posttrain inspect` prints of a run's recipe."""
    folder, rows = state.index.entry(str(body.get("run", ""))).folder, body.get("rows", 3)
    if not isinstance(rows, int) or not 0 < rows <= MOST_ROWS:
        raise DataError(f"rows: expected 1 to {MOST_ROWS}, got {rows!r:.40}")
    return {"text": inspect_rows(folder / "recipe.yaml", str(body.get("stage", "")), rows)}


def vote(state: UiState, body: JsonDict) -> JsonDict:
    """Append a vote to the file of votes; return how many it has."""
    return {"votes": append_vote(state.votes, read_request(VoteRequest, body))}


ACTIONS: dict[str, Callable[[UiState, Any], JsonDict]] = {
    "/start": start_run,
    "/stop": stop_run,
    "/resume": resume_run,
    "/inspect": inspect_data,
    "/vote": vote,
}
"""Actions by their path."""
