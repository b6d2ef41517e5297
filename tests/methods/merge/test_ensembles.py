"""Ensembles of distributions, held to hand-worked numbers and to full forward passes of the members."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from posttrain.cli.main import app
from posttrain.config import ModelConfig, Recipe, SamplingConfig
from posttrain.config.pooling import check_pool
from posttrain.core.errors import ModelError
from posttrain.core.types import Sample
from posttrain.eval.likelihood_tasks import score
from posttrain.eval.speed import sizes_of
from posttrain.losses import ensemble_logprobs
from posttrain.losses.ensemble_logprobs import pool_logprobs
from posttrain.methods.merge.merge import Merge
from posttrain.methods.merge.merge_settings import MergeConfig
from posttrain.models.ensemble import Ensemble
from posttrain.models.ensemble_files import EnsembleMember, write_ensemble
from posttrain.models.language_model import LanguageModel
from posttrain.models.loading import context_length, load_model, open_model, resolve
from posttrain.models.tiny_model import tiny_model, tiny_tokenizer
from posttrain.models.verification import verify
from posttrain.sampling.engine import LocalSampler
from posttrain.sampling.protocol import Request
from posttrain.trainer.stage import StageContext

P = [[0.5, 0.25, 0.25], [0.9, 0.05, 0.05]]


@pytest.mark.parametrize(
    ("weights", "pool", "confidence", "expected"),
    [
        ([1, 1], "arithmetic", None, [0.7, 0.15, 0.15]),
        ([3, 1], "arithmetic", None, [0.6, 0.2, 0.2]),
        # 0.5 * 0.9 : 0.25 * 0.05 under roots, 0.67082 : 0.11180 twice, divided by their sum of 0.89443
        ([1, 1], "geometric", None, [0.75, 0.125, 0.125]),
        # Logits of the second are added twice and those of the first taken away: 0.81/0.5, 0.0025/0.25 twice
        ([-1, 2], "geometric", None, [1.62 / 1.64, 0.01 / 1.64, 0.01 / 1.64]),
        # Shares of 0.5 and 0.9 in 1.4
        ([1, 1], "arithmetic", "max_probability", [1.06 / 1.4, 0.17 / 1.4, 0.17 / 1.4]),
        # exp(-H) = 0.5^0.5 0.25^0.5 = 0.353553 and 0.9^0.9 0.05^0.1 = 0.674086, doubled first: 0.511954, 0.488046
        ([2, 1], "arithmetic", "entropy", [0.6952184, 0.1523908, 0.1523908]),
    ],
)
def test_pools_worked_by_hand(weights: list[float], pool: str, confidence: str | None, expected: list[float]) -> None:
    found = pool_logprobs(torch.tensor(P).log()[:, None], weights, pool, confidence).exp()
    torch.testing.assert_close(found, torch.tensor([expected]), atol=2e-6, rtol=0)


def test_a_member_that_excludes_a_token() -> None:
    logprobs = torch.tensor([[[0.0, -math.inf]], [[math.log(0.5), math.log(0.5)]]])
    found = pool_logprobs(logprobs, [1, 1], "arithmetic", "entropy").exp()
    torch.testing.assert_close(found, torch.tensor([[5 / 6, 1 / 6]]))
    assert pool_logprobs(logprobs, [1, 1], "geometric").exp().tolist() == [[1.0, 0.0]]
    torch.testing.assert_close(pool_logprobs(logprobs, [0, 1], "geometric"), logprobs[1])


def models() -> list[Any]:
    """Return two types of different widths, one with rows of its head that are no tokens."""
    return [tiny_model("llama", seed=0), tiny_model("qwen3", 262, seed=1, hidden_size=48)]


@cache
def plain() -> list[Any]:
    """Return the same models, computed by transformers alone."""
    return models()


def slow(members: list[Any], tokens: list[int], weights: list[float], pool: str, confidence: str | None) -> Tensor:
    """Compute the distribution of the token after `tokens` in plain loops over probabilities, in float64."""
    rows = []
    for member in members:
        z = member(torch.tensor([tokens])).logits[0, -1, :259].double()
        rows.append((z - z.max()).exp() / (z - z.max()).exp().sum())
    shares = list(weights)
    for i, p in enumerate(rows):
        if confidence == "entropy":
            shares[i] *= math.exp(sum(float(x) * math.log(float(x)) for x in p))
        elif confidence is not None:
            shares[i] *= max(p.tolist())
    shares = [share / sum(shares) for share in shares]
    out = torch.zeros(259, dtype=torch.float64) if pool == "arithmetic" else torch.ones(259, dtype=torch.float64)
    for share, p in zip(shares, rows, strict=True):
        out = out + share * p if pool == "arithmetic" else out * p**share
    return (out / out.sum()).log()


@pytest.mark.parametrize(
    ("weights", "pool", "confidence", "temperature"),
    [
        ([1, 3], "arithmetic", "entropy", 0.5),
        ([1, 1], "geometric", "max_probability", 0.0),
        ([1.5, -0.5], "geometric", None, 2.0),
    ],
)
@torch.no_grad()
def test_sampling_and_likelihood_are_those_of_the_pool(
    weights: list[float], pool: str, confidence: str | None, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ensemble_logprobs, "chunk_rows", lambda vocabulary, device: 3)
    members = plain()
    model = LanguageModel(Ensemble(models(), weights, pool, confidence)).eval()
    assert model.ragged and (pool == "geometric" or verify(model) < 1e-4)
    sampler = LocalSampler(model, tiny_tokenizer())
    requests = [Request([5, 6, 7], 2, 1), Request([9, 8, 7, 6], 2, 2)]
    groups = sampler.sample(requests, SamplingConfig(temperature=temperature, max_tokens=4))
    for request, group in zip(requests, groups, strict=True):
        tokens, rollout = list(request.tokens), group.rollouts[1]
        for token, logprob in zip(rollout.tokens, rollout.logprobs, strict=True):
            expected = slow(members, tokens, weights, pool, confidence)
            if temperature == 0:
                assert token == int(expected.argmax())
            else:
                expected = (expected / temperature).log_softmax(-1)
            assert logprob == pytest.approx(float(expected[token]), abs=2e-5)
            tokens.append(token)
    text = [5, 9, 30, 31, 7, 8]
    (total, count), *_ = score(
        model, [Sample(text, [0.0, 0.0, 1.0, 1.0, 1.0, 1.0]), Sample([5, 9, 4], [0.0, 1.0, 1.0])]
    )
    parts = [float(slow(members, text[:i], weights, pool, confidence)[text[i]]) for i in range(2, 6)]
    assert count == 4 and total == pytest.approx(sum(parts), abs=5e-5)
    targets = model.pack([Sample(text, [0.0] * 6)]).rows[0][1:]
    batch = model.pack([Sample(text, [0.0] * 6)])
    logprobs, entropies = model(batch, targets_N=targets, temperature=2.0, entropy=True)
    last = (slow(members, text[:5], weights, pool, confidence) / 2).log_softmax(-1)
    assert float(logprobs[-1]) == pytest.approx(float(last[8]), abs=2e-5)
    assert float(entropies[-1]) == pytest.approx(-float((last.exp() * last).sum()), abs=2e-5)
    with pytest.raises(ModelError, match="no output head"):
        model(batch, "cross_entropy", targets_N=targets)


@torch.no_grad()
def test_members_that_take_no_ragged_batches() -> None:
    """One sequence at a time: `generate` is the ensemble's own, and gives what the sampler gives for other types."""
    from posttrain.sampling.greedy import _generated, greedy

    members = [tiny_model("llama", seed=0), tiny_model("gemma2", 262, seed=1)]  # which transformers gives no SDPA
    model = LanguageModel(Ensemble(members, [1, 2], confidence="entropy")).eval()
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5]]
    fast = greedy(model, tiny_tokenizer(), prompts, 6)
    model.compute_one_at_a_time()
    assert verify(model) < 1e-4
    assert _generated(model, tiny_tokenizer(), prompts, 6) == fast
    with pytest.warns(UserWarning, match="one at a time"):
        assert not LanguageModel(Ensemble([models()[0], tiny_model("mamba")])).ragged


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ensemble")
    for name, hf in zip("ab", plain(), strict=True):
        hf.save_pretrained(root / name)
        tiny_tokenizer().save_pretrained(root / name)
    config = MergeConfig.model_validate(
        {"ensemble": {"pool": "geometric"}, "models": [{"source": str(root / "b"), "weight": 0.5}, "base"]}
    )
    entry = Merge(config, StageContext(None, None)).run(ModelConfig(source=str(root / "a"), device="cpu"), root, 0)
    assert entry["parameters"] == sum(p.numel() for hf in plain() for p in hf.parameters())
    return root


