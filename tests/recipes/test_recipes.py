"""Every recipe that ships, two steps on a tiny model, through to its report; and the library used from Python."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

import posttrain
from posttrain.config import ModelConfig, RLConfig
from posttrain.core.errors import CheckpointError, DataError, RewardError
from posttrain.core.files import read_lines
from posttrain.eval.speed_evaluation import SpeedTask
from posttrain.methods.compress.prune_settings import PruneConfig
from posttrain.methods.compress.quantize_settings import QuantizeConfig
from posttrain.methods.data.ai_feedback import FeedbackConfig
from posttrain.methods.distill.distill_settings import DistillConfig
from posttrain.methods.merge.merge_settings import MergeConfig
from posttrain.methods.preference.offline import PreferenceConfig
from posttrain.methods.preference.online import OnlineDPOConfig
from posttrain.methods.pretrain.pretrain_settings import PretrainConfig
from posttrain.methods.reward_model.pairwise import RewardModelConfig
from posttrain.methods.reward_model.process import ProcessRewardConfig
from posttrain.methods.sft import SFTConfig
from posttrain.models.compressed_tensors import read_quantized
from posttrain.models.language_model import LanguageModel
from posttrain.models.loading import load_model
from posttrain.models.tiny_model import tiny_model
from posttrain.recipe.parsing import shipped
from posttrain.report.load import read
from posttrain.report.stage_comparison import compare_stages
from posttrain.sampling.greedy import greedy
from tests.methods.data.task_writer import served_tasks
from tests.recipes.small_recipes import overrides

CHATS = [
    {"messages": [{"role": "user", "content": f"What is {i} plus {i}?"}, {"role": "assistant", "content": str(2 * i)}]}
    for i in range(40)
]


PAIRS = [{"prompt": f"What is {i} plus {i}?", "chosen": str(2 * i), "rejected": str(2 * i + 1)} for i in range(40)]


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(c) + "\n" for c in CHATS))
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in PAIRS))
    return path


def check_stage(stage: Any, earlier: Sequence[Any], folder: Path, report: str) -> None:
    """Check what a stage left in its folder after two steps; earlier: the stages before it."""
    if stage.makes == "data":
        made = read_lines(folder / "data" / "rows.jsonl")
        assert made
        if isinstance(stage, FeedbackConfig):
            assert {r["labels"] for r in made} == {stage.labels}
        return
    if isinstance(stage, PruneConfig):
        pruned = AutoModelForCausalLM.from_pretrained(folder / "model")
        size = "num_hidden_layers" if stage.structure and stage.structure.layers else "intermediate_size"
        assert getattr(pruned.config, size) < getattr(tiny_model("llama").config, size)
        return
    if isinstance(stage, MergeConfig):
        card = (folder / "model" / "README.md").read_text()
        assert all(f"| {other.name} | sft |" in card for other in earlier)
        return
    if isinstance(stage, QuantizeConfig):
        weights = read_quantized(folder / "model")
        layers = [w for name, w in weights.items() if ".layers." in name]
        assert {(w.bits, w.group) for w in layers} == {(4, 16)} and len(layers) == 14
        assert len(weights) - len(layers) == (stage.embeddings is not None)
        return
    metrics = read_lines(folder / "metrics.jsonl")
    if isinstance(stage, RLConfig | OnlineDPOConfig):
        assert [m["step"] for m in metrics] == [0, 1, 2]
        carried = isinstance(stage, RLConfig) and stage.exploration.partial_rollouts  # judged later
        assert carried or all("reward" in m for m in metrics[1:])
        assert "held_out" in metrics[0] and "held_out" in metrics[-1]
        if stage.held_out is not None and stage.held_out.gold is not None:
            assert {"proxy", "gold", "kl_sequence"} <= metrics[0].keys() & metrics[-1].keys()
            assert 'id="gold"' in report
        return
    if isinstance(stage, RewardModelConfig | ProcessRewardConfig):
        measured = isinstance(stage, ProcessRewardConfig) or stage.held_out is not None
        assert [m["step"] for m in metrics] == ([0, 1, 2] if measured else [1, 2])
        assert ("held_out/accuracy" in metrics[-1]) == measured
        return
    if stage.held_out:
        first = metrics.pop(0)
        both = {"held_out/loss", "held_out/accuracy"}
        assert (both | {"held_out/margin"} if isinstance(stage, PreferenceConfig) else both) <= (
            first.keys() & metrics[-1].keys()
        )
    if isinstance(stage, PreferenceConfig):
        assert all("margin" in m for m in metrics)
    assert [m["step"] for m in metrics] == [1, 2] and all(m["loss"] > 0 for m in metrics)


@pytest.mark.parametrize("name", sorted(shipped()))
def test_every_recipe_runs_two_steps(name: str, tmp_path: Path, chats: Path) -> None:
    with served_tasks() as teacher:
        recipe = posttrain.load_recipe(name, overrides(name, chats, teacher))
        result = posttrain.run(recipe, tmp_path / "run")
    for i, stage in enumerate(recipe.stages):
        check_stage(stage, recipe.stages[:i], result.folder / "stages" / f"{i}-{stage.name}", result.report.read_text())
    manifest = json.loads((result.folder / "manifest.json").read_text())
    assert manifest["status"] == "done"
    if not recipe.stages:  # it measures, and that is all
        assert all((result.folder / "evaluations" / "before" / f"{t.name}.json").exists() for t in recipe.evaluate)
        assert "<html" in result.report.read_text() and not result.comparison
        return
    makes_model = any(s.makes == "model" for s in recipe.stages)
    soft = [s for s in recipe.stages if getattr(s, "adapter", None) is not None and s.adapter.is_soft_prompt]
    file = "adapter_model.safetensors" if soft else "model.safetensors"  # a soft prompt is never merged
    assert (f"model/{file}" in manifest["artifacts"]) == makes_model
    held_out = [s for s in recipe.stages if isinstance(s, RLConfig | OnlineDPOConfig) and s.held_out is not None]
    judged = [s for s in held_out if any(p.is_correctness for p in s.rewards.terms)]  # right or wrong, and so compared
    measured = [
        s for s in recipe.stages if isinstance(s, SFTConfig | DistillConfig | PretrainConfig) and s.held_out is not None
    ]
    speeds = [t for t in recipe.evaluate if isinstance(t, SpeedTask.Config)]  # not compared item by item
    assert len(result.comparison) == len(recipe.evaluate) + len(judged) + len(measured) - len(speeds)
    if speeds:
        found = compare_stages(read(result.folder))
        assert found is not None and len(found.lines) == 1 + len(recipe.stages)
        assert all(line.rates and line.sizes and None not in line.figures for line in found.lines)
    assert "<html" in result.report.read_text()
    for opens, kind in (
        (AutoModelForSequenceClassification, RewardModelConfig),
        (AutoModelForTokenClassification, ProcessRewardConfig),
    ):
        for i, stage in enumerate(recipe.stages):
            if isinstance(stage, kind):
                opens.from_pretrained(result.folder / "stages" / f"{i}-{stage.name}" / "reward_model")
    if recipe.stages and isinstance(recipe.stages[-1], QuantizeConfig):  # transformers needs compressed-tensors
        load_model(ModelConfig(source=str(result.model)))
    elif makes_model:
        base = tiny_model("llama") if soft else None
        opens = AutoModelForImageTextToText if name.startswith("vision") else AutoModelForCausalLM
        PeftModel.from_pretrained(base, result.model) if soft else opens.from_pretrained(result.model)


def recipe_of(chats: Path, **changes: object) -> posttrain.Recipe:
    stage = {"data": {"source": str(chats)}, "batch_size": 4, "epochs": 3, "optimizer": {"lr": 3e-3}, **changes}
    return posttrain.Recipe.model_validate(
        {
            "name": "r",
            "model": {"source": "tiny:llama"},
            "stages": [stage],
            "evaluate": [
                {"name": "sums", "kind": "generate", "data": {"source": str(chats)}, "max_new_tokens": 4, "show": 3}
            ],
        }
    )


@pytest.mark.parametrize("adapter", [None, {"r": 4}])
def test_transformers_reproduces_our_greedy_output(adapter: dict[str, int] | None, tmp_path: Path, chats: Path) -> None:
    """The final folder, opened by transformers alone, says token for token what the trained policy says.

    Ours is the ragged forward: each token must be its argmax; transformers' is generate on what was saved.
    """
    result = posttrain.run(recipe_of(chats, adapter=adapter), tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(result.model)
    theirs = AutoModelForCausalLM.from_pretrained(result.model, dtype=torch.float32)
    assert type(theirs).__module__.startswith("transformers.")
    ours = LanguageModel(AutoModelForCausalLM.from_pretrained(result.model, dtype=torch.float32)).eval()
    asked = [c["messages"][:1] for c in CHATS[:6]]
    prompts = [tokenizer.apply_chat_template(m, add_generation_prompt=True, return_dict=False) for m in asked]
    answers = greedy(ours, tokenizer, prompts, 12)
    for prompt, answer in zip(prompts, answers, strict=True):
        out = theirs.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist()
        ends = {tokenizer.eos_token_id}
        assert [t for t in out if t not in ends][: len(answer)] == answer
        whole = posttrain.core.types.Sample([*prompt, *answer], [0.0] * len(prompt) + [1.0] * len(answer))
        if answer:
            batch = ours.pack([whole])
            hidden = ours(batch, "hidden")
            logits = hidden @ ours.head().weight_V_H.t()
            assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer


def test_an_unmerged_adapter_is_peft_s_own(tmp_path: Path, chats: Path) -> None:
    """merge: false leaves an adapter that peft and transformers load onto its base, with the same outputs as merged."""
    from peft import PeftConfig

    base = tmp_path / "base"
    first = posttrain.run(recipe_of(chats), tmp_path / "first")
    first.model.rename(base)
    runs = {}
    for merge in (True, False):
        recipe = recipe_of(chats, adapter={"r": 4}, merge=merge)
        recipe = recipe.model_copy(update={"model": posttrain.ModelConfig(source=str(base))})
        runs[merge] = posttrain.run(recipe, tmp_path / str(merge))
    assert PeftConfig.from_pretrained(runs[False].model).base_model_name_or_path == str(base)
    ids = torch.arange(5, 25)[None]
    a, b = (AutoModelForCausalLM.from_pretrained(r.model, dtype=torch.float32)(ids).logits for r in runs.values())
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)(ids).logits
    assert float((a - plain).abs().max()) > 1e-2


def test_every_kind_of_stage_starts_from_an_unmerged_adapter(tmp_path: Path) -> None:
    """SFT leaves an adapter; what trains next has SFT's loss at its first step, and the base is far away."""
    rows = [{"prompt": f"Say {c}", "completion": c * 3} for c in "abcdefgh"]
    pairs = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": "zq"} for r in rows]
    for name, content in (("rows", rows), ("pairs", pairs)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(c) + "\n" for c in content))
    train = {"batch_size": 8, "epochs": 1, "adapter": {"r": 2}, "start": "stage:sft", "optimizer": {"lr": 1e-3}}
    sft = {"method": "sft", "data": {"source": str(tmp_path / "rows.jsonl")}, **train}
    on_pairs = {**train, "data": {"source": str(tmp_path / "pairs.jsonl")}}
    rl = {k: train[k] for k in ("adapter", "start")} | {
        "problems": {"kind": "lab", "size": 4}, "rewards": [{"kind": "exact"}], "prompts_per_step": 2, "group_size": 2,
        "steps": 1, "sampler": {"max_tokens": 4}, "held_out": None,
    }  # fmt: skip
    stages = [
        sft | {"start": None, "epochs": 12, "merge": False, "optimizer": {"lr": 1e-2}, "adapter": {"r": 4}},
        sft | {"name": "full", "adapter": None},
        {"method": "dpo", "merge": False, **on_pairs},
        {"method": "dpo", "name": "dpo_full", **on_pairs, "adapter": None},
        {"method": "reward_model", **on_pairs},
        {"method": "grpo", "merge": True, "kl": {"coefficient": 0.1}, **rl},
    ]
    recipe = {"name": "on-adapters", "model": {"source": "tiny:llama"}, "stages": stages, "evaluate": []}
    result = posttrain.run(posttrain.Recipe.model_validate(recipe), tmp_path / "run")
    first = {
        p.parent.name.split("-", 1)[1]: read_lines(p)[0] for p in (result.folder / "stages").glob("*/metrics.jsonl")
    }
    assert first["sft"]["loss"] > first["full"]["loss"] + 0.05
    assert first["preference"]["nll"] == pytest.approx(first["full"]["loss"], abs=1e-4)
    assert first["dpo_full"]["nll"] == pytest.approx(first["full"]["loss"], abs=1e-4)
    assert first["preference"]["loss"] == pytest.approx(math.log(2)) and first["rl"]["kl"] == pytest.approx(0, abs=1e-6)
    records = {r["name"]: r for r in json.loads((result.folder / "manifest.json").read_text())["stages"]}
    assert all(records[name]["start"]["base"] == "tiny:llama" for name in records if name != "sft")
    assert records["preference"]["adapter"] == "combined" and records["rl"]["merge_difference"] < 1e-4


