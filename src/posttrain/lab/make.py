"""Makes a laboratory's model: tokenizer, pretraining, measurement, problems; a folder, written whole or not."""

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
from posttrain.lab import reviews_lab as reviews
from posttrain.lab import sums_lab as sums
from posttrain.lab.lab_settings import Kind, Settings
from posttrain.models.backends import backend_for
from posttrain.models.language_model import LanguageModel
from posttrain.models.loading import LAB_VERSION, lab_folder, pick_device, quiet
from posttrain.models.saving import save_trained
from posttrain.trainer.train_step import Learner

KINDS: dict[Kind, Any] = {"sums": sums, "reviews": reviews}
"""What each kind of laboratory is made of: build_tokenizer, reader, measure, write, said."""
STEPS: dict[Kind, int] = {"sums": 800, "reviews": 420}


def make(settings: Settings, folder: Path, shown: bool = True) -> dict[str, Any]:
    """Make a laboratory in `folder`, in place of an earlier one; returns what lab.json says.

    An ordinary Hugging Face folder, with lab.json besides, and of kind sums problems.jsonl and held_out.jsonl (prompt,
    answer). Raises ModelError where the folder holds anything else.
    """
    if folder.exists() and not (folder / "lab.json").exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelError(f"{folder} exists and is no laboratory (no lab.json in it): name another folder")
    began, replaced = time.monotonic(), folder.exists()
    quiet()
    device = pick_device("auto")
    backend_for(device).tune()
    kind = KINDS[settings.kind]
    tokenizer = kind.build_tokenizer()
    policy = LanguageModel(build_model(settings, len(tokenizer), tokenizer.eos_token_id).to(device))
    loss = pretrain(policy, tokenizer, settings, shown)
    result = {
        "version": LAB_VERSION,
        "settings": asdict(settings),
        "parameters": sum(p.numel() for p in policy.parameters()),
        "vocabulary": len(tokenizer),
        "loss": loss,
        **kind.measure(policy, tokenizer, settings),
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".lab-") as scratch:
        work = Path(scratch) / "lab"
        save_trained(policy, tokenizer, ModelConfig(source="lab:"), work, None, True, settings.seed, None)
        kind.write(work, settings)
        result["seconds"] = round(time.monotonic() - began, 1)
        write_json(work / "lab.json", result)
        if replaced:
            folder.rename(Path(scratch) / "old")
        try:
            os.rename(work, folder)
        except OSError:
            if not (folder / "lab.json").exists():  # else another process was first: its laboratory serves
                raise
    return result


def build_model(settings: Settings, vocabulary: int, end: int) -> Any:
    """A random Llama, from the seed alone: tied embeddings, float32."""
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


def pretrain(policy: LanguageModel, tokenizer: Any, settings: Settings, shown: bool = True) -> float:
    """Next-token prediction; returns the mean loss of the last 20 steps."""
    optimizer = OptimizerConfig(lr=settings.lr, warmup=0.05, betas=(0.9, 0.98), weight_decay=0.05)
    learner = Learner(policy, optimizer, SystemsConfig(tokens_per_micro_batch=8192), settings.steps)
    read, losses = KINDS[settings.kind].reader(tokenizer, settings), list[float]()
    with Track("lab", settings.steps, shown=shown) as track:
        for step in range(settings.steps):
            losses.append(learner.step(read(step)).metrics["loss"])
            track.update(step + 1, loss=losses[-1])
    return sum(losses[-20:]) / len(losses[-20:])


def command(console: Any, output: Path | None, kind: Kind, seed: int, steps: int | None) -> None:
    """`posttrain lab`. Without a folder the cache's is made, which `lab:SEED` or `lab:reviews:SEED` names, unless it is
    there already."""
    name = f"lab:{seed}" if kind == "sums" else f"lab:{kind}:{seed}"
    if output is None and steps is not None:
        raise ModelError(f"--steps makes another model than {name} names: give it a folder with --output")
    folder = output or lab_folder(seed, kind)
    settings = Settings(seed, kind, STEPS[kind] if steps is None else steps)
    found = folder / "lab.json"
    result = json.loads(found.read_text()) if output is None and found.exists() else make(settings, folder)
    console.print(
        f"{folder}: {result['parameters']:,} parameters, {result['seconds']:.0f} s. {KINDS[kind].said(result)}",
        soft_wrap=True,
    )
    console.print(f"model.source={name if output is None else folder}", soft_wrap=True)
