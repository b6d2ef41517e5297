"""Tell the memory of fine-tuning published models, by their published sizes alone, and write it into docs/families.md.

    python tools/family_table.py [--write docs/families.md]

A model is made of its configuration on the device `meta`, without weights; its number of parameters has to be the
published one to 1%. The memory planner does the rest, for rows of 2,000 tokens, one at a time, layers recomputed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs" / "families.md"
CARDS = (8, 24, 80)
ROW_TOKENS = 2000
WAYS = ("QLoRA", "LoRA", "every weight")
BEGIN, END = "<!-- made by tools/family_table.py -->\n", "<!-- end -->"


@dataclass(frozen=True)
class Published:
    """Hold a published model: its type in transformers, billions of parameters as published, and its sizes.

    A Gemma 3 that reads images is counted by its language model alone.
    """

    kind: str
    billions: float
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool = False
    num_local_experts: int | None = None


MODELS = {
    "Qwen2.5-0.5B": Published("qwen2", 0.494, 896, 24, 14, 2, 64, 4864, 151936, True),
    "Qwen2.5-7B": Published("qwen2", 7.616, 3584, 28, 28, 4, 128, 18944, 152064),
    "Qwen3-0.6B": Published("qwen3", 0.596, 1024, 28, 16, 8, 128, 3072, 151936, True),
    "Qwen3-4B": Published("qwen3", 4.022, 2560, 36, 32, 8, 128, 9728, 151936, True),
    "Qwen3-8B": Published("qwen3", 8.191, 4096, 36, 32, 8, 128, 12288, 151936),
    "Llama-3.2-1B": Published("llama", 1.236, 2048, 16, 32, 8, 64, 8192, 128256, True),
    "Llama-3.2-3B": Published("llama", 3.213, 3072, 28, 24, 8, 128, 8192, 128256, True),
    "Llama-3.1-8B": Published("llama", 8.030, 4096, 32, 32, 8, 128, 14336, 128256),
    "gemma-3-1b": Published("gemma3_text", 1.000, 1152, 26, 4, 1, 256, 6912, 262144, True),
    "gemma-3-4b": Published("gemma3_text", 3.880, 2560, 34, 8, 4, 256, 10240, 262208, True),
    "Mistral-7B-v0.3": Published("mistral", 7.248, 4096, 32, 32, 8, 128, 14336, 32768),
    "Phi-4-mini": Published("phi3", 3.836, 3072, 32, 24, 8, 128, 8192, 200064, True),
    "phi-4": Published("phi3", 14.66, 5120, 40, 40, 10, 128, 17920, 100352),
    "SmolLM3-3B": Published("smollm3", 3.075, 2048, 36, 16, 4, 128, 11008, 128256, True),
    "gpt-oss-20b": Published("gpt_oss", 20.91, 2880, 24, 64, 8, 64, 2880, 201088, False, 32),
}


@dataclass(frozen=True)
class Measured:
    """Hold the parameters of a model, and bytes at the peak by way of training."""

    parameters: int
    peaks: dict[str, int]

    def cells(self, name: str) -> str:
        """Return the row of the table."""
        numbers = [f"{self.peaks[way] / 1e9:.1f}" for way in WAYS]
        return f"| {' | '.join([name, f'{self.parameters / 1e9:.2f}', *numbers, *map(self.best, CARDS)])} |"

    def best(self, gib: int) -> str:
        """Return the last of `WAYS` that a card holds."""
        fits = [way for way in WAYS if self.peaks[way] <= gib * 2**30]
        return fits[-1] if fits else "–"


def measure(published: Published) -> Measured:
    """Plan the memory of a model of these sizes.

    Raises:
        ValueError: It does not have the published number of parameters.
    """
    from transformers import CONFIG_MAPPING

    from posttrain.config import Recipe
    from posttrain.models.tiny_model import tiny_tokenizer
    from posttrain.runs.memory_plan import plan_memory, read_stages

    sizes = {n: v for n, v in vars(published).items() if n not in ("kind", "billions") and v is not None}
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        CONFIG_MAPPING[published.kind](**sizes).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        rows = folder / "rows.jsonl"
        rows.write_text(f"{json.dumps({'prompt': 'a' * 1000, 'completion': 'b' * (ROW_TOKENS - 1001)})}\n" * 2)

        def recipe(quantization: str | None = None, **settings: Any) -> Recipe:
            systems = {"tokens_per_micro_batch": ROW_TOKENS, "activation_checkpointing": True}
            data = {"source": str(rows), "chat": False}
            stage = {"method": "sft", "name": "sft", "data": data, "systems": systems, **settings}
            model = {"source": text, "quantization": quantization}
            return Recipe.model_validate({"name": "plan", "model": model, "stages": [stage]})

        whole = recipe()
        stages = read_stages(whole, ROW_TOKENS)
        full = plan_memory(whole, CARDS[-1], stages)
        lora = plan_memory(recipe(adapter={"r": 16}), CARDS[-1], stages)
        qlora = plan_memory(recipe("nf4", adapter={"r": 16}, merge=False), CARDS[-1], stages)
    found = full.shape.parameters
    if abs(found / 1e9 / published.billions - 1) > 0.01:
        raise ValueError(f"{published} has {found / 1e9:.3f} billion parameters")
    peaks = {way: plan.training[0].peak for way, plan in zip(WAYS, (qlora, lora, full), strict=True)}
    return Measured(found, peaks)


def table() -> str:
    """Return the table of all models."""
    names = ["model", "parameters, 10⁹", *(f"{way}, GB" for way in WAYS), *(f"{card} GB card" for card in CARDS)]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    return "\n".join([*lines, *(measure(published).cells(name) for name, published in MODELS.items())]) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, or write it into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path)
    target = parser.parse_args(arguments).write
    made = table()
    if target is None:
        print(made, end="")
        return
    before, _, rest = target.read_text(encoding="utf-8").partition(BEGIN)
    target.write_text(before + BEGIN + made + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
