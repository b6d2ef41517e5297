"""Held-out rows measured by two ranks are those of one: losses, answers, the best step and its weights."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

import posttrain
from posttrain.core.files import read_lines, write_lines
from posttrain.methods.sft_measurement import measurements
from tests import vision, warm

STAGE = {
    "method": "sft",
    "data": {"source": "rows.jsonl"},
    "held_out": {"source": "other.jsonl"},
    "evaluate_every": 2,
    "held_out_answers": 3,  # an odd number: ranks answer different numbers of prompts
    "answer_tokens": 6,
    "batch_size": 8,
    "max_steps": 40,
    "early_stopping": {"patience": 1},
    "checkpoint_every": 5,
    "systems": {"tokens_per_micro_batch": 150},  # several passes, of unequal number on two ranks
}
STAGES = {
    "full": {"optimizer": {"lr": 2e-2, "schedule": "constant", "warmup": 0}},
    "lora": {"adapter": {"r": 4}, "max_steps": 4, "optimizer": {"lr": 1e-2, "schedule": "constant", "warmup": 0}},
}
for kind in ("prompt", "prefix"):
    STAGES[kind] = {**STAGES["lora"], "adapter": {"kind": kind, "tokens": 5}}
STAGES["distill"] = {  # half of the answers are the student's own, of an odd number of rows
    **STAGES["lora"], "method": "distill", "name": "sft", "teacher": {"source": "tiny:qwen2"}, "batch_size": 7,
    "on_policy": 0.5, "sampler": {"max_tokens": 8},
}  # fmt: skip
STAGES["images"] = {**STAGES["full"], "max_steps": 4, "batch_size": 4}
STAGES["p_tuning"] = {**STAGES["lora"], "adapter": {"kind": "p_tuning", "hidden": 8}}


LONG = ["lora", "distill", "prompt", "prefix", "p_tuning"]
"""Stages whose test repeats most of another one's."""


def runs_by_one_and_two(folder: Path, name: str) -> list[Path]:
    """Carry a recipe through by one process, and by two; return their folders."""
    for file, letters, count in (("rows", "abcdefgh ", 48), ("other", "abcdefgh  ijk", 11)):
        rng = random.Random(file)
        texts = ["".join(rng.choice(letters) for _ in range(20)) for _ in range(count)]
        lines = [json.dumps({"prompt": f"say {i}", "completion": t}) + "\n" for i, t in enumerate(texts)]
        (folder / f"{file}.jsonl").write_text("".join(lines))
    model = "tiny:llama"
    if name == "images":  # a picture in one row of three: a rank's pass may have none
        vision.make("llava", folder / "seeing")
        model = "seeing"
        for i in range(2):
            vision.picture(i).save(folder / f"{i}.png")
        for file in ("rows", "other"):
            rows = read_lines(folder / f"{file}.jsonl")
            shown = [{"image": f"{i % 2}.png"} if i % 3 == 0 else {} for i in range(len(rows))]
            write_lines(folder / f"{file}.jsonl", [row | image for row, image in zip(rows, shown, strict=True)])
    recipe = {"name": name, "model": {"source": model}, "stages": [{**STAGE, **STAGES[name]}]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for ranks in (1, 2):
        warm.run(posttrain.run, "recipe.yaml", f"runs/{ranks}", folder=folder, ranks=ranks)
    return [folder / "runs" / str(ranks) for ranks in (1, 2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.long] * (n in LONG)) for n in STAGES])
def test_two_ranks_measure_and_choose_as_one(tmp_path: Path, name: str) -> None:
    folders = runs_by_one_and_two(tmp_path, name)
    one, two = (folder / "stages" / "0-sft" for folder in folders)
    chosen, again = (json.loads((side / "best_step.json").read_text()) for side in (one, two))
    assert again.pop("held_out_loss") == pytest.approx(chosen.pop("held_out_loss"), abs=1e-4)
    assert again == chosen and (name != "full" or chosen["stopped_early"]["patience"] == 1)
    losses, others = (
        [m["held_out/loss"] for m in read_lines(side / "metrics.jsonl") if "held_out/loss" in m] for side in (one, two)
    )
    assert others == pytest.approx(losses, abs=1e-4) and len(losses) > 2
    for a, b in zip(*(measurements(side / "held_out").values() for side in (one, two)), strict=True):
        a, b = (json.loads(path.read_text()) for path in (a, b))
        assert a["answers"] == b["answers"] and len(a["answers"]) == 3
        assert [r["nll"] for r in b["rows"]] == pytest.approx([r["nll"] for r in a["rows"]], abs=1e-3)
    file = "adapter_model.safetensors" if name.startswith("p") else "model.safetensors"
    weights, same = (load_file(folder / "model" / file) for folder in folders)
    assert weights.keys() == same.keys()
    assert max(float((weights[n] - same[n]).abs().max()) for n in weights) < 1e-3
