"""What can't be opened as a model: the message says what was meant, or what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from posttrain.core.errors import ModelError
from posttrain.models.loading import resolve


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """runs/quickstart under the working directory: a run that has not made its model."""
    monkeypatch.chdir(tmp_path)
    folder = Path("runs") / "quickstart"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text("name: quickstart\n")
    (folder / "manifest.json").write_text("{}")
    return folder


def test_a_run_without_its_model_says_how_to_go_on(run: Path) -> None:
    with pytest.raises(ModelError, match="has not made its model yet.*posttrain run runs/quickstart"):
        resolve(str(run))
    (run / "model").mkdir()
    (run / "model" / "config.json").write_text("{}")
    assert resolve(str(run)).location == "runs/quickstart/model"


def test_a_mistyped_run_is_found_without_asking_the_hub(run: Path) -> None:
    with pytest.raises(ModelError, match=r"no such run\. Did you mean runs/quickstart\?"):
        resolve("runs/quikstart")
    with pytest.raises(ModelError, match=r"no such folder\. Did you mean .*/quickstart\?"):
        resolve(str(run.parent.resolve() / "quickstat"))
    (run / "manifest.json").unlink()
    assert resolve("runs/quikstart").kind == "hub"  # not a run beside it: it may be a name on the Hub


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("lab:one", "lab:SEED"),
        ("lab:reviews1", "lab:KIND:SEED"),
        ("lab:reviews:one", "lab:KIND:SEED"),
        ("package:no_such_package", "install it with pip"),
        ("no/such/file.gguf", "no such file"),
        ("tests", "neither config.json nor adapter_config.json"),
    ],
)
def test_other_sources_that_are_wrong(source: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    with pytest.raises(ModelError, match=message):
        resolve(source)
