"""Settings that make each shipped recipe small: a tiny model, two steps, a few rows and answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import posttrain
from posttrain.config import RLConfig
from posttrain.eval.behaviour_evaluation import BehaviourConfig
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
from tests import vision

FAMILIES = {
    "qwen2_5": "qwen2",
    "qwen3": "qwen3",
    "gemma3": "gemma3_text",
    "mistral": "mistral",
    "phi4": "phi3",
    "smollm3": "smollm3",
    "gpt_oss": "gpt_oss",
}
"""Recipe of a family -> its model type; all others are run on a llama."""


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


def rl_overrides(stage: RLConfig | OnlineDPOConfig, pictures: Path) -> list[str]:
    """Two small steps of a stage that samples and trains."""
    given = ["steps=2", "prompts_per_step=2", "group_size=2"]
    if str(getattr(stage.problems, "data", None) and stage.problems.data.source).startswith("stage:"):
        few, given = "data.rows=[0, 4]", [*given, "problems.data.rows=[4, 12]"]
    else:
        of_rows = stage.held_out.problems.data.source if stage.held_out.problems.kind == "rows" else None
        size = 3 if runs_programs(stage.rewards.terms) else 8
        few = f"size={size}" if of_rows is None else f"data.rows={[0, 8] if 'lab:' in of_rows else [9000, 9008]}"
        if str(of_rows).startswith("data/stamps/"):
            given += [f"{part}problems.data.source={pictures}" for part in ("", "held_out.")]
            few, given = "data.rows=[8, 12]", [*given, "problems.data.rows=[0, 8]"]
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
    """The first 64 of the rows that come along or are made, wherever a recipe reads more of them."""
    if isinstance(settings, list):
        return [given for i, inner in enumerate(settings) for given in few_rows(inner, f"{key}.{i}")]
    if not isinstance(settings, dict):
        return []
    given = [g for name, inner in settings.items() for g in few_rows(inner, f"{key}.{name}")]
    rows, source = settings.get("rows", 0), str(settings.get("source")).lstrip("['")
    first, end = (0, 65) if rows is None else rows if isinstance(rows, list | tuple) else (0, 0)  # None: all
    if source.startswith(("packaged:", "lab:")) and end - first > 64:
        given.append(f"{key.removeprefix('.')}.rows=[{first}, {first + 64}]")
    if key.endswith("problems") and isinstance(settings.get("size"), int) and settings["size"] > 64:
        given.append(f"{key.removeprefix('.')}.size=64")
    return given


def runs_programs(rewards: Any) -> bool:
    """Return True if what scores answers starts a sandbox for each."""
    return any(reward.kind in ("program", "unit_tests") for reward in rewards)


def overrides(name: str, chats: Path, teacher: str = "") -> list[str]:
    """A tiny model, two steps, small evaluations; everything else as shipped."""
    recipe = posttrain.load_recipe(name)
    given = [f"model.source=tiny:{FAMILIES.get(name, 'llama')}", *few_rows(recipe.model_dump())]
    if name.startswith("vision"):
        chats = picture_rows(chats.parent)
        given = [f"model.source={chats.with_name('seeing')}"]
    for i, stage in enumerate(recipe.stages):
        if isinstance(stage, RLConfig | OnlineDPOConfig):
            own = rl_overrides(stage, chats)
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
            few = (
                "data.rows=[0, 6]"
                if task.problems.kind == "rows"
                else f"size={2 if runs_programs([task.judge]) else 6}"
            )
            few = "rows=[0, 2]" if task.problems.kind == "human_eval" else few
            given += [
                f"evaluate.{i}.{s}" for s in (f"n={min(task.n, 2)}", "k=[]", "sampler.max_tokens=6", f"problems.{few}")
            ]
            continue
        if isinstance(task, SpeedTask.Config):  # a process that measures memory takes seconds to start
            given += [f"evaluate.{i}.{s}" for s in ("memory=false", "prompt_tokens=16", "answer_tokens=4", "repeats=2")]
            continue
        if isinstance(task, BehaviourConfig):
            given += [f"evaluate.{i}.data.rows=[0, 4]"]
            given += [f"evaluate.{i}.sampler.max_tokens=6"] if task.kind in ("refusal", "verbosity") else []
            continue
        packaged = str(task.data.source).startswith("packaged:")
        given += [f"evaluate.{i}.data.rows=[9000, 9010]"] if packaged else [f"evaluate.{i}.data.source={chats}"]
    return given
