"""Model cards: where a model comes from, through stages and runs; nothing in them is bound to this machine."""

from __future__ import annotations

import json
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import yaml

import posttrain
from posttrain.models.gguf_metadata import gguf_text
from posttrain.models.tiny_model import tiny_model, tiny_tokenizer
from posttrain.runs.lineage import origin_of, trace

ROWS = [{"prompt": f"Say {c}", "completion": c} for c in "abcdefgh"]


def recipe_of(folder: Path, source: str, name: str, **sft: Any) -> posttrain.Recipe:
    """SFT in two stages, the second with an adapter that stays alone, and an evaluation."""
    data = {"source": str(folder / "private" / "rows.jsonl")}
    stage = {"method": "sft", "data": data, "batch_size": 8, "epochs": 1, **sft}
    values = {
        "name": name,
        "model": {"source": source},
        "stages": [stage, {**stage, "name": "second", "adapter": {"r": 2}, "merge": False}],
        "evaluate": [{"kind": "perplexity", "name": "loss", "data": data}],
    }
    return posttrain.Recipe.model_validate(values)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    folder = tmp_path / "private" / "some-base"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\nA model.\n")
    return folder


def front(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])  # type: ignore[no-any-return]


def test_cards_tell_the_lineage_of_two_runs(base: Path, tmp_path: Path) -> None:
    whole = recipe_of(tmp_path, str(base), "one")
    one = posttrain.run(whole.model_copy(update={"stages": whole.stages[:1], "evaluate": []}), tmp_path / "one").folder
    two = posttrain.run(recipe_of(tmp_path, str(one), "two"), tmp_path / "two").folder
    cards = {p.relative_to(two): p.read_text() for p in two.rglob("README.md")}
    assert set(map(str, cards)) == {
        "model/README.md", "stages/0-sft/model/README.md", "stages/1-second/model/README.md",
        "stages/1-second/adapter/README.md",
    }  # fmt: skip
    card = cards[Path("model/README.md")]
    assert front(card) == {
        "license": "mit",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["posttrain", "sft"],
    }
    assert "from **some-base**: sft → sft → sft." in card
    stages = re.findall(r"^\| (one|two) \| (\w+) \| sft \| 1 \| [\d,]+ \| loss [\d.]+ → [\d.]+ \|$", card, re.MULTILINE)
    assert stages == [("one", "sft"), ("two", "sft"), ("two", "second")]
    sha = json.loads((two / "manifest.json").read_text())["data"][0]["sha256"]["rows.jsonl"]
    assert card.count(f"| rows.jsonl | 8 | not recorded | `{sha}` |") == 3
    assert "Licences of these data are not recorded: rows.jsonl." in card and "fewer than 100 items: loss (8)" in card
    assert "source: rows.jsonl" in card and "r: 2" in card and "schedule" not in card
    assert re.search(r"\| loss \| perplexity \| 8 \|( [\d.]+ \[[\d., ]+\] \|){2} [−\d.]+ \[[−\d.]+, [−\d.]+\] \|", card)
    assert "## Figures" not in cards[Path("stages/0-sft/model/README.md")]
    for text in cards.values():
        assert str(tmp_path) not in text and "private" not in text
    assert 'from_pretrained("stages/0-sft/model")' in card and "PeftModel.from_pretrained(base" in card
    assert "AutoModelForCausalLM.from_pretrained" in cards[Path("stages/0-sft/model/README.md")]
    shutil.rmtree(one)  # what is left of the lineage without it, in a run that was moved
    two.rename(tmp_path / "elsewhere")
    manifest = json.loads((tmp_path / "elsewhere" / "manifest.json").read_text())
    steps, origin = trace(tmp_path / "elsewhere", manifest, 1)
    assert [s.record["name"] for s in steps] == ["sft", "second"] and origin.name == "one"


def test_origins(base: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--some--model" / "snapshots" / "abc"
    shutil.copytree(base, snapshot)
    found = origin_of(str(snapshot))
    assert (found.name, found.hub, found.revision, found.licence) == ("some/model", "some/model", "abc", "mit")
    assert origin_of("tiny:llama").name == "tiny:llama"
    assert origin_of(str(tmp_path / "gone" / "away")).name == "away"

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    file = tmp_path / "small.gguf"
    fields = [("general.type", 8, text("model")), ("general.file_type", 4, b"\2\0\0\0"),
              ("general.license", 8, text("apache-2.0")), ("tokenizer.ggml.tokens", 9, b"")]  # fmt: skip
    body = b"".join(text(k) + struct.pack("<I", kind) + value for k, kind, value in fields)
    file.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, len(fields)) + body)
    assert gguf_text(file, "general.license") == "apache-2.0" and gguf_text(file, "general.name") is None
    found = origin_of(str(file))
    assert (found.name, found.licence, found.file) == ("small.gguf", "apache-2.0", "small.gguf")
    file.write_bytes(b"GGUF" + b"\xff" * 60)
    assert gguf_text(file, "general.license") is None
