"""Check what a run has read and made so far, as its manifest notes it, before more is built on it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from posttrain.config import Recipe
from posttrain.core import distributed
from posttrain.core.errors import CheckpointError
from posttrain.core.files import file_hash
from posttrain.runs.checksums import changed_files, check_result, checksums
from posttrain.runs.inputs import changed_inputs, find_inputs, note_inputs
from posttrain.runs.run_folder import Manifest, has_results
from posttrain.trainer.loop import now


class Results:
    """Note and check the inputs, the stages and the evaluations of a run; rank 0 does both.

    Attributes:
        warn: Called with a line on a file that was changed and is not used.
    """

    def __init__(self, folder: Path, manifest: Manifest, warn: Callable[[str], None]) -> None:
        self.folder, self.manifest, self.warn = folder, manifest, warn

    def check_inputs(self, recipe: Recipe, functions: Mapping[str, Callable[..., Any]], accept: bool) -> dict[str, Any]:
        """Return the manifest's histories of the inputs, with those of now.

        A run without any result takes changed inputs as they are; what it has measured on earlier ones is removed.

        Args:
            recipe: The recipe.
            functions: Rewards and environments given from Python, by name.
            accept: Go on with changed inputs.

        Raises:
            CheckpointError: An input, or the run's recipe.yaml, has changed since the run began.
        """
        noted = self.manifest.values
        histories = noted.get("inputs", {})
        if not distributed.is_main():
            return histories  # type: ignore[no-any-return]
        begun = has_results(self.folder)
        stored = self.folder / "recipe.yaml"
        if begun and noted.get("recipe_sha256", file_hash(stored)) != file_hash(stored):
            raise CheckpointError(
                f"{stored} was changed since the run began, and the run has results of the recipe as it was. Put it "
                "back from a copy; a changed recipe is another run: posttrain run FILE name=NEW_NAME"
            )
        found = find_inputs(recipe, functions)
        changed = changed_inputs(histories, found)
        if changed and begun and not accept:
            lines = "".join(f"\n  {name}: {difference}" for name, difference in changed.items())
            raise CheckpointError(
                f"{self.folder} can't be resumed: these have changed since it began, and its results are of what they "
                f"were:{lines}\nPut them back; or resume with what they are now, which the manifest and the report "
                "tell: --accept-changed-data; or start over with --fresh"
            )
        if changed:
            measured = find_inputs(recipe.model_copy(update={"stages": []}), functions)
            if set(changed) & set(measured):
                shutil.rmtree(self.folder / "evaluations", ignore_errors=True)  # they are of other items
                self.manifest.update(evaluations={})
        return note_inputs(histories, found, now(), accepted=begun)

    def changed_since(self, recipe: Recipe, functions: Mapping[str, Callable[..., Any]]) -> dict[str, str]:
        """Return the inputs of a finished run that have changed, without versions of packages: name -> difference."""
        if not distributed.is_main():
            return {}
        changed = changed_inputs(self.manifest.values.get("inputs", {}), find_inputs(recipe, functions))
        return {name: difference for name, difference in changed.items() if not name.startswith("package ")}

    def note_stage(self, number: int, name: str) -> None:
        """Note the checksums of a finished stage, unless they are noted already."""
        records = list(self.manifest.values.get("stages", []))
        if not distributed.is_main() or number >= len(records) or "files" in records[number]:
            return
        records[number] = {**records[number], "status": "done", "files": checksums(self.folder / "stages" / name)}
        self.manifest.update(stages=records)

    def check_used(self, names: Iterable[str], made: Mapping[str, Path], model: str) -> None:
        """Check the stages whose results are used next.

        Args:
            names: Names of the stages that settings refer to.
            made: Folder that the newest stage of each name left.
            model: Source of the model that is used; it may be a stage's.

        Raises:
            CheckpointError: A file of theirs is not what was written.
        """
        if not distributed.is_main():
            return
        results = [made[name] for name in names] + [path for path in made.values() if str(path) == model]
        for result in dict.fromkeys(results):
            stage = result.parent
            number = int(stage.name.partition("-")[0])
            records = self.manifest.values.get("stages", [])
            noted = records[number].get("files") if number < len(records) else None
            if noted is not None:
                for name in check_result(stage, noted, (result.name, "adapter", "rollouts", "chains")):
                    self.warn(f"! {stage / name} is not what the stage wrote; nothing that follows reads it")

    def note_evaluation(self, name: str) -> None:
        """Note the checksums of evaluations/`name`."""
        sums = {**self.manifest.values.get("evaluations", {}), name: checksums(self.folder / "evaluations" / name)}
        self.manifest.update(evaluations=sums)

    def check_evaluation(self, name: str) -> None:
        """Raise CheckpointError if a file of evaluations/`name` is not what was written."""
        folder = self.folder / "evaluations" / name
        noted = self.manifest.values.get("evaluations", {}).get(name, {})
        changed = changed_files(folder, noted) if folder.is_dir() else []
        if changed:
            raise CheckpointError(
                f"{folder / changed[0]} is not what was written (its checksum differs, or it is missing). Put it back "
                f"from a copy, or remove {folder}: it is then measured again"
            )
