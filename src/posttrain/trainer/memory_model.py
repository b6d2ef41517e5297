"""Estimate the memory of training and of serving from a model's sizes: pure arithmetic, in bytes.

What a training step holds on a CPU: the weights, and of what is trained a gradient and two moments of AdamW (16-bit
weights have float32 masters too); activations of one micro-batch until backward has used them; logits. The formulas are
those of this package's own layers, which recompute norms and activation functions (`posttrain.cpu.recompute`), and are
held to what processes then take (`benchmarks/memory.py`, docs/memory.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from posttrain.losses.linear_logprobs import CHUNK_BYTES, KEPT_BYTES
from posttrain.models.model_shape import ModelShape

FLOAT = 4
"""Bytes of a float32."""
LIBRARIES = {"cpu": 120 << 20, "cuda": 600 << 20}
"""What is neither weights nor activations: kernels that oneDNN compiles for each shape of a product, rows, blocks of
freed memory that nothing fits into; on a GPU the workspaces of its libraries."""
TOKENIZER = 1 << 10
"""Bytes of a token in the tokenizer, in main memory."""
SERVING_LIBRARIES = 50 << 20
"""The same of a process that serves on a CPU."""
BLOCK, OUTER = 64, 256
"""bitsandbytes: weights of one scale, and scales of one outer scale (double quantisation)."""


@dataclass(frozen=True)
class WeightFormat:
    """Hold how weights are stored.

    Attributes:
        name: Its name in tables.
        bytes: Bytes of a number that is not in few bits: embeddings, norms, biases; of all, if bits is None.
        bits: Bits of a number of a linear layer. None: as the others.
        group: Weights of one scale. 0: one scale a row, which takes next to nothing.
        scale_bytes: Bytes of a scale, with its zero if there is one.
        experts: Bytes of a number of experts that lie in one parameter. None: they are as linear layers.
        packed: The format is that of `method: quantize`, which a CPU reads packed.
    """

    name: str
    bytes: float
    bits: int | None = None
    group: int = 0
    scale_bytes: float = FLOAT
    experts: float | None = None
    packed: bool = False


FORMATS = {
    "float32": WeightFormat("float32", 4),
    "bfloat16": WeightFormat("bfloat16", 2),
    "float16": WeightFormat("float16", 2),
    "nf4": WeightFormat("nf4", 2, 4, BLOCK, 1 + FLOAT / OUTER, experts=2),
    "int8": WeightFormat("int8", 2, 8, packed=True),
    "int4": WeightFormat("int4", 2, 4, 32, 2, packed=True),
}
"""Formats of tables. int8 and int4 keep what is no linear layer in 16 bit, as servers do."""


def served_as(weights: WeightFormat, device: str) -> WeightFormat:
    """Return the format that weights have in memory: on a CPU scales, and what is in full beside them, are float32."""
    return replace(weights, bytes=FLOAT, scale_bytes=FLOAT) if weights.packed and device == "cpu" else weights


def unused_pages(shape: ModelShape, weights: WeightFormat, stored: int | None) -> int:
    """Return the bytes of a mapped file that are read, and held as other numbers beside it.

    Weights in the dtype of the file are its pages themselves. Packed weights are laid out anew.

    Args:
        shape: Sizes of the model.
        weights: Format of the weights in memory.
        stored: Bytes of the model's files. None: unknown; 16 bit are assumed.
    """
    if weights.packed:
        return weight_bytes(shape, weights) - round((shape.parameters - shape.linear) * weights.bytes)
    stored = 2 * shape.parameters if stored is None else stored
    same = weights.bits is None and round(stored / shape.parameters) == weights.bytes
    return 0 if same else stored


def weight_bytes(shape: ModelShape, weights: WeightFormat) -> int:
    """Return the bytes of a model's weights."""
    if weights.bits is None:
        return round(shape.parameters * weights.bytes)
    in_bits = shape.linear if weights.experts is None else shape.linear - shape.experts
    apart = 0.0 if weights.experts is None else shape.experts * weights.experts
    scales = in_bits / weights.group * weights.scale_bytes if weights.group else 0.0
    return round(in_bits * weights.bits / 8 + scales + apart + (shape.parameters - shape.linear) * weights.bytes)


def cache_bytes(shape: ModelShape, tokens: int, itemsize: int, int8: bool = False) -> int:
    """Return the bytes of keys and values.

    Args:
        shape: Sizes of the model.
        tokens: Positions.
        itemsize: Bytes of a number of the compute dtype.
        int8: Keys and values are in int8, with a float32 scale for each token and head.
    """
    width = shape.key_value + FLOAT * shape.key_value_heads if int8 else shape.key_value * itemsize
    return 2 * shape.layers * tokens * width


