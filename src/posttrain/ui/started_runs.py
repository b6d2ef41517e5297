"""Runs that the page starts: `posttrain run` as a process in a folder of its own, with what it prints in a file."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from posttrain.core.errors import CheckpointError, RecipeError
from posttrain.core.visible_text import visible
from posttrain.recipe.machine_checks import check_machine
from posttrain.recipe.parsing import load_recipe
from posttrain.runs.run_folder import is_worked_on
from posttrain.ui.run_index import RUN_LOG

INSPECT_SECONDS = 300.0


class StartedRuns:
    """The processes that were started here. They run on when the page's server ends."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._processes: dict[Path, subprocess.Popen[bytes]] = {}

    def start(self, recipe: str, overrides: Sequence[str], root: Path) -> Path:
        """Check a recipe, and start it in a new folder with its name below `root`; return the folder.

        Args:
            recipe: Name of a recipe of posttrain, or path of a file.
            overrides: Settings as key=value.
            root: Folder of the runs.

        Raises:
            RecipeError: The recipe is wrong, or the folder is there already.
        """
        checked = load_recipe(recipe, overrides)
        check_machine(checked)
        if not re.fullmatch(r"[\w][\w.+-]*", checked.name):
            raise RecipeError(f"name: {checked.name!r} can't be a folder: use letters, digits, and - _ . +")
        folder = root / checked.name
        if folder.exists():
            raise RecipeError(f"{folder} is there already: give the run another name")
        folder.mkdir(parents=True)
        self._spawn(folder, [recipe, *overrides, "--folder", str(folder)])
        return folder

    def resume(self, folder: Path) -> None:
        """Resume an interrupted run. Raises CheckpointError if it runs, or never began."""
        if self.is_alive(folder) or is_worked_on(folder):
            raise CheckpointError(f"{folder} is running already")
        if not (folder / "recipe.yaml").is_file():
            raise CheckpointError(f"{folder} never began (its log says why): start its recipe again under another name")
        self._spawn(folder, [str(folder)])

    def stop(self, folder: Path) -> None:
        """Ask a run to stop, as Ctrl-C does. Raises CheckpointError if it was not started here."""
        with self._lock:
            process = self._processes.get(folder)
        if process is None or process.poll() is not None:
            raise CheckpointError(f"{folder} was not started here, or has ended: stop it where it was started")
        process.send_signal(signal.SIGINT)

    def is_alive(self, folder: Path) -> bool:
        """Return True if the process of a run that was started here is there."""
        with self._lock:
            process = self._processes.get(folder)
            return process is not None and process.poll() is None

    def _spawn(self, folder: Path, arguments: Sequence[str]) -> None:
        with (folder / RUN_LOG).open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "posttrain", "run", *arguments],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, "COLUMNS": "120", "PYTHONUNBUFFERED": "1"},
            )  # fmt: skip
        with self._lock:
            self._processes[folder] = process


def inspect_rows(recipe: Path, stage: str, rows: int) -> str:
    """Return what `posttrain inspect` prints of a recipe: the data as the model sees it.

    Args:
        recipe: File of the recipe.
        stage: Name of a stage or an evaluation; empty: all.
        rows: Samples of each.

    Raises:
        RecipeError: It says what is wrong.
    """
    command = [sys.executable, "-m", "posttrain", "inspect", str(recipe), "--rows", str(rows)]
    command += ["--stage", stage] if stage else []
    environment = {**os.environ, "COLUMNS": "110", "NO_COLOR": "1"}
    try:
        done = subprocess.run(command, capture_output=True, timeout=INSPECT_SECONDS, env=environment, check=False)
    except subprocess.TimeoutExpired as error:
        raise RecipeError(f"reading the data took more than {INSPECT_SECONDS:g} s; use posttrain inspect") from error
    if done.returncode:
        raise RecipeError(done.stderr.decode("utf-8", "replace")[-3000:].removeprefix("error: ").strip())
    return visible(done.stdout.decode("utf-8", "replace"))
