"""The ragged batch's layout, by hand; micro-batches; and every model type against one-at-a-time runs."""

from __future__ import annotations

import itertools

import pytest
import torch

from posttrain.core.ragged import micro_batches, pack
from posttrain.core.types import Sample
from posttrain.cpu import tiled_attention, tree_attention
from posttrain.models import attention
from posttrain.models.language_model import LanguageModel
from posttrain.models.tiny_model import tiny_model
from posttrain.models.verification import verify
from tests.conftest import family

TYPES = [
    ("llama", {}),
    ("mistral", {"head_dim": 32, "sliding_window": 7}),  # heads that the compiled kernels take as they are
    ("qwen2", {}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    ("qwen3", {}),
    ("gemma", {}),
    ("gemma2", {"sliding_window": 7}),
    ("gemma3_text", {"sliding_window": 7}),
    ("mistral", {"sliding_window": 7}),
    ("phi", {"num_key_value_heads": 4}),
    ("phi3", {"sliding_window": 9}),
    ("gpt2", {}),
    ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 7}),
    ("cohere", {}),
    ("granite", {"logits_scaling": 3.0}),
    ("olmo2", {}),
    ("gpt_neox", {"num_key_value_heads": 4}),
    ("mixtral", {"num_local_experts": 4}),
    ("starcoder2", {}),
]


def test_layout_by_hand() -> None:
    """Two samples that share [1, 2, 3], and a third that is that prefix itself."""
    batch = pack(
        [Sample([1, 2, 3, 4, 5], [0, 0, 1, 1, 1]), Sample([1, 2, 3, 9], [0, 0, 1, 2]), Sample([1, 2, 3], [0, 0, 5])],
        min_shared=2,
    )
    assert batch.tokens_T.tolist() == [1, 2, 3, 4, 5, 9]
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 4, 3]
    assert batch.weights_T.tolist() == [0, 0, 7, 1, 1, 2]  # the shared 3 is a target of all three samples
    assert batch.predictors_T.tolist() == [-1, 0, 1, 2, 3, 2]  # the first token of both children: the prefix's last
    assert (batch.starts, batch.ends, batch.parents) == ((0, 3, 5), (3, 5, 6), (-1, 0, 0))
    assert batch.subtree_ends == (6, 5, 6)
    assert [r.tolist() for r in batch.rows] == [[0, 1, 2, 3, 4], [0, 1, 2, 5], [0, 1, 2]]
    assert batch.targets_N.tolist() == [2, 3, 4, 5]


def test_short_prefixes_are_not_shared() -> None:
    two = [Sample([1, 2, 3, 4], [0, 1, 1, 1]), Sample([1, 2, 3, 5], [0, 1, 1, 1])]
    assert pack(two, min_shared=4).total == 8
    assert pack(two, min_shared=3).total == 5
    assert pack(two, share_prefixes=False, min_shared=3).total == 8


@pytest.mark.parametrize("seed", range(5))
def test_every_row_reads_back(seed: int) -> None:
    """Whatever is shared, each sample's tokens and positions are found again, and the weights add up."""
    samples = family(seed)
    batch = pack(samples, min_shared=4)
    for sample, row in zip(samples, batch.rows, strict=True):
        assert batch.tokens_T[row].tolist() == list(sample.tokens)
        assert batch.positions_T[row].tolist() == list(range(len(sample)))
        assert batch.predictors_T[row][1:].tolist() == row[:-1].tolist()
    assert float(batch.weights_T.sum()) == sum(sum(s.weights) for s in samples)
    assert batch.total < sum(len(s) for s in samples)


def test_pack_refuses_nothing_and_emptiness() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        pack([])
    with pytest.raises(ValueError, match="row 3 has no tokens"):
        pack([Sample([], [], source="row 3")])


def test_first_token_can_not_carry_loss() -> None:
    with pytest.raises(ValueError, match="no predecessor"):
        Sample([1, 2], [1, 1])


def test_micro_batches_hold_to_the_budget_and_are_balanced() -> None:
    lengths = [90, 10, 40, 60, 50, 50]
    split = micro_batches(lengths, 100)
    loads = [sum(lengths[i] for i in m) for m in split]
    assert sorted(itertools.chain(*split)) == list(range(6))
    assert loads == [100, 100, 100]  # 300 tokens go into three at 100; LPT finds them
    assert micro_batches([500, 10], 100) == [[0], [1]]  # what is longer than the budget goes alone
    assert micro_batches([], 100) == []
    assert micro_batches([5, 5, 5], 100, groups=[0, 1, 0]) == [[0, 1, 2]]
    assert sorted(map(sorted, micro_batches([50, 50, 50, 50], 100, groups=[0, 1, 1, 0]))) == [[0, 3], [1, 2]]
    with pytest.raises(ValueError, match="at least 1"):
        micro_batches([1], 0)


