"""Make a laboratory's model: tokenizer, pretraining, measurement, problems; a folder is written as a whole or not."""

from __future__ import annotations

import json
import os
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from posttrain.config import ModelConfig, OptimizerConfig, SystemsConfig
from posttrain.core.errors import ModelError
from posttrain.core.files import write_json
from posttrain.core.progress import Track
from posttrain.lab.lab_settings import LabKind, LabSettings
from posttrain.lab.programs_lab import ProgramsLab
from posttrain.lab.refine_lab import RefineLab
from posttrain.lab.reviews_lab import ReviewsLab
from posttrain.lab.sums_lab import SumsLab
from posttrain.lab.talk_lab import TalkLab
from posttrain.models.backends import backend_for
from posttrain.models.language_model import LanguageModel
from posttrain.models.loading import LAB_VERSION, lab_folder, pick_device, quiet
from posttrain.models.saving import save_trained
from posttrain.trainer.train_step import Learner

LABS: dict[LabKind, type[SumsLab | ReviewsLab | TalkLab]] = {
    "sums": SumsLab,
    "reviews": ReviewsLab,
    "refine": RefineLab,
    "programs": ProgramsLab,
}


def make_lab(settings: LabSettings, folder: Path, shown: bool = True) -> dict[str, Any]:
    """Make a laboratory: a Hugging Face folder with lab.json, and except for reviews problems.jsonl and held_out.jsonl.

    Args:
        settings: What is made.
        folder: Where; an earlier laboratory there is replaced.
        shown: Show the progress.

    Returns:
        The content of lab.json.

    Raises:
        ModelError: The folder has other content.
    """
    _check_folder(folder)
    began, replaced = time.monotonic(), folder.exists()
    quiet()
    device = pick_device("auto")
    backend_for(device).tune()
    lab = LABS[settings.kind](settings)
    tokenizer = lab.tokenizer
    policy = LanguageModel(build_lab_model(settings, len(tokenizer), tokenizer.eos_token_id).to(device))
    loss = pretrain(policy, lab, shown)
    result = {
        "version": LAB_VERSION,
        "settings": asdict(settings),
        "parameters": sum(p.numel() for p in policy.parameters()),
        "vocabulary": len(tokenizer),
        "loss": loss,
        **lab.measure(policy),
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".lab-") as scratch:
        work = Path(scratch) / "lab"
        save_trained(policy, tokenizer, ModelConfig(source="lab:"), work, None, True, settings.seed, None)
        lab.write(work)
        result["seconds"] = round(time.monotonic() - began, 1)
        write_json(work / "lab.json", result)
        if replaced:
            folder.rename(Path(scratch) / "old")
        try:
            os.rename(work, folder)
        except OSError:
            if not (folder / "lab.json").exists():  # else another process was first, and its laboratory is used
                raise
    return result


def _check_folder(folder: Path) -> None:
    """Raise ModelError if a folder has other content than a laboratory."""
    if folder.exists() and not (folder / "lab.json").exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelError(f"{folder} exists and is no laboratory (no lab.json in it): name another folder")


