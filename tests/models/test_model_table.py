"""The table of model types in docs/models.md is what the script finds, on a handful of types."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import transformers

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("model_table", ROOT / "tools" / "model_table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["model_table"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["qwen3", "gpt2", "mixtral", "gpt_oss", "bloom", "nemotron", "llama4_text", "lfm2"])
def test_the_table_has_the_row_that_is_measured(script: ModuleType, kind: str) -> None:
    lines = script.DOCS.read_text(encoding="utf-8").splitlines()
    assert script.measure(kind).cells() in lines


def test_what_is_refused_stands_below(script: ModuleType) -> None:
    row = script.measure("bert")
    assert row.batches == "refused" and "later tokens" in row.why
    text = script.DOCS.read_text(encoding="utf-8")
    below = text[text.index("Refused when they are opened") : text.index("Not tried,")]
    assert "bert," in below and "| bert |" not in text


def test_every_causal_type_of_this_transformers_is_accounted_for(script: ModuleType) -> None:
    """In the table, refused, or not tried, for the release that it was measured with."""
    text = script.DOCS.read_text(encoding="utf-8")
    if f"transformers {transformers.__version__}." not in text:
        pytest.skip("the table is of another release of transformers")
    made = text[text.index(script.BEGIN) : text.index(script.END)]
    names = {word.strip("|,. ") for line in made.splitlines() for word in line.split()}
    missing = [kind for kind in script.causal_types() if kind not in names]
    assert not missing, f"run python tools/model_table.py --write: {missing}"
