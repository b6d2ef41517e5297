"""Merges of adapters among themselves, and adapters out of differences."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from posttrain.config import ModelConfig
from posttrain.core.errors import ModelError
from posttrain.methods.merge.low_rank import nearest_of_rank, nearest_of_sum, sum_of_products
from posttrain.methods.merge.merge import Merge
from posttrain.methods.merge.merge_settings import MergeConfig
from posttrain.models.loading import load_model
from posttrain.models.tiny_model import tiny_model, tiny_tokenizer
from posttrain.trainer.stage import StageContext


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a base, a model with other weights in everything, and three adapters of other ranks and modules."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("base", "tuned"):
        hf = tiny_model("llama")
        generator = torch.Generator().manual_seed(1)
        for parameter in hf.parameters() if name == "tuned" else ():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        hf.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    for seed, (rank, targets) in enumerate([(2, ["q_proj", "up_proj"]), (3, ["q_proj", "down_proj"]), (1, ["v_proj"])]):
        hf = AutoModelForCausalLM.from_pretrained(folder / "base")
        peft = get_peft_model(hf, LoraConfig(r=rank, lora_alpha=4, target_modules=targets))
        torch.manual_seed(seed)
        for name, parameter in peft.named_parameters():
            parameter.data = torch.randn_like(parameter) if "lora_B" in name else parameter.data
        peft.save_pretrained(folder / f"adapter{seed}")
    return folder


def merge(models: Path, folder: Path, names: dict[str, float], **settings: Any) -> dict[str, Any]:
    given = [{"source": str(models / name), "weight": weight} for name, weight in names.items()]
    config = MergeConfig.model_validate({"models": given, **settings})
    folder.mkdir(exist_ok=True)
    run = Merge(config, StageContext(None, None)).run
    return run(ModelConfig(source=str(models / "base"), device="cpu"), folder, 0)


def with_peft(models: Path, folder: Path) -> dict[str, torch.Tensor]:
    base = AutoModelForCausalLM.from_pretrained(models / "base")
    return PeftModel.from_pretrained(base, folder / "model").merge_and_unload().state_dict()


@cache
def whole(models: Path, name: str) -> dict[str, torch.Tensor]:
    if name in ("base", "tuned"):
        return AutoModelForCausalLM.from_pretrained(models / name).state_dict()
    base = AutoModelForCausalLM.from_pretrained(models / "base")
    return PeftModel.from_pretrained(base, models / name).merge_and_unload().state_dict()


def largest_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name] - value).abs().max()) for name, value in expected.items())


def test_adapters_are_added_exactly(models: Path, tmp_path: Path) -> None:
    names = {"adapter0": 0.5, "adapter1": -1.5}
    entry = merge(models, tmp_path, names, algorithm="task_arithmetic", adapter={})
    base = whole(models, "base")
    sides = [whole(models, name) for name in names]
    expected = {n: v + 0.5 * (sides[0][n] - v) - 1.5 * (sides[1][n] - v) for n, v in base.items()}
    assert largest_difference(with_peft(models, tmp_path), expected) < 1e-5
    hf, _ = load_model(ModelConfig(source=str(tmp_path / "model"), device="cpu"))
    assert largest_difference(hf.state_dict(), expected) < 1e-5
    settings = json.loads((tmp_path / "model" / "adapter_config.json").read_text())
    ranks = {settings["r"], *settings["rank_pattern"].values()}
    assert ranks == {2, 3, 5} and entry["made"] | {"matrices": 6, "largest rank": 5} == entry["made"]
    assert entry["made"]["relative error of the change"] == 0
    shares = {"adapter0": 0.3, "adapter1": 0.7, "adapter2": -0.65}
    mean = merge(models, tmp_path / "mean", shares, algorithm="linear", adapter={})
    sides.append(whole(models, "adapter2"))
    expected = {n: (0.3 * sides[0][n] + 0.7 * sides[1][n] - 0.65 * sides[2][n]) / 0.35 for n in base}
    assert largest_difference(with_peft(models, tmp_path / "mean"), expected) < 1e-5 and mean["parameters"] > 0
    assert "tensors saved whole" not in mean["made"]  # rounding is no change


def test_a_sum_of_adapters_at_a_lower_rank(models: Path, tmp_path: Path) -> None:
    entry = merge(models, tmp_path, {"adapter0": 1, "adapter1": 1}, algorithm="task_arithmetic", adapter={"rank": 2})
    base, sides = whole(models, "base"), [whole(models, f"adapter{i}") for i in range(2)]
    found, missed, size = with_peft(models, tmp_path), 0.0, 0.0
    for name, value in base.items():
        change = sides[0][name] + sides[1][name] - 2 * value
        singular = torch.linalg.svdvals(change).square() if change.ndim == 2 else torch.zeros(3)
        size += float(singular.sum())
        missed += float(singular[2:].sum())
        assert float((found[name] - value - change).square().sum()) == pytest.approx(
            float(singular[2:].sum()), abs=1e-4
        )
    assert entry["made"]["relative error of the change"] == pytest.approx((missed / size) ** 0.5, rel=1e-3)
    assert 0 < missed


@pytest.mark.parametrize("rank", [64, 4])
def test_an_adapter_is_extracted_from_a_difference(rank: int, models: Path, tmp_path: Path) -> None:
    entry = merge(models, tmp_path, {"tuned": 1}, algorithm="linear", adapter={"rank": rank})
    tuned, base, found = whole(models, "tuned"), whole(models, "base"), with_peft(models, tmp_path)
    if rank == 64:  # every rank: norms and embeddings are saved whole
        assert largest_difference(found, tuned) < 1e-5 and entry["made"]["relative error of the change"] < 1e-3
        hf, _ = load_model(ModelConfig(source=str(tmp_path / "model"), device="cpu"))
        assert largest_difference(hf.state_dict(), tuned) < 1e-5
        return
    name = "model.layers.0.mlp.up_proj.weight"
    u, s, v = torch.linalg.svd(tuned[name] - base[name])
    torch.testing.assert_close(found[name] - base[name], (u[:, :4] * s[:4]) @ v[:4], atol=1e-5, rtol=0)
    dropped = merge(models, tmp_path / "d", {"tuned": 1}, algorithm="linear", adapter={"rank": 4, "others": "drop"})
    torch.testing.assert_close(with_peft(models, tmp_path / "d")["model.norm.weight"], base["model.norm.weight"])
    assert dropped["made"]["changed tensors left out"] == entry["made"]["tensors saved whole"] == 6


def test_what_can_not_be_an_adapter_is_refused(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="adapter.rank is needed"):
        merge(models, tmp_path, {"adapter0": 1, "adapter1": 1}, algorithm="ties", adapter={})
    with pytest.raises(ModelError, match="adapter.rank is needed"):
        merge(models, tmp_path, {"tuned": 1}, algorithm="task_arithmetic", adapter={})
    # With other ids the rows of the head change too, which no sum of adapters has.
    content = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    ids = content["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    other = tiny_tokenizer()
    other._tokenizer = Tokenizer.from_str(json.dumps(content))
    shutil.copytree(models / "adapter0", tmp_path / "adapter")
    other.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match="adapter.rank is needed"):
        names = {str(tmp_path / "adapter"): 1.0}
        merge(models, tmp_path, names, algorithm="task_arithmetic", adapter={}, tokenizer="base")
    with pytest.raises(ModelError, match="changes no matrix"):
        merge(models, tmp_path, {"base": 1}, algorithm="linear", adapter={"rank": 2})


def test_products_by_hand() -> None:
    b, a = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 0.0]])
    left, right = sum_of_products([(2.0, b, a), (-1.0, b, a)])
    assert left.shape == (2, 2) and right.shape == (2, 2)
    torch.testing.assert_close(left @ right, b @ a)
    matrix = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    left, right, missed = nearest_of_rank(matrix, 2)
    torch.testing.assert_close(left @ right, torch.diag(torch.tensor([3.0, 2.0, 0.0])))
    assert missed == pytest.approx(1.0) and left.shape == (3, 2)
    assert nearest_of_rank(matrix[:, :1] @ matrix[:1], 3)[0].shape == (3, 1)  # no factors for rounding errors
    terms = [(1.5, torch.randn(6, 2), torch.randn(2, 5)), (-0.5, torch.randn(6, 2), torch.randn(2, 5))]
    left, right, missed = nearest_of_sum(terms, 2)
    dense = sum(c * (b @ a) for c, b, a in terms)
    other, wide, expected = nearest_of_rank(dense, 2)
    torch.testing.assert_close(left @ right, other @ wide, atol=1e-5, rtol=0)
    assert missed == pytest.approx(expected, rel=1e-3)
