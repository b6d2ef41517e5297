"""The folder of a run: opened by one process at a time, for one recipe.

recipe.yaml    the resolved recipe           stages/<i>-<name>/   method, metrics, timings, checkpoints, model
manifest.json  versions, data, lineage       evaluations/         before, after, comparison.json
report.html    the page of the run           model/               the final model
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from posttrain.config import Recipe
from posttrain.core import distributed
from posttrain.core.errors import CheckpointError, RecipeError
from posttrain.core.files import as_json, read_lines, read_object, write_text
from posttrain.core.secrets import hide_values
from posttrain.recipe.machine_checks import check_machine
from posttrain.recipe.parsing import differences, dump_recipe, load_recipe
from posttrain.runs.inputs import find_inputs

ANOTHER_FOLDER = "Put runs into a folder that can be written: output=FOLDER, or --folder FOLDER"
CHECK_FIELD = "sha256_of_the_rest"
OF_A_RUN = ("stages", "evaluations", "bad_rows", "tensorboard", "manifest.json", "report.html")


class Manifest:
    """manifest.json, rewritten as a whole at every change; only rank 0 writes.

    Its last field is the hash of the others: what it says of inputs and results is what the run wrote.
    """

    def __init__(self, folder: Path) -> None:
        """Read the file.

        Raises:
            CheckpointError: It is damaged, or was changed.
        """
        self.path = folder / "manifest.json"
        self.values: dict[str, Any] = {}
        if self.path.exists():
            remedy = "or set this run aside and start over with --fresh"
            try:
                self.values = read_object(self.path)
            except CheckpointError as error:
                raise CheckpointError(f"{error}, {remedy}") from error
            noted = self.values.pop(CHECK_FIELD, None)
            if noted not in (None, _digest(self.values)):
                raise CheckpointError(
                    f"{self.path} is damaged or was changed: it is not what the run wrote (its checksum differs). Put "
                    f"it back from a copy, {remedy}"
                )

    def update(self, **values: Any) -> None:
        """Set values and write the file, without keys that are known."""
        self.values.update(values)
        if distributed.is_main():
            shown = json.loads(hide_values(json.dumps(self.values)))
            write_text(self.path, as_json({**shown, CHECK_FIELD: _digest(shown)}))


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


@contextmanager
def open_run(path: Path, recipe: Recipe, fresh: bool) -> Iterator[Manifest]:
    """Make or open the folder of a run, and keep other processes out of it; use with `with`.

    A folder in which no step was made and nothing was written by a stage is taken over by another recipe: its first
    command was wrong, and this one is the correction.

    Args:
        path: The folder.
        recipe: The recipe, which is written into a new folder.
        fresh: Rename an earlier run in the folder and start over.

    Raises:
        CheckpointError: The folder holds a run of another recipe, or another process works on it.
    """
    with ExitStack() as stack:
        if distributed.is_main():
            if fresh and path.exists():
                set_aside(path)
            path.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_locked(path))
            _claim(path, recipe)
        distributed.barrier()
        yield Manifest(path)


def run_path(folder: Path) -> Path:
    """Return the path of a run's folder with a name at its end, so that it can be renamed: not `.` or `..`."""
    return folder if folder.name not in ("", "..") else folder.resolve()


