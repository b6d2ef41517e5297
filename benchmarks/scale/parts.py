"""Times of the parts of a run of reinforcement learning: decoding, training, moving weights; lengths of completions.

Units: seconds, bytes, tokens, operations (a multiply-add counts as two).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Card:
    """A GPU and its links.

    Attributes:
        name: Name in tables.
        operations: Dense bfloat16 operations per second.
        memory: Bytes of memory.
        bandwidth: Bytes per second from memory.
        link: Bytes per second between nodes, each GPU.
        node: GPUs in a node.
    """

    name: str
    operations: float
    memory: float
    bandwidth: float
    link: float = 50e9
    node: int = 8


H100 = Card("H100 SXM", 989e12, 80e9, 3.35e12)
H20 = Card("H20", 148e12, 96e9, 4.0e12)


@dataclass(frozen=True)
class Model:
    """Shape of a language model in bfloat16.

    Attributes:
        name: Name in tables.
        layers: Decoder layers.
        parameters: All parameters.
        active: Parameters that a token uses.
        query_width: Attention heads times head dimension.
        kv_width: Key-value heads times head dimension.
        experts: Experts of a layer; 0: a dense model.
        chosen: Experts that a token uses.
        expert_parameters: Parameters of all experts.
        hidden: Width of what goes to experts.
    """

    name: str
    layers: int
    parameters: float
    active: float
    query_width: int
    kv_width: int
    experts: int = 0
    chosen: int = 0
    expert_parameters: float = 0.0
    hidden: int = 0

    @property
    def weight_bytes(self) -> float:
        return 2 * self.parameters

    @property
    def cache_bytes(self) -> float:
        """Bytes of keys and values of a token."""
        return 2.0 * 2 * self.layers * self.kv_width

    def bytes_read(self, batch: int) -> float:
        """Return bytes of weights that a decoding step reads for `batch` sequences.

        Experts are assumed to be drawn independently and uniformly: an expert is read with probability
        1 - (1 - chosen/experts)^batch.
        """
        if not self.experts:
            return self.weight_bytes
        touched = 1 - (1 - self.chosen / self.experts) ** batch
        return 2 * (self.parameters - self.expert_parameters * (1 - touched))

    def training_operations(self, tokens: float, squares: float, forwards: float = 0.0) -> float:
        """Return operations of a training step.

        6 P T for the products with weights, and 12 layers times query width for each causal pair of tokens (forward
        1/3, backward 2/3); recomputed activations do not count.

        Args:
            tokens: T, of all sequences.
            squares: Sum of the squares of the sequences' lengths; a sequence has half as many causal pairs.
            forwards: Additional forward passes, e.g. 1 to recompute old log-probabilities.
        """
        step = 6 * self.active * tokens + 12 * self.layers * self.query_width * squares / 2
        return step * (1 + forwards / 3)


def mixture(name: str, layers: int, query_heads: int, hidden: int, width: int, total: float, active: float) -> Model:
    """Return a mixture of 128 experts of `width` units, 8 of them chosen, with heads of 128, 4 of them of keys."""
    experts = 3.0 * layers * 128 * hidden * width
    return Model(name, layers, total, active, query_heads * 128, 4 * 128, 128, 8, experts, hidden)


DENSE = Model("32B dense", 64, 32.8e9, 32.8e9, 64 * 128, 8 * 128)
"""The shape of Qwen3-32B."""
MIXTURE = mixture("235B-A22B mixture", 94, 64, 4096, 1536, 235.1e9, 22.2e9)
"""The shape of Qwen3-235B-A22B."""
SMALL_MIXTURE = mixture("30B-A3B mixture", 48, 32, 2048, 768, 30.5e9, 3.3e9)
SEVEN = Model("7B dense", 28, 7.6e9, 7.6e9, 28 * 128, 4 * 128)
"""The shape of Qwen2.5-7B."""


@dataclass(frozen=True)
class Engine:
    """What a sampler adds to the time that its card needs.

    Attributes:
        layer: Seconds of a layer in each step (launches and all-reduces), all of its GPUs in one node.
        layer_across: The same if a sampler spans nodes.
        sequence: Seconds of a sequence in each step (scheduling, sampling, detokenizing).
        efficiency: Share of the memory's bandwidth that is reached.
        compute: Share of the card's operations that is reached.
        memory: Share of the card's memory that it may use.
        most: Sequences that run at once.
    """

    layer: float
    layer_across: float
    sequence: float
    efficiency: float = 0.8
    compute: float = 0.5
    memory: float = 0.9
    most: int = 1024


@dataclass(frozen=True)
class Decoder:
    """A sampler: `gpus` cards with one copy of the weights, tensor parallel."""

    model: Model
    card: Card
    engine: Engine
    gpus: int

    @cached_property
    def capacity(self) -> float:
        """Tokens of keys and values that fit beside the weights."""
        room = self.gpus * self.card.memory * self.engine.memory - self.model.weight_bytes
        return room / self.model.cache_bytes

    @cached_property
    def token_seconds(self) -> float:
        """Seconds that a step takes longer for each token in the cache."""
        return self.model.cache_bytes / (self.gpus * self.card.bandwidth * self.engine.efficiency)

    def step_seconds(self, batch: int) -> float:
        """Return seconds of a step with `batch` sequences and an empty cache."""
        engine, gpus = self.engine, self.gpus
        layer = engine.layer if gpus <= self.card.node else engine.layer_across
        reading = self.model.bytes_read(batch) / (gpus * self.card.bandwidth * engine.efficiency)
        computing = 2 * self.model.active * batch / (gpus * self.card.operations * engine.compute)
        return self.model.layers * layer + batch * engine.sequence + max(reading, computing)

    def prefill_seconds(self, tokens: float) -> float:
        """Return seconds of a forward pass over `tokens` that are not in the cache."""
        return 2 * self.model.active * tokens / (self.gpus * self.card.operations * self.engine.compute)


def elapsed(steps: float, first: float, per_token: float, cached: float, batch: int) -> float:
    """Return seconds of `steps` decoding steps; the cache grows by `batch` tokens in each.

    Step i (from 0) takes first + per_token (cached + batch i).
    """
    return steps * first + per_token * (cached * steps + batch * steps * (steps - 1) / 2)


def steps_in(seconds: float, first: float, per_token: float, cached: float, batch: int) -> float:
    """Return the (fractional) number of steps in `seconds`: the inverse of elapsed()."""
    a, b = per_token * batch / 2, first + per_token * cached - per_token * batch / 2
    return 2 * seconds / (b + math.sqrt(b * b + 4 * a * seconds))  # this form does not cancel if a is small


@dataclass(frozen=True)
class Lengths:
    """Lengths of completions: log-normal, cut at `longest`.

    Attributes:
        median: Median of the distribution before the cut, in tokens.
        sigma: Standard deviation of the logarithm.
        longest: Most tokens.
    """

    median: float
    sigma: float
    longest: int

    def draw(self, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Return `count` lengths of at least one token."""
        tokens = self.median * np.exp(self.sigma * rng.standard_normal(count))
        return np.clip(tokens, 1, self.longest).astype(np.int64)

    @property
    def mean(self) -> float:
        """Mean after the cut: E[min(X, longest)]."""
        z = (math.log(self.longest / self.median)) / self.sigma
        below = self.median * math.exp(self.sigma**2 / 2) * normal(z - self.sigma)
        return below + self.longest * (1 - normal(z))


