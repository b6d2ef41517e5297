"""The four examples of docs/add-a-method.md, as they stand there: checked, trained, killed, resumed, titled."""

from __future__ import annotations

import json
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from posttrain.core import imports
from posttrain.core.errors import RecipeError
from posttrain.recipe.parsing import load_recipe
from tests import warm
from tests.invariants.test_killed import outcome, records

PAGE = (Path(__file__).parents[2] / "docs" / "add-a-method.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^```(?:python|yaml)\n# (\S+)\n(.*?)^```", PAGE, re.M | re.S))
EXAMPLES = [  # recipe, module, most lines, misspelt setting, metric that must have a title, title
    ("squared_hinge.yaml", "my_losses.py", 20, ("margin: 4.0", "margim: 4.0"), "accuracy", "DPO"),
    ("hard_prompts.yaml", "my_advantages.py", 25, ("power: 0.5", "power: -1"), "reward", "GRPO"),
    ("focal.yaml", "my_stages.py", 120, ("focus: 1.5", "focuss: 1.5"), "unlikely", "Focal fine-tuning"),
    ("brevity.yaml", "my_rewards.py", 10, ("limit: 8", "limit: eight"), "reward/brevity", "GRPO"),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(imports, "_FOLDERS", [])
    monkeypatch.setattr(sys, "path", [*sys.path])
    modules = [name.removesuffix(".py") for name in FILES]
    for name in modules:  # other tests have modules of these names too
        sys.modules.pop(name, None)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    sums = [{"prompt": f"{i} + {i} =", "completion": f" {2 * i}", "answer": str(2 * i)} for i in range(24)]
    pairs = [{"prompt": f"Say {i}", "chosen": f"{i} it is", "rejected": f"no {i}"} for i in range(24)]
    for name, rows in (("rows", sums), ("pairs", pairs), ("problems", sums)):
        kept = [{k: v for k, v in r.items() if k != ("completion" if name == "problems" else "answer")} for r in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept))
    yield tmp_path
    for name in modules:
        sys.modules.pop(name, None)


@pytest.mark.parametrize(("recipe", "module", "most"), [e[:3] for e in EXAMPLES])
def test_an_example_is_one_short_file(recipe: str, module: str, most: int) -> None:
    assert recipe in FILES and 0 < len(FILES[module].splitlines()) <= most


@pytest.mark.parametrize(("recipe", "module", "most", "change", "metric", "title"), EXAMPLES)
def test_a_wrong_setting_is_refused_by_name(
    folder: Path, recipe: str, module: str, most: int, change: tuple[str, str], metric: str, title: str
) -> None:
    good, bad = change
    (folder / "bad.yaml").write_text((folder / recipe).read_text().replace(good, bad))
    setting = good.partition(":")[0]
    with pytest.raises(RecipeError, match=rf"(?s)bad.yaml has 1 problem:.*{setting}"):
        load_recipe(str(folder / "bad.yaml"))


@pytest.mark.parametrize(("recipe", "module", "most", "change", "metric", "title"), EXAMPLES)
def test_an_example_trains_and_resumes_to_the_same_result(
    folder: Path, recipe: str, module: str, most: int, change: tuple[str, str], metric: str, title: str
) -> None:
    def start(name: str) -> warm.ForkServerProcess:
        arguments = ["run", str(folder / recipe), "--folder", str(folder / name)]
        return warm.posttrain(arguments, folder / f"{name}.log", {})

    calm, killed = start("calm"), start("killed")
    while killed.is_alive() and records(folder / "killed") < 3:
        time.sleep(0.01)
    killed.kill()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL, (folder / "killed.log").read_text()[-2000:]
    again = start("killed")
    for name, process in (("calm", calm), ("killed", again)):
        process.join()
        assert process.exitcode == 0, (folder / f"{name}.log").read_text()[-3000:]

    (weights, metrics, items), (weights_2, metrics_2, items_2) = outcome(folder / "calm"), outcome(folder / "killed")
    assert metrics == metrics_2 and items == items_2 and weights.keys() == weights_2.keys()
    assert all((weights_2[n] == w).all() for n, w in weights.items())
    steps = [json.loads(line) for line in metrics.splitlines()]
    assert len(steps) == 6 and all(metric in s for s in steps)
    page = (folder / "killed" / "report.html").read_text(encoding="utf-8")
    (about,) = (folder / "killed" / "stages").glob("*/method.json")
    named = {m["name"]: m for m in json.loads(about.read_text())["metrics"]}
    described = named.get(metric) or named["reward/*"]
    assert described["title"] and described["unit"]
    for text in (title, described["title"].replace("*", metric.partition("/")[2])):
        assert text in page