def build_lab_model(settings: LabSettings, vocabulary: int, end: int) -> Any:
    """Return a random Llama with tied embeddings in float32, made from the seed alone.

    Args:
        settings: Size and seed.
        vocabulary: Number of tokens.
        end: Id of the end token.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=settings.width,
        intermediate_size=settings.width * 3,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=256,
        initializer_range=settings.width**-0.5 / 2,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
    )
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        return LlamaForCausalLM(config)


def pretrain(policy: LanguageModel, lab: SumsLab | ReviewsLab | TalkLab, shown: bool = True) -> float:
    """Train on next-token prediction, and return the mean loss of the last 20 steps.

    Args:
        policy: The model.
        lab: Gives the batches and the settings.
        shown: Show the progress.
    """
    settings, losses = lab.settings, list[float]()
    optimizer = OptimizerConfig(lr=settings.lr, warmup=0.05, betas=(0.9, 0.98), weight_decay=0.05)
    learner = Learner(policy, optimizer, SystemsConfig(tokens_per_micro_batch=8192), settings.steps)
    with Track("lab", settings.steps, shown=shown) as track:
        for step in range(settings.steps):
            losses.append(learner.step(lab.batch(step)).metrics["loss"])
            track.update(step + 1, loss=losses[-1])
    return sum(losses[-20:]) / len(losses[-20:])


def lab_place(output: Path | None, kind: LabKind, seed: int, steps: int | None) -> tuple[str, Path, LabSettings]:
    """Return the model source that names a laboratory, its folder, and its settings.

    Args:
        output: Folder to make. None: the cache's.
        kind: Kind of laboratory.
        seed: Seed of the texts and the model.
        steps: Pretraining steps. None: the kind's own number.

    Raises:
        ModelError: Steps are given without a folder: the cache holds models with the kind's own number.
    """
    name, lab = f"lab:{seed}" if kind == "sums" else f"lab:{kind}:{seed}", LABS[kind]
    if output is None and steps is not None:
        raise ModelError(f"--steps makes another model than {name} names: give it a folder with --output")
    settings = LabSettings(seed, kind, lab.steps if steps is None else steps, lab.batch_size)
    return name if output is None else str(output), output or lab_folder(seed, kind), settings


def plan_lab(output: Path | None, kind: LabKind, seed: int, steps: int | None) -> list[tuple[str, str]]:
    """Return what `posttrain lab` would do, as (subject, text) lines.

    Args:
        output: As for `lab_place`, and so the others.
        kind: Likewise.
        seed: Likewise.
        steps: Likewise.

    Raises:
        ModelError: What the command would end with before its first step.
    """
    name, folder, settings = lab_place(output, kind, seed, steps)
    kept = (folder / "lab.json").exists()
    if output is None and kept:
        return [("folder", f"{folder}: made already, so nothing is computed"), ("source", f"model.source={name}")]
    _check_folder(folder)
    quiet()
    tokenizer = LABS[kind](settings).tokenizer
    with torch.device("meta"):
        hf = build_lab_model(settings, len(tokenizer), tokenizer.eos_token_id)
    count = sum(p.numel() for p in hf.parameters())
    problems = "" if kind == "reviews" else ", problems.jsonl, held_out.jsonl"
    size = f"{settings.layers} layers, width {settings.width}, {count:,} parameters"
    return [
        ("model", f"Llama, {size}, {pick_device('auto')}"),
        ("trains", f"{settings.steps:,} steps of {settings.batch_size} texts ({kind}, seed {seed}), then measures it"),
        ("folder", f"{folder}: {'a laboratory, which is replaced' if kept else 'new'}"),
        ("writes", f"the model in the Hugging Face layout, lab.json{problems}"),
        ("source", f"model.source={name}"),
    ]


def run_lab_command(console: Any, output: Path | None, kind: LabKind, seed: int, steps: int | None) -> None:
    """Carry out `posttrain lab`.

    Args:
        console: Where the result is printed.
        output: Folder to make. None: the cache's, which `lab:SEED` or `lab:KIND:SEED` names, if it is missing.
        kind: Kind of laboratory.
        seed: Seed of the texts and the model.
        steps: Pretraining steps. None: the kind's own number.

    Raises:
        ModelError: Steps are given without a folder: the cache holds models with the kind's own number.
    """
    name, folder, settings = lab_place(output, kind, seed, steps)
    record = folder / "lab.json"
    if output is None and record.exists():
        result = json.loads(record.read_text())
    else:
        result = make_lab(settings, folder)
    console.print(
        f"{folder}: {result['parameters']:,} parameters, {result['seconds']:.0f} s. {LABS[kind].describe(result)}",
        soft_wrap=True,
    )
    console.print(f"model.source={name}", soft_wrap=True)