def test_a_folder_of_an_ensemble_opens_wherever_it_lies(written: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    (written / "model").rename(moved)
    try:
        assert not list(moved.glob("config.json")) and json.loads((moved / "ensemble.json").read_text())["members"] == [
            {"source": "members/0", "revision": None, "weight": 0.5},
            {"source": "members/1", "revision": None, "weight": 1.0},
        ]
        config = ModelConfig(source=str(moved), device="cpu")
        hf, tokenizer = load_model(config, inference=True)
        assert tokenizer.chat_template == tiny_tokenizer().chat_template
        members = plain()[::-1]
        expected = slow(members, [5, 6, 7], [0.5, 1], "geometric", None)
        found = hf(torch.tensor([[5, 6, 7]])).logits[0, -1]
        torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=0)
        sizes = sizes_of(LanguageModel(hf), config)
        assert sizes["disk_bytes"] == sum(f.stat().st_size for f in moved.glob("members/*/*.safetensors"))
        assert context_length(config) == min(m.config.max_position_embeddings for m in members)
        sha = resolve(str(moved)).sha256()
        with pytest.raises(ModelError, match="is an ensemble: .* not trained, merged or exported"):
            open_model(config)
        said = CliRunner().invoke(app, ["chat", str(moved), "--device", "cpu", "-p", "hello", "--max-new-tokens", "3"])
        assert said.exit_code == 0, said.output
        (moved / "ensemble.json").write_text('{"members": [{"source": "members/0", "weight": -1}]}')
        assert resolve(str(moved / "members" / "0")).sha256() != sha
        with pytest.raises(ModelError, match="positive sum"):
            load_model(config, inference=True)
    finally:
        moved.rename(written / "model")


