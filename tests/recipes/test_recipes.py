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
from posttrain.eval.evaluation_tasks import SampleTask, ScoreTask
from posttrain.eval.refine_evaluation import RefineEvaluation
from posttrain.eval.speed_evaluation import SpeedTask
from posttrain.methods.compress.prune_settings import PruneConfig
from posttrain.methods.compress.quantize_settings import QuantizeConfig
from posttrain.methods.data.ai_feedback import FeedbackConfig
from posttrain.methods.data.corrections import CorrectionsConfig
from posttrain.methods.data.critique_revision import RefineConfig
from posttrain.methods.data.instructions import InstructionsConfig
from posttrain.methods.data.rejection import RejectionConfig
from posttrain.methods.data.self_instruct import SelfInstructConfig
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
from tests import vision
from tests.methods.data.task_writer import served_tasks

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


def instruction_tasks(folder: Path) -> list[Path]:
    """Write tables and task files: labels, short answers with reasoning, and texts to train on; labels to hold out."""
    columns = {
        "classification": {"fields": {"input": "{a}"}, "output": "{label}"},
        "question_answering": {"fields": {"question": "What is {a}?"}, "output": "{b}", "rationale": "It is {b}."},
        "paraphrase": {"fields": {"input": "{a}"}, "output": "{b} {a}"},
        "inference": {"fields": {"premise": "{a}", "hypothesis": "{b}"}, "output": "{label}"},
    }
    files = []
    for number, (kind, task) in enumerate(columns.items()):
        name = f"table_{kind}"
        rows = [{"a": f"n{i * 7919 + number}", "b": f"m{i * 104729}", "label": "xy"[i % 2]} for i in range(20)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files.append(folder / f"{name}.yaml")
        files[-1].write_text(json.dumps({"name": name, "type": kind, "data": f"{name}.jsonl", **task}))
    return files


def picture_rows(folder: Path) -> Path:
    """Write a tiny model that reads images, and questions with choices on pictures."""
    vision.make("fast_vlm", folder / "seeing")
    rows = []
    for i in range(12):
        vision.picture(i).save(folder / f"{i}.png")
        rows.append(
            {"prompt": "Odd?", "completion": ["no", "yes"][i % 2], "image": f"{i}.png", "choices": ["yes", "no"]}
        )
    path = folder / "pictures.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tiny_judge(where: str, chats: Path) -> list[str]:
    return [f"{where}.model.source=tiny:llama", f"{where}.store={chats.with_name('judge.sqlite3')}"]


def rl_overrides(stage: RLConfig | OnlineDPOConfig) -> list[str]:
    """Two small steps of a stage that samples and trains."""
    given = ["steps=2", "prompts_per_step=2", "group_size=2"]
    if str(getattr(stage.problems, "data", None) and stage.problems.data.source).startswith("stage:"):
        few, given = "data.rows=[0, 4]", [*given, "problems.data.rows=[4, 12]"]
    else:
        of_rows = stage.held_out.problems.data.source if stage.held_out.problems.kind == "rows" else None
        few = "size=8" if of_rows is None else f"data.rows={[0, 8] if 'lab:' in of_rows else [9000, 9008]}"
    turns = isinstance(stage, RLConfig) and stage.environment is not None and stage.environment.kind == "refine"
    given += [f"sampler.max_tokens={60 if turns else 6}", f"held_out.problems.{few}"]
    given += ["environment.stop=[a, e, i, o, u, r, s, t]"] if turns else []
    given += [f"rewards.{j}.source=tiny:llama" for j, t in enumerate(stage.rewards.terms) if t.kind == "corrected"]
    if isinstance(stage, RLConfig):
        given += ["exploration.partial_rollouts=5"] if stage.exploration.partial_rollouts else []
        given += ["exploration.adaptive_group_size.first=1"] if stage.exploration.adaptive_group_size else []
    return given


def maker_overrides(stage: Any, chats: Path, teacher: str) -> list[str] | None:
    """A few rows of a stage that takes no steps: it makes rows, or compresses the model. None: it takes steps."""
    if isinstance(stage, RejectionConfig):  # a random model is right about nothing: all that ends is kept
        return ["threshold=-1", "problems.data.rows=[0, 20]", "sampler.max_tokens=99"]
    if isinstance(stage, CorrectionsConfig):  # likewise: every answer counts as right, and is ended by a letter
        small = ["threshold=-1", "kept_right=null", "problems.size=8", "sampler.max_tokens=90"]
        small += ["environment.stop=[a, e, i, o, u, r, s, t]"]
        # it computes nothing that a calculator could check
        checked = ["environment.feedback=[{kind: verifier, reward: {kind: exact}}]"]
        return small + (checked if stage.environment.feedback else [])
    if isinstance(stage, SelfInstructConfig):  # a random model writes no task: a server does
        server = f"{{model: teacher, base_url: '{teacher}'}}"
        return ["instructions=4", "sampler.max_tokens=99", f"server={server}"]
    if isinstance(stage, InstructionsConfig):  # its tables are fetched: small ones of the same types are written
        files = instruction_tasks(chats.parent)
        return [f"tasks=[{', '.join(map(str, files))}]", "held_out=2", "unseen=4", "rows=30", "max_tokens=null"]
    if isinstance(stage, RefineConfig):  # its context has no room for examples
        return ["problems.data.rows=[0, 12]", "examples=null", "sampler.stop=[a, b, c, d, e, f, g, h]"]
    if isinstance(stage, PruneConfig):  # of this model half is embeddings
        layers = stage.structure is not None and stage.structure.layers
        return ["rows=4", *(["structure.layers=1"] if layers else ["structure.ratio=0.8", "structure.round_to=16"])]
    if isinstance(stage, QuantizeConfig):
        return ["rows=4", "group=16"]
    if isinstance(stage, MergeConfig):
        return []
    if isinstance(stage, FeedbackConfig):
        judge = tiny_judge("judge", chats) if stage.judge is not None else []
        if stage.answers.kind == "samples":
            return ["answers.problems.data.rows=[0, 6]", "answers.sampler.max_tokens=30", *judge]
        if str(stage.answers.data.source).startswith("packaged:"):
            return ["answers.data.rows=[0, 80]", "answers.pairs_per_prompt=40", *judge]
        return [f"answers.data.source={chats.with_name('pairs.jsonl')}", *judge]
    return None


def row_overrides(stage: Any, chats: Path) -> list[str]:
    """Two steps of two rows of a stage that trains in epochs."""
    given, pairs = ["max_steps=2", "batch_size=2"], chats.with_name("pairs.jsonl")
    if isinstance(stage, RewardModelConfig):
        own = str(stage.data.source).startswith("stage:")
        given += [] if own else [f"data.source={pairs}"]
        return given + (["data.rows=[0, 25]", "held_out.rows=[25, 35]"] if own and stage.held_out is not None else [])
    if isinstance(stage, ProcessRewardConfig):
        small = ("problems.size=6", "held_out.size=20", "sampler.max_tokens=12", "chains=2", "completions=2")
        return given + [f"labels.{s}" for s in small]
    if isinstance(stage, PreferenceConfig):
        packaged = str(stage.data.source).startswith("packaged:")
        return [*given, "data.rows=[0, 40]" if packaged else f"data.source={pairs}"]
    if isinstance(stage, DistillConfig):  # a random teacher ends few of its answers
        given += ["sampler.max_tokens=6"] if stage.on_policy else []
        given += ["teacher_sampler.max_tokens=400"] if stage.teacher_text else []
        given += [] if str(stage.teacher.source).startswith("stage:") else ["teacher.source=tiny:qwen2"]
        if stage.problems is not None:
            return [*given, "problems.size=8"]
    if isinstance(stage, PretrainConfig):
        given += ["sequence_length=64", "replay.data.rows=[0, 40]"]
    own = str(stage.data.source).startswith(("packaged:", "lab:", "stage:"))
    given += ["data.rows=null"] if own and "/data/" in str(stage.data.source) else []  # a few rows
    return given + ([] if own else [f"data.source={chats}"])


def few_rows(settings: Any, key: str = "") -> list[str]:
    """The first 64 of the rows that come along, wherever a recipe reads more of them."""
    if isinstance(settings, list):
        return [given for i, inner in enumerate(settings) for given in few_rows(inner, f"{key}.{i}")]
    if not isinstance(settings, dict):
        return []
    given = [g for name, inner in settings.items() for g in few_rows(inner, f"{key}.{name}")]
    rows, source = settings.get("rows"), str(settings.get("source")).lstrip("['")
    if isinstance(rows, list | tuple) and source.startswith(("packaged:", "lab:")) and rows[1] - rows[0] > 64:
        given.append(f"{key.removeprefix('.')}.rows=[{rows[0]}, {rows[0] + 64}]")
    return given


def overrides(name: str, chats: Path, teacher: str = "") -> list[str]:
    """A tiny model, two steps, small evaluations; everything else as shipped."""
    recipe = posttrain.load_recipe(name)
    given = ["model.source=tiny:llama", *few_rows(recipe.model_dump())]
    if name == "vision":
        chats = picture_rows(chats.parent)
        given = [f"model.source={chats.with_name('seeing')}"]
    for i, stage in enumerate(recipe.stages):
        if isinstance(stage, RLConfig | OnlineDPOConfig):
            own = rl_overrides(stage)
        else:
            made = maker_overrides(stage, chats, teacher)
            own = row_overrides(stage, chats) if made is None else made
        given += [f"stages.{i}.{setting}" for setting in own]
    return given + evaluation_overrides(recipe, chats)


def evaluation_overrides(recipe: posttrain.Recipe, chats: Path) -> list[str]:
    """Small evaluations."""
    given: list[str] = []
    for i, task in enumerate(recipe.evaluate):
        if str(getattr(getattr(task, "data", None), "source", "")).startswith("stage:"):
            continue
        if isinstance(task, ScoreTask.Config):
            given += [f"evaluate.{i}.{s}" for s in ("problems.data.rows=[9100, 9106]", "sampler.max_tokens=6")]
            given += tiny_judge(f"evaluate.{i}.scorer.judge", chats) if task.scorer.kind == "judge" else []
            continue
        if isinstance(task, SampleTask.Config | RefineEvaluation.Config):
            few = "data.rows=[0, 6]" if task.problems.kind == "rows" else "size=6"
            few = "rows=[0, 2]" if task.problems.kind == "human_eval" else few
            given += [
                f"evaluate.{i}.{s}" for s in (f"n={min(task.n, 2)}", "k=[]", "sampler.max_tokens=6", f"problems.{few}")
            ]
            continue
        if isinstance(task, SpeedTask.Config):  # a process that measures memory takes seconds to start
            given += [f"evaluate.{i}.{s}" for s in ("memory=false", "prompt_tokens=16", "answer_tokens=4", "repeats=2")]
            continue
        packaged = str(task.data.source).startswith("packaged:")
        given += [f"evaluate.{i}.data.rows=[9000, 9010]"] if packaged else [f"evaluate.{i}.data.source={chats}"]
    return given


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
        opens = AutoModelForImageTextToText if name == "vision" else AutoModelForCausalLM
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
        "rewards": {"terms": [{"kind": "function", "function": "no_such_module:f"}]},
    }
    one = recipe_of(chats, max_steps=2).model_dump()
    recipe = posttrain.Recipe.model_validate({**one, "stages": [*one["stages"], rl]})
    with pytest.raises(RewardError, match="no_such_module"):
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
