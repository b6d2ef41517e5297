"""Integers of rounding to nearest and GPTQ beside those of llm-compressor, on the layers of a tiny Llama.

    pip install --no-deps llmcompressor==0.14.0.1 compressed-tensors==0.19.0 loguru==0.7.3   # in another environment
    python benchmarks/quantized_weights.py --json benchmarks/results/quantized-weights.json

Both are given the same weights and the same inputs. Without act_order GPTQ differs on purpose: posttrain takes the
scale of a group from its columns when it is reached, llm-compressor from the weight before. The last line is
`equal_rtn= equal_gptq=`: the least share of equal integers.
"""

from __future__ import annotations

import argparse
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from torch import Tensor

from posttrain.core.files import write_json
from posttrain.methods.compress.gptq import gptq, output_error
from posttrain.models.quantization_grid import Grid, round_to_nearest
from posttrain.models.tiny_model import tiny_model

LAYERS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
GROUP = 32


def parameters(weight: Tensor, bits: int, symmetric: bool, group: int | None, order: str | None = None) -> Any:
    """Return llm-compressor's settings, scales and zeros of a weight."""
    kind = {"strategy": "channel"} if group is None else {"strategy": "group", "group_size": group}
    arguments = QuantizationArgs(num_bits=bits, symmetric=symmetric, actorder=order, **kind)
    grouped = weight.view(len(weight), -1, group or weight.shape[1])
    return arguments, *calculate_qparams(grouped.amin(-1), grouped.amax(-1), arguments)


def rounding(weight: Tensor, bits: int, symmetric: bool, group: int | None) -> dict[str, Any]:
    """Compare rounding to nearest."""
    arguments, scale, zero = parameters(weight, bits, symmetric, group)
    theirs = quantize(weight, scale, zero, arguments, dtype=torch.int8)
    ours = round_to_nearest(weight, Grid(bits, group, symmetric))  # type: ignore[arg-type]
    return {
        "equal": float((theirs == ours.values_O_I).double().mean()),
        "scale_difference": float((scale - ours.scale_O_G).abs().max()),
    }


def by_gptq(weight: Tensor, hessian: Tensor, symmetric: bool, act_order: bool) -> dict[str, Any]:
    """Compare GPTQ in int4."""
    arguments, scale, zero = parameters(weight, 4, symmetric, GROUP, "weight" if act_order else None)
    theirs = quantize_weight(weight[None].clone(), hessian[None].clone(), scale[None], zero[None], None, arguments)[0][
        0
    ]
    ours = gptq(weight, hessian, Grid(4, GROUP, symmetric), 0.01, act_order).dense()
    nearest = round_to_nearest(weight, Grid(4, GROUP, symmetric)).dense()
    errors = zip(("theirs", "ours", "nearest"), (theirs, ours, nearest), strict=True)
    return {
        "equal": float(((theirs - ours).abs() < 1e-6).double().mean()),
        "largest_difference": float((theirs - ours).abs().max()),
        "output_error": {name: output_error(weight, value, hessian) for name, value in errors},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Integers beside llm-compressor's.")
    parser.add_argument("--json", type=Path)
    path = parser.parse_args().json
    generator, model = torch.Generator().manual_seed(0), tiny_model("llama", hidden_size=64, intermediate_size=96)
    out: dict[str, Any] = {"versions": {n: version(n) for n in ("llmcompressor", "compressed-tensors", "torch")}}
    out |= {"rtn": {}, "gptq": {}}
    for name in LAYERS:
        weight = model.model.layers[0].get_submodule(name).weight.detach()
        width = weight.shape[1]
        mix = torch.randn(width, width, generator=generator) / width**0.5 + torch.eye(width)
        x = (torch.randn(400, width, generator=generator) @ mix) * torch.exp(torch.randn(width, generator=generator))
        for symmetric in (True, False):
            words = "symmetric" if symmetric else "with zeros"
            for bits in (4, 8):
                for group in (GROUP, None):
                    key = f"{name}, int{bits}, {words}, {'one scale a row' if group is None else f'groups of {group}'}"
                    out["rtn"][key] = rounding(weight, bits, symmetric, group)
            for order in (True, False):
                key = f"{name}, int4, {words}, {'act_order' if order else 'in turn'}"
                out["gptq"][key] = by_gptq(weight, 2 * x.t() @ x / len(x), symmetric, order)
    if path:
        write_json(path, out)
    for key, found in {**out["rtn"], **out["gptq"]}.items():
        print(key, found)
    ordered = [found["equal"] for key, found in out["gptq"].items() if key.endswith("act_order")]
    print(f"equal_rtn={min(f['equal'] for f in out['rtn'].values()):.4f} equal_gptq={min(ordered):.4f}")


if __name__ == "__main__":
    main()
