"""What can't be opened as a model: the message says what was meant, or what to do."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest

from posttrain.config import ModelConfig
from posttrain.core import process_memory
from posttrain.core.errors import ModelError
from posttrain.models.language_model import LanguageModel
from posttrain.models.loading import load_model, resolve
from posttrain.models.tiny_model import tiny_model, tiny_tokenizer
from posttrain.recipe.model_sources import find_model


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
    with pytest.raises(ModelError, match=r"Did you mean runs/quickstart\?"):  # runs go there, whatever lies beside
        resolve("runs/quikstart")
    assert find_model("some/quikstart").kind == "hub"


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


def test_a_model_that_nothing_refers_to_is_gone_before_another_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forwards that are bound to their modules are cycles, which Python itself frees at some later time."""
    tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    config = ModelConfig(source=str(tmp_path))
    monkeypatch.setattr(process_memory, "LARGE", 1)
    gc.disable()
    try:
        model = LanguageModel(load_model(config)[0])
        weight = weakref.ref(model.base.model.layers[0].mlp.down_proj.weight)
        del model
        assert weight() is not None
        load_model(config)
        assert weight() is None
    finally:
        gc.enable()