def test_a_finished_run_is_not_run_again_and_another_recipe_is_refused(tmp_path: Path, chats: Path) -> None:
    recipe = recipe_of(chats, max_steps=2)
    first = posttrain.run(recipe, tmp_path / "run")
    written = (first.model / "model.safetensors").stat().st_mtime_ns
    assert posttrain.run(recipe, tmp_path / "run").comparison == first.comparison
    assert (first.model / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(CheckpointError, match=r"another recipe \(.*max_steps: 2.*3"):
        posttrain.run(recipe_of(chats, max_steps=3), tmp_path / "run")
    posttrain.run(recipe_of(chats, max_steps=3), tmp_path / "run", fresh=True)
    assert (tmp_path / "run.1" / "model").is_dir()  # set aside, not lost


def test_two_stages_each_start_from_what_the_one_before_left(tmp_path: Path, chats: Path) -> None:
    one = recipe_of(chats, max_steps=3)
    stages = [one.stages[0].model_copy(update={"name": n}) for n in ("first", "second")]
    two = posttrain.run(one.model_copy(update={"stages": stages}), tmp_path / "run")
    losses = [
        [m["loss"] for m in read_lines(two.folder / "stages" / f / "metrics.jsonl")] for f in ("0-first", "1-second")
    ]
    assert losses[1][0] < losses[0][0]
    records = json.loads((two.folder / "manifest.json").read_text())["stages"]
    assert records[1]["from"] == records[0]["to"]


def test_bad_rows_that_are_left_out_are_in_a_file_whole(tmp_path: Path) -> None:
    """Fifteen pairs of equal answers: ten in the manifest and on the page, all of them by row in a file."""
    rows = [*PAIRS, *({"prompt": f"p{i}", "chosen": "same", "rejected": "same"} for i in range(15))]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    given = [f"stages.0.data.source={tmp_path / 'pairs.jsonl'}", "stages.0.data.rows=null", "stages.0.held_out=null"]
    given += ["model.source=tiny:llama", "stages.0.max_steps=1", "stages.0.batch_size=2", "evaluate=[]"]
    result = posttrain.run(posttrain.load_recipe("dpo", [*given, "stages.0.data.on_bad_row=skip"]), tmp_path / "run")
    (entry,) = json.loads((result.folder / "manifest.json").read_text())["data"]
    assert entry["dropped"] == {"the two answers are equal": 15} and len(entry["bad_rows"]) == 10
    named = read_lines(result.folder / entry["bad_rows_file"])
    assert sorted(b["row"] for b in named) == list(range(41, 56)) and named[:10] == entry["bad_rows"]
    assert entry["bad_rows_file"] in result.report.read_text()


def test_bad_rows_stop_before_anything_is_trained(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(CHATS[0]) + "\n" + json.dumps({"messages": [{"role": "user", "content": "?"}]}) + "\n")
    with pytest.raises(DataError, match=r"bad.jsonl:2"):
        posttrain.run(recipe_of(path), tmp_path / "run")
    assert not (tmp_path / "run" / "stages").exists()
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["status"] == "failed"


def test_a_reward_that_can_not_be_built_stops_before_an_earlier_stage_trains(tmp_path: Path, chats: Path) -> None:
    rows = tmp_path / "problems.jsonl"
    rows.write_text('{"prompt": "2+2=", "answer": "4"}\n')
    rl = {
        "method": "grpo",
        "problems": {"kind": "rows", "data": {"source": str(rows)}},
        "rewards": {"terms": [{"kind": "function", "function": "math:no_such"}]},  # C: its names can't be read
    }
    one = recipe_of(chats, max_steps=2).model_dump()
    recipe = posttrain.Recipe.model_validate({**one, "stages": [*one["stages"], rl]})
    with pytest.raises(RewardError, match="no_such"):
        posttrain.run(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "stages").exists()


def test_a_stage_can_use_what_an_earlier_one_made_and_rounds_go_on_from_the_last(tmp_path: Path, chats: Path) -> None:
    """start: stage:NAME opens that stage's model; rounds go through the list again."""
    one = recipe_of(chats, max_steps=2)
    first = one.stages[0].model_copy(update={"name": "first"})
    again = one.stages[0].model_copy(update={"name": "again", "start": "base"})
    last = one.stages[0].model_copy(update={"name": "last", "start": "stage:first"})
    recipe = posttrain.Recipe.model_validate(
        one.model_copy(update={"stages": [first, again, last], "rounds": 2}).model_dump()
    )
    result = posttrain.run(recipe, tmp_path / "run")
    records = {r["name"]: r for r in json.loads((result.folder / "manifest.json").read_text())["stages"]}
    assert list(records) == ["first", "again", "last", "first.2", "again.2", "last.2"]
    assert records["again"]["from"] == "tiny:llama" and records["last"]["from"] == records["first"]["to"]
    assert records["first.2"]["from"] == records["last"]["to"]
    assert records["last.2"]["from"] == records["first.2"]["to"] and records["last.2"]["to"].endswith("5-last.2/model")


def test_a_reference_to_a_stage_that_is_not_before_is_refused(chats: Path) -> None:
    one = recipe_of(chats)
    wrong = one.stages[0].model_copy(update={"start": "stage:later"})
    with pytest.raises(ValueError, match=r"stage:later, and no stage before it is called that \(before it: none\)"):
        posttrain.Recipe.model_validate(one.model_copy(update={"stages": [wrong]}).model_dump())
