"""Makes the laboratory's model: tokenizer, pretraining, measurement, problems; a folder, written whole or not."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from posttrain.config import ModelConfig, OptimizerConfig, SamplingConfig, SystemsConfig
from posttrain.data import sums as text
from posttrain.errors import ModelError
from posttrain.files import write_json, write_text
from posttrain.models import cpu
from posttrain.models.lm import LanguageModel
from posttrain.models.load import LAB_VERSION, lab_folder, pick_device, quiet
from posttrain.models.save import save_trained
from posttrain.progress import Track
from posttrain.rollout.engine import LocalSampler
from posttrain.rollout.sampler import Request
from posttrain.train.learner import Learner
from posttrain.types import Sample

END = "<|endoftext|>"


@dataclass(frozen=True)
class Settings:
    """What is made. `steps` is fixed rather than the time, so that a seed means the same model on any machine."""

    seed: int = 0
    steps: int = 800
    batch_size: int = 128
    lr: float = 3e-3
    width: int = 160
    layers: int = 4
    heads: int = 5
    train_problems: int = 4000
    held_out_problems: int = 512
    measured: int = 512
    """Held-out problems that the model is measured on at the end."""


def make(settings: Settings, folder: Path, shown: bool = True) -> dict[str, Any]:
    """Make a laboratory in `folder`, in place of an earlier one; returns what lab.json says.

    An ordinary Hugging Face folder, with problems.jsonl, held_out.jsonl (prompt, answer) and lab.json besides. Raises
    ModelError where the folder holds anything else.
    """
    if folder.exists() and not (folder / "lab.json").exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelError(f"{folder} exists and is no laboratory (no lab.json in it): name another folder")
    began, replaced = time.monotonic(), folder.exists()
    quiet()
    device = pick_device("auto")
    if device.type == "cpu":
        cpu.tune()
    tokenizer = build_tokenizer()
    policy = LanguageModel(build_model(settings, len(tokenizer), tokenizer.eos_token_id).to(device))
    loss = pretrain(policy, tokenizer, settings, shown)
    result = {
        "version": LAB_VERSION,
        "settings": asdict(settings),
        "parameters": sum(p.numel() for p in policy.parameters()),
        "vocabulary": len(tokenizer),
        "loss": loss,
        **measure(policy, tokenizer, settings),
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".lab-") as scratch:
        work = Path(scratch) / "lab"
        save_trained(policy, tokenizer, ModelConfig(source="lab:"), work, None, True, settings.seed, None)
        write_problems(work, settings)
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


def build_tokenizer() -> Any:
    """Byte-level BPE, every digit a token of its own, the corpus's words one token each. The same for every seed."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        min_frequency=20,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((t.prompt + t.completion for t in (text.text_at(0, i) for i in range(8000))), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )


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


def corpus(tokenizer: Any, seed: int, start: int, count: int) -> list[Sample]:
    """Texts number `start` on, each ending in the end token; every token but the first carries loss."""
    texts = [text.text_at(seed, i) for i in range(start, start + count)]
    encoded = tokenizer([t.prompt + t.completion for t in texts])["input_ids"]
    return [Sample([*ids, tokenizer.eos_token_id], [0.0] + [1.0] * len(ids)) for ids in encoded]


def pretrain(policy: LanguageModel, tokenizer: Any, settings: Settings, shown: bool = True) -> float:
    """Next-token prediction, no text twice; returns the mean loss of the last 20 steps."""
    optimizer = OptimizerConfig(lr=settings.lr, warmup=0.05, betas=(0.9, 0.98), weight_decay=0.05)
    learner = Learner(policy, optimizer, SystemsConfig(tokens_per_micro_batch=8192), settings.steps)
    losses: list[float] = []
    with Track("lab", settings.steps, shown=shown) as track:
        for step in range(settings.steps):
            batch = corpus(tokenizer, settings.seed, step * settings.batch_size, settings.batch_size)
            losses.append(learner.step(batch).metrics["loss"])
            track.update(step + 1, loss=losses[-1])
    return sum(losses[-20:]) / len(losses[-20:])


def measure(policy: LanguageModel, tokenizer: Any, settings: Settings, group_size: int = 8) -> dict[str, Any]:
    """Shares of right answers on held-out problems.

    greedy: the likeliest answer; greedy_by_style: with the style's opening given; sampled: at temperature 1; mixed:
    groups of `group_size` samples of a problem that hold right and wrong ones.
    """
    rows = text.problems(settings.seed, settings.measured, held_out=True)
    greedy = {"": answers(policy, tokenizer, rows)}
    for style, opening in text.OPENING.items():
        if opening:
            greedy[style] = answers(policy, tokenizer, rows, opening=opening)
    groups = answers(policy, tokenizer, rows[: len(rows) // 4 or 1], temperature=1.0, n=group_size)
    return {
        "greedy": _share([g[0] for g in greedy.pop("")]),
        "greedy_by_style": {style: _share([g[0] for g in right]) for style, right in greedy.items()},
        "sampled": _share([r for g in groups for r in g]),
        "mixed": _share([0 < sum(g) < len(g) for g in groups]),
        "measured": len(rows),
    }


def answers(
    policy: LanguageModel,
    tokenizer: Any,
    rows: Sequence[Mapping[str, str]],
    temperature: float = 0.0,
    n: int = 1,
    opening: str = "",
    seed: int = 0,
) -> list[list[bool]]:
    """For each problem, whether its answers are right: the completion's last line is the sum."""
    tokens = tokenizer([row["prompt"] + opening for row in rows])["input_ids"]
    requests = [Request(t, n, seed + i) for i, t in enumerate(tokens)]
    groups = LocalSampler(policy, tokenizer).sample(requests, SamplingConfig(temperature=temperature, max_tokens=64))
    return [
        [r.finish == "end" and r.text.rsplit("\n", 1)[-1] == row["answer"] for r in group.rollouts]
        for group, row in zip(groups, rows, strict=True)
    ]


def _share(right: Sequence[bool]) -> float:
    return round(sum(right) / len(right), 4)


def write_problems(folder: Path, settings: Settings) -> None:
    """problems.jsonl to train on and held_out.jsonl, which no corpus holds."""
    for name, count, held_out in (
        ("problems", settings.train_problems, False),
        ("held_out", settings.held_out_problems, True),
    ):
        rows = text.problems(settings.seed, count, held_out)
        write_text(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def command(console: Any, output: Path | None, seed: int, steps: int | None) -> None:
    """`posttrain lab`. Without a folder the cache's is made, which `lab:SEED` names, unless it is there already."""
    if output is None and steps is not None:
        raise ModelError("--steps makes another model than lab:SEED names: give it a folder with --output")
    folder = output or lab_folder(seed)
    settings = Settings(seed=seed) if steps is None else Settings(seed=seed, steps=steps)
    found = folder / "lab.json"
    result = json.loads(found.read_text()) if output is None and found.exists() else make(settings, folder)
    console.print(
        f"{folder}: {result['parameters']:,} parameters, {result['seconds']:.0f} s. Right on {result['measured']} "
        f"held-out sums: {result['greedy']:.1%} greedy, {result['sampled']:.1%} sampled; careful answers "
        f"{result['greedy_by_style']['careful']:.1%}.",
        soft_wrap=True,
    )
    name = f"lab:{seed}" if output is None else str(folder)
    console.print(f"model.source={name}; problems.jsonl and held_out.jsonl are in the folder", soft_wrap=True)
