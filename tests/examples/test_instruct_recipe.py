"""The recipe `instruct` and the data it names: each of its task files is one that examples/data/fetch.py writes."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from posttrain.methods.data.instruction_files import read_task_file
from posttrain.recipe.parsing import load_recipe

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "data"
sys.path.insert(0, str(EXAMPLES))

import place_names  # noqa: E402
import translated_messages  # noqa: E402


def write_task_files(folder: Path) -> None:
    """Write the task files that fetch.py writes: those in tasks/, and one for each language."""
    for path in (EXAMPLES / "tasks").glob("*.yaml"):
        (folder / path.name).write_text(path.read_text())
    made = [translated_messages.message_task(code) for code in translated_messages.LANGUAGE_NAMES if code != "en"]
    made += [place_names.name_task(code) for code in place_names.LANGUAGES]
    made += [place_names.currency_task(code) for code in place_names.QUESTIONS]
    for task in made:
        (folder / f"{task['name']}.yaml").write_text(yaml.safe_dump([task]))


def test_all_task_files_are_valid_and_the_recipe_names_some_of_them(tmp_path: Path) -> None:
    write_task_files(tmp_path)
    tasks = {path.name: read_task_file(path) for path in sorted(tmp_path.glob("*.yaml"))}
    found = [task for file in tasks.values() for task in file]
    assert len(found) >= 150 and len({task.name for task in found}) == len(found)
    assert len({task.type for task in found}) == 7 and len({task.cluster_name for task in found}) >= 12
    stage = load_recipe("instruct").stages[0]
    named = [Path(entry).name for entry in stage.tasks]
    assert set(named) <= tasks.keys()
    chosen = [task for name in named for task in tasks[name]]
    clusters = {task.cluster_name for task in chosen}
    assert len(chosen) == 28 and len(clusters) == 11 and set(stage.held_out_clusters) == {"inference"} < clusters
    assert {task.type for task in chosen if task.cluster_name != "inference"}.isdisjoint({"inference"})
    assert len({task.type for task in chosen}) == 7 and sum(task.rationale is not None for task in chosen) == 3
