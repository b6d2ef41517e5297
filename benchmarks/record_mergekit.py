"""Record what mergekit makes of fixed tensors, for tests/methods/merge/test_recorded_mergekit.py to compare with.

    python -m venv other && other/bin/pip install mergekit      # LGPL: used from outside, in an environment of its own
    other/bin/python benchmarks/record_mergekit.py              # writes tests/methods/merge/recorded_mergekit.json

Four tiny Llama models (a base and three others near it) are written to a folder and merged by mergekit with one
configuration after the other. Recorded are a matrix and a vector of the sources and of each result. Random masks are
recorded as mergekit draws them (`torch.bernoulli`, with the probabilities that it was given), in its order.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {"vocab_size": 12, "hidden_size": 8, "intermediate_size": 10, "num_hidden_layers": 1, "num_attention_heads": 2}
MATRIX, VECTOR = "model.layers.0.mlp.down_proj.weight", "model.layers.0.input_layernorm.weight"
OUTPUT = Path(__file__).parents[1] / "tests" / "methods" / "merge" / "recorded_mergekit.json"
SHAPE = (8, 10)
"""Of the matrix, in which it alone has these sizes."""
WEIGHTS = [0.6, 0.3, 0.5]
NEGATIVE = [0.6, -0.3, 0.5]


def cases() -> dict[str, dict[str, Any]]:
    """Return configurations by name: method, parameters of all, and of each model."""
    weighted: dict[str, Any] = {"weight": WEIGHTS}
    sparse = {**weighted, "density": [0.5, 0.7, 0.35]}
    return {
        "linear": {"method": "linear", **weighted},
        "linear, not normalised": {"method": "linear", "normalize": False, **weighted},
        "slerp": {"method": "slerp", "t": 0.3, "models": [0, 1]},
        "multislerp": {"method": "multislerp", **weighted},
        "karcher": {"method": "karcher", "max_iter": 200, "tol": 1e-9},
        "task_arithmetic": {"method": "task_arithmetic", **weighted, "lambda": 0.8},
        "task_arithmetic, normalised": {"method": "task_arithmetic", "normalize": True, **weighted},
        "ties": {"method": "ties", **sparse},
        "ties, not normalised": {"method": "ties", "normalize": False, **sparse, "lambda": 0.8},
        "ties, negative weight": {"method": "ties", "weight": NEGATIVE, "density": [0.5, 0.7, 0.35]},
        "breadcrumbs": {"method": "breadcrumbs", "gamma": 0.1, **sparse},
        "breadcrumbs_ties": {"method": "breadcrumbs_ties", "gamma": 0.1, **sparse},
        "dare_linear": {"method": "dare_linear", **sparse},
        "dare_linear, not rescaled": {"method": "dare_linear", "rescale": False, **sparse},
        "dare_ties": {"method": "dare_ties", **sparse},
        "dare_ties, normalised": {"method": "dare_ties", "normalize": True, **sparse},
        "della_linear": {"method": "della_linear", "epsilon": 0.2, **sparse},
        "della": {"method": "della", "epsilon": 0.2, **sparse},
        "model_stock": {"method": "model_stock"},
        "model_stock, rows": {"method": "model_stock", "filter_wise": True},
    }


def write_models(folder: Path) -> list[str]:
    """Write the base and three models near it; return their folders."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SIZES)).float()
    for parameter in base.parameters():
        parameter.data = (torch.randn_like(parameter) * 0.5).mul(1000).round().div(1000)
    paths = []
    for number in range(4):
        model = LlamaForCausalLM(base.config).float()
        model.load_state_dict(base.state_dict())
        for parameter in model.parameters() if number else ():
            parameter.data += (torch.randn_like(parameter) * 0.3).mul(1000).round().div(1000)
        model.save_pretrained(folder / str(number))
        paths.append(str(folder / str(number)))
    return paths


def configuration(case: dict[str, Any], paths: list[str]) -> MergeConfiguration:
    """Return mergekit's form of a case."""
    method = case["method"]
    of_models = {k: case[k] for k in ("weight", "density") if k in case}
    numbers = case.get("models", [0, 1, 2])
    models = [{"model": paths[n + 1], "parameters": {k: values[n] for k, values in of_models.items()}} for n in numbers]
    based = method not in ("linear", "slerp", "karcher", "multislerp")
    value: dict[str, Any] = {"merge_method": method, "models": models, "dtype": "float32", "parameters": {}}
    if method == "slerp":
        value["base_model"] = paths[1]
    elif based:
        value["base_model"] = paths[0]
        value["models"] = models
    value["parameters"] = {k: v for k, v in case.items() if k not in ("method", "models", "weight", "density")}
    return MergeConfiguration.model_validate(value)


def tensors(folder: str) -> dict[str, list[Any]]:
    """Return the recorded tensors of a model as lists."""
    state = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    return {name: state[name].tolist() for name in (MATRIX, VECTOR)}


class Draws:
    """Record the masks that are drawn, with their probabilities."""

    def __init__(self) -> None:
        self.drawn: list[dict[str, Any]] = []
        self.original = torch.bernoulli

    def __call__(self, probabilities: torch.Tensor, *args: Any, **named: Any) -> torch.Tensor:
        mask = self.original(probabilities, *args, **named)
        self.drawn.append({"probabilities": probabilities.tolist(), "mask": mask.int().tolist()})
        return mask


def main() -> None:
    """Record all cases."""
    draws = Draws()
    torch.bernoulli = draws  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as scratch:
        paths = write_models(Path(scratch))
        recorded: dict[str, Any] = {"sources": [tensors(path) for path in paths], "cases": {}}
        for name, case in cases().items():
            out, draws.drawn = Path(scratch) / "merged", []
            torch.manual_seed(1)
            run_merge(configuration(case, paths), str(out), MergeOptions(copy_tokenizer=False, quiet=True))
            # The masks of the matrix, one a model, in their order: no other tensor has its shape.
            masks = [d for d in draws.drawn if torch.tensor(d["mask"]).shape == SHAPE]
            recorded["cases"][name] = {**case, "result": tensors(str(out)), "draws": masks}
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(json.dumps(recorded) + "\n", encoding="utf-8")
    print(f"{len(recorded['cases'])} cases in {OUTPUT} ({OUTPUT.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
