"""The data and the vision tower of the recipe `vision`, made of a few pictures and of random weights."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from posttrain.recipe.parsing import load_recipe
from tests.vision import picture

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "data"
sys.path.insert(0, str(EXAMPLES))

import stamps  # noqa: E402
import vision_tower  # noqa: E402

THINGS = {
    "animals/cats": ["lion", "lion-2", "tiger", "lynx", "puma", "cat", "ocelot", "manul"],
    "food/fruit": ["apple_red", "apple_green", "pear", "plum", "fig", "date", "kiwi", "lime"],
    "vehicles": ["car", "bus", "tram", "van", "jeep", "truck", "bike", "boat"],
    "seasonal": ["bell", "gift", "tree", "star"],
    "symbols": ["a"],
}


def write_stamps(root: Path) -> None:
    """Write pictures with captions in three languages; a tree that is a mirrored bell; one without a caption."""
    for number, (folder, names) in enumerate(THINGS.items()):
        (root / folder).mkdir(parents=True)
        for i, name in enumerate(names):
            image = picture(100 * number + (0 if name == "tree" else i), 8, 6).resize((80, 60), 0)
            (image.transpose(0) if name == "tree" else image).save(root / folder / f"{name}.png")
            word = name.split("-")[0].split("_")[0]
            text = f"A {word}.\nde.utf8=Ein {word.title()}.\nfr.utf8=Un {word}.\nes.utf8=\n"
            (root / folder / f"{name}.txt").write_text("" if name == "gift" else text)


def test_questions_have_no_answer_without_the_picture(tmp_path: Path) -> None:
    write_stamps(tmp_path / "stamps")
    made, dropped = stamps.read_stamps(tmp_path / "stamps", tmp_path / "data" / "pictures")
    assert len(made) == 27 and dropped == {"in symbols": 1, "without a caption": 1}
    stamps.group_variants(made)
    groups = {s.path.split("/")[-1][:-4]: s.group for s in made}
    assert groups["lion"] == groups["lion-2"] and groups["apple_red"] == groups["apple_green"]
    assert groups["bell"] == groups["tree"] and len(set(groups.values())) == 24
    trained, held_out = stamps.split(made)
    assert {s.group for s in trained}.isdisjoint(s.group for s in held_out) and len(trained) + len(held_out) == 27
    assert {s.kind for s in held_out} >= {"an animal", "food", "a vehicle"} and 4 <= len(held_out) <= 9

    counts = stamps.write_rows(made, tmp_path / "data")
    rows = {n: [json.loads(x) for x in (tmp_path / "data" / f"{n}.jsonl").read_text().splitlines()] for n in counts}
    assert {n: len(r) for n, r in rows.items()} == counts and all(counts.values())
    shown = {part: {r["image"] for r in rows[f"{part}captions"]} for part in ("train_", "held_out/", "wrong_picture/")}
    assert shown["held_out/"] == shown["wrong_picture/"] and len(shown["train_"]) == len(trained)
    for name, some in rows.items():
        folder = (tmp_path / "data" / name).parent
        assert all((folder / r["image"]).is_file() for r in some)
        if name.startswith(("train", "wrong")) or name.endswith("captions"):
            continue
        told = Counter((r["prompt"], r["completion"], str(r["choices"])) for r in some)
        if name.endswith(("is_it", "is_kind")):  # each question is answered by yes as often as by no
            assert all(told[p, "yes", c] == told[p, "no", c] for p, _, c in told)
        elif not name.endswith("kinds"):  # each choice is right once
            assert all(r["completion"] in r["choices"] and len(set(r["choices"])) == 4 for r in some)
            assert set(Counter((r["prompt"], choice) for r in some for choice in r["choices"]).values()) == {4}
        wrong = rows[name.replace("held_out", "wrong_picture")]
        assert [r["prompt"] for r in some] == [r["prompt"] for r in wrong]
        assert all(a["image"] != b["image"] for a, b in zip(some, wrong, strict=True))
    named = {source.split("/", 2)[2] for source in sources() if source.startswith("data/stamps/")}
    assert named <= {f"{name}.jsonl" for name in counts}


def sources() -> list[str]:
    """Return the sources of data that the recipes name."""
    recipe, rl = load_recipe("vision"), load_recipe("vision_grpo")
    parts = (*recipe.stages, *recipe.evaluate, *rl.evaluate, rl.stages[0].problems, rl.stages[0].held_out.problems)
    return [part.data.source for part in parts]


def test_without_apt_the_command_says_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert stamps.main([str(tmp_path / "data")]) == 1
    assert "there is no program apt-get here" in capsys.readouterr().err
    assert vision_tower.main([str(tmp_path / "tower"), "--size", "100"]) == 1
    assert "a multiple of 32 is needed" in capsys.readouterr().err


def lite_weights(seed: int) -> dict[str, Tensor]:
    """Return random weights with the names and shapes of the package."""
    random = torch.Generator().manual_seed(seed)
    out: dict[str, Tensor] = {}

    def layer(conv: str, norm: str, inside: int, outside: int, kernel: int = 1, groups: int = 1) -> None:
        shape = (outside, inside // groups, kernel, kernel)
        out[f"{conv}.weight"] = torch.randn(shape, generator=random) * (inside // groups * kernel**2) ** -0.5
        for name, value in (("weight", 1.0), ("bias", 0.1), ("running_mean", 0.0), ("running_var", 1.0)):
            out[f"{norm}.{name}"] = value + 0.05 * torch.rand(outside, generator=random)
        out[f"{norm}.num_batches_tracked"] = torch.tensor(1)

    layer("_conv_stem", "_bn0", 3, 32, 3)
    for number, (inside, outside, expand, kernel, _) in enumerate(lite_blocks()):
        prefix, wide = f"_blocks.{number}.", inside * expand
        if expand > 1:
            layer(f"{prefix}_expand_conv", f"{prefix}_bn0", inside, wide)
        layer(f"{prefix}_depthwise_conv", f"{prefix}_bn1", wide, wide, kernel, wide)
        layer(f"{prefix}_project_conv", f"{prefix}_bn2", wide, outside)
    layer("_conv_head", "_bn1", 320, 1280)
    out |= {"_fc.weight": torch.zeros(1000, 1280), "_fc.bias": torch.zeros(1000)}
    return out


def lite_blocks() -> list[tuple[int, int, int, int, int]]:
    """Return channels in and out, expansion, kernel and stride of each block of EfficientNet-B0 (arXiv 1905.11946)."""
    stages = [(1, 16, 1, 3, 1), (2, 24, 6, 3, 2), (2, 40, 6, 5, 2), (3, 80, 6, 3, 2)]
    stages += [(3, 112, 6, 5, 1), (4, 192, 6, 5, 2), (1, 320, 6, 3, 1)]
    out, inside = [], 32
    for repeats, outside, expand, kernel, stride in stages:
        for i in range(repeats):
            out.append((inside, outside, expand, kernel, stride if i == 0 else 1))
            inside = outside
    return out


def lite_map(weights: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """Compute the last map as the lite variant is defined: no gates, ReLU6, TensorFlow's `same` padding."""

    def layer(x: Tensor, conv: str, norm: str, stride: int = 1, act: bool = True) -> Tensor:
        kernel = weights[f"{conv}.weight"]
        side, k = x.shape[-1], kernel.shape[-1]
        pad = max((-(-side // stride) - 1) * stride + k - side, 0)
        x = F.pad(x, (pad // 2, pad - pad // 2) * 2)
        x = F.conv2d(x, kernel, stride=stride, groups=x.shape[1] // kernel.shape[1])
        mean, variance, scale, bias = (
            weights[f"{norm}.{n}"][:, None, None] for n in ("running_mean", "running_var", "weight", "bias")
        )
        x = (x - mean) / (variance + 1e-3).sqrt() * scale + bias
        return x.clamp(0, 6) if act else x

    x = layer(pixels, "_conv_stem", "_bn0", 2)
    for number, (inside, outside, expand, _, stride) in enumerate(lite_blocks()):
        prefix, before = f"_blocks.{number}.", x
        if expand > 1:
            x = layer(x, f"{prefix}_expand_conv", f"{prefix}_bn0")
        x = layer(x, f"{prefix}_depthwise_conv", f"{prefix}_bn1", stride)
        x = layer(x, f"{prefix}_project_conv", f"{prefix}_bn2", act=False)
        if stride == 1 and inside == outside:
            x = x + before
    return layer(x, "_conv_head", "_bn1")


def test_the_tower_computes_what_the_lite_variant_does(tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, AutoModel

    weights = lite_weights(0)
    assert vision_tower.write_tower(weights, tmp_path, 64) == 4
    tower = AutoModel.from_pretrained(tmp_path).eval()
    pixels = AutoImageProcessor.from_pretrained(tmp_path)(picture(1), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 64, 64) and float(pixels.max()) <= 2.7 and float(pixels.min()) >= -2.2
    with torch.no_grad():
        theirs, expected = tower(pixels).last_hidden_state, lite_map(weights, pixels)
    assert expected.shape == (1, 1280, 2, 2) and float(expected.std()) > 0.1
    torch.testing.assert_close(theirs, expected, rtol=1e-4, atol=1e-4)