def kept_per_token(shape: ModelShape, itemsize: int, rank: int = 0, adapted: int = 0, on_down: bool = False) -> int:
    """Return the bytes that backward needs of one token in one layer, as the CPU's layers keep them.

    The inputs of both norms (their outputs are made again), queries and keys with positions, values, attention's output
    and its log-sum-exps; gate and up of the MLP (their product is made again). Attention computes in float32. A layer
    with an adapter keeps its product with A, and the down projection's adapter its input, which nothing makes again. A
    model type without a gate keeps the outputs of its norms and of its activation function as well.

    Args:
        shape: Sizes of the model.
        itemsize: Bytes of a number of the compute dtype.
        rank: Rank of the adapters; 0: none.
        adapted: Matrices of a layer that have an adapter.
        on_down: The MLP's last projection has an adapter.
    """
    attention = 2 * shape.query + 2 * shape.key_value
    kept = 2 * shape.hidden * itemsize + 2 * FLOAT + attention * FLOAT + shape.heads * FLOAT
    if itemsize != FLOAT:
        kept += shape.query * itemsize  # what goes into the output projection is rounded again
    if shape.normed_heads:
        kept += (shape.query + shape.key_value) * itemsize
    kept += 2 * shape.inner * itemsize
    if not shape.gated:
        kept += 2 * shape.hidden * itemsize
    if on_down and shape.gated:
        kept += shape.inner * itemsize
    return kept + rank * adapted * FLOAT


def activation_bytes(
    shape: ModelShape,
    tokens: int,
    itemsize: int,
    rank: int = 0,
    names: tuple[str, ...] = (),
    checkpointing: bool = False,
) -> int:
    """Return the bytes of activations of a micro-batch when backward begins, on a CPU.

    Args:
        shape: Sizes of the model.
        tokens: Tokens of the micro-batch.
        itemsize: Bytes of a number of the compute dtype.
        rank: Rank of the adapters; 0: none.
        names: Names of the layers that have one.
        checkpointing: Only the inputs of layers are kept, and one layer's activations at a time.
    """
    each = round(len(names) / max(shape.layers, 1))
    on_down = any(name.rsplit(".", 1)[-1] in ("down_proj", "w2", "c_proj", "fc2") for name in names)
    layer = kept_per_token(shape, itemsize, rank, each, on_down)
    # Embedding, final norm, and what the output head takes; in backward a layer's gradients beside its activations.
    ends = 4 * shape.hidden * itemsize
    backward = (4 * shape.hidden + shape.query + 2 * shape.key_value + 3 * shape.inner) * itemsize
    layers = shape.layers * shape.hidden * itemsize + layer if checkpointing else shape.layers * layer
    return tokens * (layers + ends + backward)


def logits_bytes(shape: ModelShape, targets: int, trained_head: bool, sums: bool = False) -> int:
    """Return the bytes of logits on a CPU: of all targets where these are few, else chunks of them.

    Args:
        shape: Sizes of the model.
        targets: Positions of a micro-batch that go through the output head.
        trained_head: The head's weight has a gradient, which chunks add up apart.
        sums: The loss needs log-probabilities (preferences, RL), whose chunks are tiles of the vocabulary.
    """
    whole = FLOAT * targets * shape.vocabulary
    if whole <= KEPT_BYTES["cpu"]:
        return whole
    if sums:
        return 2 * CHUNK_BYTES["cpu"]
    return divergence_bytes(shape, trained_head)


def divergence_bytes(shape: ModelShape, trained_head: bool) -> int:
    """Return the bytes of comparing two distributions on a CPU: chunks of both logits and of their products.

    Args:
        shape: Sizes of the model.
        trained_head: The head's weight has a gradient, which chunks add up apart.
    """
    return 3 * CHUNK_BYTES["cpu"] + (FLOAT * shape.vocabulary * shape.hidden if trained_head else 0)


def state_bytes(trained: int, itemsize: int, kind: str = "adamw", matrices: int = 0, width: int = 1) -> dict[str, int]:
    """Return the bytes of gradients, optimizer and float32 masters of this many trained parameters.

    Args:
        trained: Number of trained parameters.
        itemsize: Bytes of a trained weight; of less than a float32 there are masters too.
        kind: Kind of optimizer.
        matrices: Of the parameters, those that muon updates: one moment instead of two.
        width: Rows and columns of a matrix, for adafactor: it keeps a number for each of them.
    """
    masters = 0 if itemsize == FLOAT else FLOAT * trained
    state = 2 * FLOAT * trained
    if kind == "muon":
        state -= FLOAT * matrices
    elif kind == "adafactor":
        state = 2 * FLOAT * trained // width
    elif kind == "adamw8bit":
        state = 2 * trained + 2 * FLOAT * trained // OUTER
    out = {"gradients": FLOAT * trained, "optimizer": state + masters}
    return {name: value for name, value in out.items() if value}


def library_bytes(shape: ModelShape, device: str) -> int:
    """Return the bytes of what is neither weights nor activations."""
    return LIBRARIES["cuda"] if device == "cuda" else LIBRARIES["cpu"] + TOKENIZER * shape.vocabulary