@pytest.mark.parametrize(("kind", "changes"), TYPES, ids=["-".join([t, *c]) for t, c in TYPES])
def test_equal_to_one_at_a_time(kind: str, changes: dict[str, object]) -> None:
    """Log-probabilities and gradients of the model's own eager forward, a sequence at a time, at 1e-4."""
    hf = tiny_model(kind, **changes).eval()
    for name, p in hf.named_parameters():
        if "bias" in name or "sinks" in name:
            torch.nn.init.normal_(p, std=0.3)  # zero at first, which would hide a bias that is left out
    samples = family()
    hf.set_attn_implementation("eager")
    theirs = []
    for s in samples:
        tokens = torch.tensor(s.tokens)
        logits = hf(tokens[None], use_cache=False).logits[0, :-1]
        theirs.append(logits.log_softmax(-1).gather(1, tokens[1:, None]).squeeze(1))
    (-sum(t.sum() for t in theirs)).backward()
    expected = {n: p.grad.clone() for n, p in hf.named_parameters() if p.grad is not None}
    model = LanguageModel(hf)
    assert model.ragged
    for share in (False, True):
        hf.zero_grad()
        batch = pack(samples, share)
        assert (max(batch.parents) >= 0) == share
        targets = batch.targets_N
        logprobs, _ = model(batch)
        (-(logprobs * batch.weights_T[targets]).sum()).backward()
        found = torch.zeros(batch.total)
        found[targets] = logprobs.detach()
        for row, t in zip(batch.rows, theirs, strict=True):
            torch.testing.assert_close(found[row[1:]], t.detach(), atol=1e-4, rtol=0)
        scale = max(float(g.abs().max()) for g in expected.values())
        for name, g in expected.items():
            actual = dict(hf.named_parameters())[name].grad
            assert actual is not None, name
            assert float((actual - g).abs().max()) <= 1e-4 * max(1.0, scale), name


def test_equal_to_one_at_a_time_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_attention, "kernels_for", lambda *_: None)
    test_equal_to_one_at_a_time("mistral", {"sliding_window": 7})


@pytest.mark.parametrize("kind", ["mamba", "bloom"])
def test_models_that_can_not_share_fall_back(kind: str) -> None:
    """Recurrent layers, or attention outside transformers' interface: one sequence at a time, said so, still right."""
    hf = tiny_model(kind)
    with pytest.warns(UserWarning, match="one at a time"):
        model = LanguageModel(hf)
    assert not model.ragged
    samples = family()
    batch = model.pack(samples)
    assert max(batch.parents) == -1
    logprobs, _ = model(batch)
    found = torch.zeros(batch.total).index_copy(0, batch.targets_N, logprobs)
    for s, row in zip(samples, batch.rows, strict=True):
        tokens = torch.tensor(s.tokens)
        own = hf(tokens[None], use_cache=False).logits[0, :-1].log_softmax(-1).gather(1, tokens[1:, None]).squeeze(1)
        torch.testing.assert_close(found[row[1:]], own, atol=1e-5, rtol=0)


@pytest.mark.parametrize("window", [None, 5])
def test_tiles_and_tree_equal_plain_attention(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles, so that segments are cut into several; values and gradients of queries, keys and values."""
    monkeypatch.setattr(tree_attention, "kernels_for", lambda *_: None)
    monkeypatch.setattr(tiled_attention, "TILE", 4)
    batch = pack(family(3), min_shared=4)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, batch.total, 8, requires_grad=True) for heads in (6, 2, 2))
    cotangent = torch.randn(1, batch.total, 6, 8)
    plan = attention.Plan(batch)
    plain = attention.plain_attention(q, k, v, plan, window, 0.3)
    expected = torch.autograd.grad((plain * cotangent).sum(), (q, k, v))
    tiled = tiled_attention.TreeAttention.apply(q[0], k[0], v[0], plan, window, 0.3).transpose(0, 1)[None]
    torch.testing.assert_close(tiled, plain, atol=1e-5, rtol=0)
    for a, b in zip(torch.autograd.grad((tiled * cotangent).sum(), (q, k, v)), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_varlen_plan_lists_ancestors_first() -> None:
    """What the GPU kernel is given: each segment's keys are its ancestors' and its own, in order."""
    batch = pack(
        [Sample([1, 2, 3, 4, 5], [0, 0, 0, 1, 1]), Sample([1, 2, 3, 9], [0, 0, 0, 1]), Sample([7, 8], [0, 1])],
        min_shared=2,
    )
    gather, cu_q, cu_k, longest_q, longest_k = attention.Plan(batch).varlen()
    assert batch.tokens_T[gather].tolist() == [1, 2, 3, 1, 2, 3, 4, 5, 1, 2, 3, 9, 7, 8]
    assert cu_q.tolist() == [0, 3, 5, 6, 8]
    assert cu_k.tolist() == [0, 3, 8, 12, 14]
    assert (longest_q, longest_k) == (3, 5)


def test_verify_notices_a_head_that_is_not_understood() -> None:
    model = LanguageModel(tiny_model("llama"))
    assert verify(model) < 1e-5
    model.base.get_output_embeddings().register_forward_hook(lambda module, inputs, logits: 2 * logits)
    with pytest.raises(ValueError, match="differ from the model's own"):
        verify(model)


def test_a_first_token_can_not_be_asked_for() -> None:
    model = LanguageModel(tiny_model("llama"))
    with pytest.raises(ValueError, match="first token"):
        model(pack([Sample([5, 6, 7], [0, 1, 1])]), targets_N=torch.tensor([0]))


def test_attention_outside_a_ragged_batch_says_so() -> None:
    model = LanguageModel(tiny_model("llama"))
    with pytest.raises(RuntimeError, match="without a ragged batch"):
        model.hf(torch.tensor([[1, 2, 3]]))
