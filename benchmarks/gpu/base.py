"""What the items of `make gpu` share: where they run, how they account for comparisons, models, tokenizer, rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.core.types import Sample
from posttrain.models.tiny_model import CHATML, SPECIAL

SMOL = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152}  # fmt: skip
"""The shape of SmolLM2-135M."""
SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 2048}  # fmt: skip
"""Large enough for real kernels, small enough to take no time."""
DRY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
       "num_key_value_heads": 2, "vocab_size": 512}  # fmt: skip


@dataclass(frozen=True)
class Where:
    """What an item is told: the device, a folder that all share, and whether sizes are to be tiny (`--dry`)."""

    device: torch.device
    folder: Path
    dry: bool

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def pick(self, real: Any, dry: Any) -> Any:
        """One of the two, as it is a dry run or not."""
        return dry if self.dry else real

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.cuda:
            torch.cuda.synchronize()

    def peak_mib(self) -> float | None:
        """Highest memory that was allocated on the GPU; None: there is none."""
        return round(torch.cuda.max_memory_allocated() / 2**20, 1) if self.cuda else None


@dataclass
class Account:
    """What an item found: numbers, comparisons, and which of these failed."""

    numbers: dict[str, Any] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    note: str = ""

    def at_most(self, name: str, value: float, bound: float) -> None:
        """Keep a number that must not be larger than the bound, nor be not-a-number."""
        self.numbers[name] = float(f"{value:.3g}")
        if not value <= bound:
            self.failed.append(f"{name}: {value:.3g}, and at most {bound:g} is right")

    def true(self, name: str, value: bool, said: str = "") -> None:
        """Keep a yes or no that must be yes."""
        self.numbers[name] = bool(value)
        if not value:
            self.failed.append(f"{name}: no. {said}".rstrip())

    def attempt(self, name: str, error: BaseException) -> None:
        """Keep what a case died of, so that the others can go on."""
        lines = str(error).strip().splitlines()
        self.failed.append(f"{name}: {type(error).__name__}: {lines[0] if lines else ''}"[:400])


def apart(found: Tensor, expected: Tensor) -> float:
    """Largest difference, as a part of the largest expected value."""
    scale = float(expected.detach().abs().max().clamp_min(1e-30))
    return float((found.detach().double() - expected.detach().double()).abs().max()) / scale


def random_samples(count: int, shortest: int, longest: int, vocabulary: int, seed: int = 0) -> list[Sample]:
    """Random tokens; the second half of each carries loss."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(count):
        n = int(torch.randint(shortest, longest + 1, (1,), generator=generator))
        tokens = torch.randint(3, vocabulary, (n,), generator=generator).tolist()
        samples.append(Sample(tokens, [0.0] * (n - n // 2) + [1.0] * (n // 2)))
    return samples


def family(vocabulary: int, scale: int = 1, seed: int = 0) -> list[Sample]:
    """Samples with common beginnings on two levels, one that is the beginning of others, and two strangers."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> list[int]:
        return torch.randint(3, vocabulary, (n * scale,), generator=generator).tolist()  # type: ignore[no-any-return]

    root = draw(20)
    child = root + draw(18)
    rows = [root + draw(5), root + draw(9), root, child + draw(3), child + draw(7), draw(30), draw(2)]
    return [Sample(r, [0.0] + [1.0] * (len(r) - 1)) for r in rows]


def build(
    shape: dict[str, int], dtype: torch.dtype, device: torch.device, kind: str = "llama", on_device: bool = False,
    **more: Any,
) -> Any:  # fmt: skip
    """A causal language model of transformers with random weights, the same on every device.

    on_device: draw them on the device, where large models take no time; then they depend on it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {"max_position_embeddings": 8192, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 2,
                "pad_token_id": 0, **shape, **more}  # fmt: skip
    with torch.random.fork_rng(devices=[]), device if on_device else torch.device("cpu"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings), dtype=torch.float32)
    model.set_attn_implementation("eager")
    return model.to(device=device, dtype=dtype)


def byte_tokenizer(size: int) -> Any:
    """Bytes and three special tokens, and as many words that no text holds as fill the vocabulary; ChatML's template.

    size: tokens in all, so that every id that a model with random weights may draw is one.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet())
    known += [f"filler{i}" for i in range(size - len(known))]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(known)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )


def saved(folder: Path, shape: dict[str, int], kind: str = "llama", device: torch.device | None = None) -> Path:
    """A model of this shape with its tokenizer, in Hugging Face's layout; made where it is not there yet.

    device: where weights are drawn; on a GPU they are saved in bfloat16. None: the CPU, the same weights everywhere.
    """
    if not (folder / "config.json").exists():
        device = device or torch.device("cpu")
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        build(shape, dtype, device, kind, on_device=True).save_pretrained(folder)
        byte_tokenizer(shape["vocab_size"]).save_pretrained(folder)
    return folder


def smol(where: Where) -> Path:
    """The folder of the model that recipes train: the shape of SmolLM2-135M."""
    return saved(where.folder / "smol", where.pick(SMOL, DRY))


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """A file with one row a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