def normal(z: float) -> float:
    """Return the standard normal distribution function."""
    return 0.5 * math.erfc(-z / math.sqrt(2))


def with_mean(mean: float, sigma: float, longest: int) -> Lengths:
    """Return the distribution whose mean after the cut is `mean`.

    Raises:
        ValueError: The mean is not between 1 and the longest.
    """
    if not 1 < mean < longest:
        raise ValueError(f"the mean length must be between 1 and the longest, {longest}; it is {mean}")
    low, high = 0.0, math.log(longest) + 10 * sigma
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if Lengths(math.exp(middle), sigma, longest).mean < mean else (low, middle)
    return Lengths(math.exp(low), sigma, longest)


@dataclass(frozen=True)
class Transfer:
    """Weights from the trainers to all samplers: one pipelined broadcast.

    Attributes:
        rate: Bytes per second at which a sampler receives its copy.
        doubling: Seconds more for each doubling of the samplers.
    """

    rate: float
    doubling: float

    def seconds(self, size: float, samplers: int) -> float:
        """Return seconds until all `samplers` have `size` bytes."""
        return size / self.rate + self.doubling * math.log2(max(samplers, 1))


def sharded_seconds(model: Model, card: Card, gpus: int, shard: int, tokens: float, micro: float = 16384) -> float:
    """Return seconds of communication in a step of FSDP2 or HSDP that nothing hides.

    Weights are gathered for the forward and for the backward pass, gradients are scattered (2 bytes each), once per
    micro-batch; shards that span nodes move over the nodes' links, others over NVLink (9 times as fast here). With
    several copies (`shard` < `gpus`), gradients are reduced over the copies once, 2 (c - 1) / c of a shard.

    Args:
        model: The model.
        card: The card.
        gpus: Trainers.
        shard: GPUs that share one copy of the weights.
        tokens: Tokens of the step.
        micro: Tokens of a GPU's micro-batch.
    """
    link = card.link if shard > card.node else 9 * card.link
    passes = math.ceil(tokens / gpus / micro)
    copies = gpus // shard
    reduced = 2 * (copies - 1) / copies * model.weight_bytes / shard / card.link
    return passes * 3 * model.weight_bytes * (1 - 1 / shard) / link + reduced


def dispatch_seconds(model: Model, card: Card, gpus: int, tokens: float) -> float:
    """Return seconds in which tokens move to experts on other nodes and back, in a forward and a backward pass.

    Weights of experts stay where they are. A token goes to each of its experts in bfloat16: 4 times chosen times hidden
    times 2 bytes for each layer; 0 for a dense model.
    """
    return tokens / gpus * model.layers * 4 * model.chosen * model.hidden * 2 / card.link
