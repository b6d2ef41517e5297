"""Searches over the numbers of a merge."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from posttrain.config import ModelConfig, Recipe
from posttrain.config.evaluation import EvaluationBase
from posttrain.core.errors import DataError, ModelError, RecipeError
from posttrain.core.files import read_lines, write_lines
from posttrain.eval.item_parts import is_validation, item_part
from posttrain.eval.tasks import task_data
from posttrain.methods.merge import search as search_module
from posttrain.methods.merge.merge import Merge
from posttrain.methods.merge.merge_settings import MergeConfig
from posttrain.methods.merge.search_methods import Point, cma_search, coordinate_search, grid_search
from posttrain.methods.merge.search_settings import number_place
from posttrain.models.tiny_model import tiny_model, tiny_tokenizer
from posttrain.report import build_report
from posttrain.trainer.stage import StageContext


class Scores:
    """Count the points that are scored: the sum of -(x - wanted)^2, and a bonus at one point."""

    def __init__(self, wanted: Point) -> None:
        self.wanted, self.asked = wanted, list[Point]()

    def __call__(self, point: Point) -> float:
        self.asked += [] if point in self.asked else [point]
        return -sum((x - w) ** 2 for x, w in zip(point, self.wanted, strict=True))


def test_a_grid_and_coordinates() -> None:
    score = Scores((1, 2))
    grid_search([[0, 1], [2, 3]], score)
    assert score.asked == [(0, 2), (0, 3), (1, 2), (1, 3)]
    # From (0, 0): the first coordinate goes to 1, the second to 2; another round moves neither.
    score = Scores((1, 2))
    assert coordinate_search((0, 0), [[0, 1, 3], [0, 2]], score, None) == (1, 2)
    assert score.asked == [(0, 0), (1, 0), (3, 0), (1, 2), (0, 2), (3, 2)]
    score = Scores((1, 2))
    assert coordinate_search((0, 0), [[0, 1, 3], [0, 2]], score, 3) == (1, 0) and len(score.asked) == 3
    # A point that scores the same is no step: it would never end.
    assert coordinate_search((0, 0), [[0, 1]], lambda point: 1.0, None) == (0, 0)


def test_cma_finds_a_maximum() -> None:
    pytest.importorskip("cma")
    score = Scores((0.3, 8.0))
    cma_search((0.9, 5.0), [(0, 1), (0, 10)], score, 120, 0)
    best = max(score.asked, key=score)
    assert best == pytest.approx((0.3, 8.0), abs=0.2) and len(score.asked) <= 120
    again = Scores((0.3, 8.0))
    cma_search((0.9, 5.0), [(0, 1), (0, 10)], again, 120, 0)
    assert again.asked == score.asked


def test_names_of_numbers() -> None:
    plain = {"algorithm": {"t": {"*.mlp.*": [0.5, 1], "*": 0}, "name": "slerp"}, "models": [{"weight": 1.0}]}
    assert number_place(plain, "algorithm.t.*.mlp.*.1") == ("algorithm", "t", "*.mlp.*", 1)
    assert number_place(plain, "algorithm.t.*") == ("algorithm", "t", "*")
    with pytest.raises(ValueError, match=r"no number that can be searched; there are algorithm\.t\.\*\.mlp\.\*\.0"):
        number_place(plain, "algorithm.name")


MERGE: dict[str, Any] = {"algorithm": {"name": "ties", "density": 0.5}, "models": ["a", "b"]}


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"coefficients": {"algorithm.densty": [1]}}, "'algorithm.densty' is no number that can be searched"),
        ({"coefficients": {"algorithm.density": [0.5, 2]}}, "density: 2 can't be set: expected numbers at .* most 1"),
        ({"coefficients": {"algorithm.density": {"low": 0, "high": 1}}}, "coordinate takes a list of values"),
        ({"coefficients": {"algorithm.density": [1, 1]}}, "expected different values"),
        ({"method": "cma", "coefficients": {"algorithm.density": {"low": 0, "high": 1}}}, "two numbers or more"),
        ({"method": "grid", "coefficients": {"algorithm.density": [0, 1]}, "max_trials": 2}, "up to 3 merges"),
        ({"coefficients": {"algorithm.density": [0, 1]}, "evaluations": {"x": 0}}, "weights must be positive"),
    ],
)
def test_searches_that_make_no_sense(search: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MergeConfig.model_validate({**MERGE, "search": search})


def recipe(folder: Path, task: dict[str, Any], search: dict[str, Any]) -> Recipe:
    merge = {"method": "merge", "algorithm": {"name": "task_arithmetic", "scale": 0.5}, "models": [str(folder / "b")]}
    plain = {
        "name": "searched",
        "model": {"source": str(folder / "a"), "device": "cpu"},
        "stages": [merge | {"search": {"coefficients": {"algorithm.scale": [0, 0.5]}, **search}}],
        "evaluate": [
            task | {"kind": "choice", "choices": ["yes", "no"], "data": {"source": str(folder / "rows.jsonl")}}
        ],
    }
    return Recipe.model_validate(plain)


def test_what_a_search_needs_of_the_evaluations(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="set validation of an evaluation to a share"):
        recipe(tmp_path, {"name": "odd"}, {})
    with pytest.raises(ValueError, match="set validation of evaluation 'odd'"):
        recipe(tmp_path, {"name": "odd"}, {"evaluations": {"odd": 1}})
    with pytest.raises(ValueError, match="names 'even', which is no evaluation"):
        recipe(tmp_path, {"name": "odd", "validation": 0.5}, {"evaluations": {"even": 1}})
    task = EvaluationBase(kind="own", name="odd", validation=0.5)
    with pytest.raises(RecipeError, match="reads something else"):
        item_part([], task, "report")
    with pytest.raises(DataError, match="has no items for validation"):
        item_part([], task.model_copy(update={"validation": 0.0}), "validation")


def test_parts_are_decided_by_prompts() -> None:
    rows = [{"messages": [{"role": "user", "content": f"{i // 2}"}], "completion": f"{i}"} for i in range(400)]
    chosen = [is_validation(row, 0.3) for row in rows]
    assert chosen[::2] == chosen[1::2] and 90 < sum(chosen) < 150
    assert all(is_validation(row, 0.6) for row, first in zip(rows, chosen, strict=True) if first)
    texts = [is_validation({"completion": str(i)}, 0.5) for i in range(8)]
    assert any(texts) and not all(texts)


def test_a_search_that_is_killed_and_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, name in enumerate("ab"):
        tiny_model("llama", seed=seed).save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    rows = [{"prompt": f"Is {i} odd?", "completion": ["no", "yes"][i % 2]} for i in range(24)]
    write_lines(tmp_path / "rows.jsonl", rows)
    config = recipe(tmp_path, {"name": "odd", "validation": 0.5}, {})
    stage = Merge(config.stages[0], StageContext(None, None, {}, config.evaluate))
    measured: list[str] = []

    def evaluate(*arguments: Any, part: str = "report", **options: Any) -> Any:
        measured.append(f"{part} {arguments[2].name}")
        if len(measured) == 2:
            raise KeyboardInterrupt
        return real(*arguments, part=part, **options)

    real = search_module.evaluate_model
    monkeypatch.setattr(search_module, "evaluate_model", evaluate)
    place = tmp_path / "run/stages/0-merge"
    place.mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt):
        stage.run(config.model, place, 0)
    folder = place / "search"
    assert len(list(folder.glob("*/model"))) == 1
    entry = stage.run(config.model, place, 0)
    found = json.loads((folder / "search.json").read_text())
    reported = [f"report {name}" for name in ("chosen", "default", "base", "source-0") if (folder / name).is_dir()]
    assert measured == [f"validation trial-000{i}" for i in (0, 1, 1)] + reported
    lines = read_lines(folder / "trials.jsonl")
    assert [t["coefficients"]["algorithm.scale"] for t in lines] == [0.5, 0.0]
    assert found["score"] == max(t["score"] for t in lines) and found["default_score"] == lines[0]["score"]
    assert entry["search"]["chosen"] == found["chosen"] and not list(folder.glob("*/model"))
    # What a merge was chosen by is reported nowhere, and the two parts are all items.
    sides = [{i["prompt"] for i in read_lines(folder / name / "odd.jsonl")} for name in ("trial-0001", "chosen")]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 24
    measured_by_runs = task_data(config.evaluate[0], tiny_tokenizer(), None)
    assert {row["prompt_text"] for row in measured_by_runs.rows} == sides[1]
    assert (place / "model/config.json").is_file()
    (tmp_path / "run/recipe.yaml").write_text("name: searched")
    (tmp_path / "run/manifest.json").write_text(json.dumps({"stages": [{"name": "merge", **entry}]}))
    page = build_report(tmp_path / "run").read_text()
    assert 'id="search"' in page and "the chosen merge" in page


def test_merges_that_can_not_be_made_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = {"coefficients": {"models.0.weight": [1, 2, 3, 4]}}
    models = [{"source": "a", "weight": -1}, "base"]
    config = MergeConfig.model_validate({"algorithm": "linear", "models": models, "search": search})

    def write(settings: MergeConfig, folder: Path) -> dict[str, Any]:
        if settings.models[0].weight == -1:
            raise ModelError("weights sum to zero")
        folder.mkdir(parents=True)
        return {"weight": settings.models[0].weight}

    def evaluate(model: Any, tasks: Any, folder: Path, *_: Any, part: str = "report") -> list[dict[str, Any]]:
        folder.mkdir(exist_ok=True)
        write_lines(folder / "ppl.jsonl", [{"id": i, "nll": 1.0, "tokens": 2} for i in range(2)])
        value = {"trial-0001": 4.0, "trial-0004": math.nan}.get(folder.name, 2.0)
        if folder.name == "trial-0003":
            raise ModelError("its logits are no numbers")
        figures = {"value": value, "low": 1, "high": 9, "n": 2}
        return [{"task": "ppl", "kind": "perplexity", "metric": "perplexity", **figures}]

    monkeypatch.setattr(search_module, "evaluate_model", evaluate)
    task = {"kind": "perplexity", "name": "ppl", "validation": 0.5, "data": {"source": "rows.jsonl"}}
    tasks = Recipe.model_validate({"name": "x", "model": {"source": "a"}, "evaluate": [task]}).evaluate
    found = search_module.MergeSearch(config, ModelConfig(source="a"), tasks, {}, tmp_path, 0, write).run()
    assert found.entry["weight"] == 2 and found.entry["search"]["score"] == 0.5
    assert [(t["score"], t.get("error")) for t in read_lines(tmp_path / "search/trials.jsonl")] == [
        (None, "weights sum to zero"), (0.25, None), (0.5, None), (None, "its logits are no numbers"),
        (None, "evaluation ppl has no figure that is a number"),
    ]  # fmt: skip
    assert list(json.loads((tmp_path / "search/search.json").read_text())["reported"]) == ["chosen", "base", "source-0"]