def test_the_copy_of_an_adapter_finds_its_base(tmp_path: Path) -> None:
    base, adapter = tmp_path / "run/stages/0-sft/model", tmp_path / "run/stages/1-sft/model"
    for folder, file, text in (
        (base, "config.json", "{}"),
        (adapter, "adapter_config.json", '{"base_model_name_or_path": "stages/0-sft/model"}'),
    ):
        folder.mkdir(parents=True)
        (folder / file).write_text(text)
    own = "stages/0-sft/model"
    # In a folder outside of the run, in the run, and in the member's own, which is not copied into itself.
    for around, name in ((tmp_path, str(base)), (tmp_path / "run", own), (adapter, own)):
        (ensemble := around / "ensemble").mkdir()
        write_ensemble(ensemble, [(EnsembleMember("x", None, 1.0), adapter)], "arithmetic", None)
        copy = json.loads((ensemble / "members/0/adapter_config.json").read_text())
        assert copy["base_model_name_or_path"] == name
    assert "stages" in (adapter / "adapter_config.json").read_text()[:40]  # the copy alone is changed


def test_what_can_not_be_pooled(written: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    tiny_model("llama", 260).save_pretrained(other)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(other)
    base = ModelConfig(source=str(written / "a"), device="cpu")
    config = MergeConfig.model_validate({"ensemble": {}, "models": ["base", str(other)]})
    with pytest.raises(ModelError, match="differs from the ensemble's: 1 tokens more .'<new>'.*merge weights"):
        Merge(config, StageContext(None, None)).run(base, tmp_path, 0)
    with pytest.raises(ValueError, match="must be finite"):
        check_pool([1.0, float("inf")], "arithmetic", None)
    members = [tiny_model("llama"), tiny_model("llama").to(torch.bfloat16)]
    with pytest.raises(ModelError, match="members of bfloat16 and float32"):
        Ensemble(members)
    for settings, message in (
        ({"algorithm": "linear"}, "set one of algorithm and ensemble"),
        ({"dtype": "float16"}, "writes no weights .* leave dtype out"),
        ({"models": [{"source": "a", "weight": [0, 1]}]}, "one weight for each model"),
        ({"models": [{"source": "a", "weight": -1}]}, "positive sum"),
        ({"models": ["a", {"source": "b", "weight": -0.5}]}, "only a geometric pool without confidence"),
    ):
        with pytest.raises(ValueError, match=message):
            MergeConfig.model_validate({"ensemble": {}, "models": ["a"], **settings})
    stages = [
        {"method": "merge", "ensemble": {}, "models": ["base"]},
        {"method": "sft", "data": {"source": "rows.jsonl"}},
    ]
    with pytest.raises(ValueError, match="stage 'sft' starts from the ensemble of stage 'merge'"):
        Recipe.model_validate({"name": "x", "model": {"source": "a"}, "stages": stages})