def set_aside(path: Path) -> None:
    """Rename the folder of a run that no process works on to NAME.1, NAME.2 and so on.

    Raises:
        CheckpointError: It is no run's, or a process works on it.
    """
    is_run = (path / "recipe.yaml").is_file() or all((path / name).is_file() for name in ("manifest.json", ".lock"))
    if not is_run and not (path.is_dir() and not any(path.iterdir())):
        raise CheckpointError(f"{path} holds no run (no recipe.yaml), and --fresh renames nothing else")
    with _locked(path):
        number = next(n for n in range(1, 10_000) if not os.path.lexists(path.with_name(f"{path.name}.{n}")))
        path.rename(path.with_name(f"{path.name}.{number}"))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a run's folder; the system releases it when the process ends, however it ends."""
    file = path / ".lock"
    another = CheckpointError(f"another process is working on {path}; wait for it, or stop it first")
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise CheckpointError(f"{path} can't be written: {error.strerror}. {ANOTHER_FOLDER}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise another from error
        except OSError as error:
            raise CheckpointError(f"{path} can't be locked: {error.strerror}. {ANOTHER_FOLDER}") from error
        # Another process may have renamed the folder between the opening and the lock: then this is another run's.
        if not file.exists() or not os.path.samestat(os.fstat(descriptor), file.stat()):
            raise another
        yield
    finally:
        os.close(descriptor)


def is_worked_on(path: Path) -> bool:
    """Return True if a process holds the lock of a run's folder; a run that says `running` without it was killed."""
    try:
        descriptor = os.open(path / ".lock", os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks: nobody can tell
        return False
    finally:
        os.close(descriptor)
    return False


def describe_folder(path: Path, recipe: Recipe, fresh: bool) -> str:
    """Return what a run in a folder starts from, without changing anything.

    Args:
        path: The folder.
        recipe: The run's recipe.
        fresh: An earlier run in the folder is set aside.

    Raises:
        CheckpointError: The folder holds a run of another recipe, or files of something else.
    """
    if fresh and path.exists():
        return "the run in it is set aside, and another one begins"
    if not path.exists():
        return "new"
    _, different = _stored_recipe(path, recipe)
    if different is None:
        return "new"
    if different:
        return "a run of another recipe, which has made nothing yet, is replaced"
    noted = Manifest(path).values
    if noted.get("status") == "done":
        return "finished already: nothing is done (--fresh starts over)"
    made = [entry["name"] for entry in noted.get("stages", []) if entry.get("status") == "done"]
    return f"resumes; finished stages: {', '.join(made) or 'none'}"


def _stored_recipe(path: Path, recipe: Recipe) -> tuple[Recipe | None, list[str] | None]:
    """Return the recipe in a folder (None: none that is valid), and how it differs (None: the folder has none).

    Raises:
        CheckpointError: The folder can't be taken over.
    """
    stored = path / "recipe.yaml"
    foreign = [] if stored.exists() else [name for name in (*OF_A_RUN, "model") if os.path.lexists(path / name)]
    if foreign:
        raise CheckpointError(
            f"{path} holds {foreign[0]} and no recipe.yaml, so it is no run, and a run would mix its files with these. "
            "Give the run another name (name=...) or folder (--folder)"
        )
    if not stored.exists():
        return None, None
    earlier: Recipe | None = None
    try:
        earlier = load_recipe(str(stored))
        different = differences(earlier, recipe)
    except RecipeError as error:
        different = [str(error)]
    begun = any(os.path.lexists(path / name) for name in (*OF_A_RUN, "model"))
    if different and begun and (not (path / "manifest.json").is_file() or has_results(path)):
        check_machine(recipe)  # a wrong path in this recipe is the more likely mistake
        raise CheckpointError(
            f"{path} holds a run of another recipe ({'; '.join(different[:5])}). Resume that one with "
            f"`posttrain run {path}`, give this one another name (name=...), or set the old one aside with --fresh"
        )
    return earlier, different


def _claim(path: Path, recipe: Recipe) -> None:
    """Write the recipe into a new folder, or make sure that the folder's run is of this recipe."""
    earlier, different = _stored_recipe(path, recipe)
    if different is not None:
        if not different:
            return
        evaluated = ("model", "evaluate", "seed")
        same = earlier is not None and all(getattr(earlier, name) == getattr(recipe, name) for name in evaluated)
        kept = _of_evaluations(path, earlier) if same and earlier is not None else {}
        for name in OF_A_RUN:
            if name == "evaluations" and same:
                continue
            shutil.rmtree(path / name) if (path / name).is_dir() else (path / name).unlink(missing_ok=True)
        if any(kept.values()):
            Manifest(path).update(**kept)
    write_text(path / "recipe.yaml", dump_recipe(recipe))


def _of_evaluations(path: Path, recipe: Recipe) -> dict[str, Any]:
    """Return what the manifest notes of evaluations that stay: their checksums, and the inputs that they are of."""
    try:
        noted = Manifest(path).values
    except CheckpointError:
        return {}
    read = find_inputs(recipe.model_copy(update={"stages": []}), {})
    inputs = {name: history for name, history in noted.get("inputs", {}).items() if name in read}
    return {"inputs": inputs, "evaluations": noted.get("evaluations", {})}


def has_results(path: Path) -> bool:
    """Return True if a stage of the run at `path` has made a step, a completion to train on, a checkpoint or a label.

    Measurements before the first step are no results: a recipe that was corrected makes them again.
    """
    for file in (path / "stages").rglob("*"):
        if file.name in ("method.json", "step-000000.parquet") or not file.is_file() or not file.stat().st_size:
            continue
        if file.name not in ("metrics.jsonl", "timings.jsonl") or any(r.get("step") != 0 for r in read_lines(file)):
            return True
    return False
