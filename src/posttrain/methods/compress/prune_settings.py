"""Settings of pruning."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from posttrain.config.base import Config
from posttrain.config.settings import NAME
from posttrain.methods.compress.compress_stage import CompressConfig

Axis = Literal["mlp", "heads", "hidden", "layers"]
Share = Annotated[float, Field(ge=0, lt=1)]


class SparseWeightsConfig(Config):
    """Single weights become zero; the model keeps its shapes, its size on the disk and its speed."""

    algorithm: Literal["magnitude", "wanda", "sparsegpt"] = Field(
        "wanda",
        description="Which weights become zero: the smallest (magnitude), those with the smallest product of size and norm of their input (wanda), or those that the others can make up for best, and do (sparsegpt).",
    )
    sparsity: Share | None = Field(None, description="Share of the weights that become zero. None with a pattern.")
    pattern: str | None = Field(
        None,
        description='n:m, for example "2:4": of every m weights of an output that follow each other, n stay. None: anywhere.',
    )
    scope: Literal["layer", "global"] = Field(
        "layer",
        description="layer: every matrix gets this sparsity. global: the scores of all matrices are compared, and some lose more than others (magnitude, wanda).",
    )
    sparsities: dict[str, Share] = Field(
        default_factory=dict,
        description='Other shares for matrices by name, for example {"*.down_proj": 0.3}; the first that fits holds.',
    )
    leave: list[str] = Field(
        default_factory=list,
        description='Names of matrices that are left alone, for example ["*.layers.0.*", "*.o_proj"]. Embeddings, norms and routers always are.',
    )
    head: bool = Field(False, description="Prune the output head too, if it is not tied to the embeddings.")

    @model_validator(mode="after")
    def _fits(self) -> SparseWeightsConfig:
        if (self.sparsity is None) == (self.pattern is None):
            raise ValueError("set either sparsity (for example 0.5) or pattern (for example 2:4)")
        if self.scope == "global" and (self.pattern or self.sparsities or self.algorithm == "sparsegpt"):
            other = "a pattern" if self.pattern else "sparsities" if self.sparsities else "sparsegpt"
            raise ValueError(f"scope is global, which {other} does not go with: set scope to layer")
        if self.pattern and self.sparsities:
            raise ValueError("sparsities are for pruning without a pattern: leave one of them out")
        if self.pattern is not None:
            self.n_of_m()
        return self

    def n_of_m(self) -> tuple[int, int] | None:
        """Return (n, m) of the pattern; None if there is none."""
        if self.pattern is None:
            return None
        found = re.fullmatch(r"(\d{1,3}):(\d{1,3})", self.pattern)
        if found is None or not 0 < int(found[1]) < int(found[2]):
            raise ValueError(f"pattern is {self.pattern!r}: expected n:m with 0 < n < m, for example 2:4")
        return int(found[1]), int(found[2])


class StructureConfig(Config):
    """Whole units are removed; what is left is an ordinary, smaller and faster model of the same type."""

    ratio: float | None = Field(
        None, gt=0, lt=1, description="Size of the result: share of the parameters. None: the sizes below are given."
    )
    remove: list[Axis] = Field(
        ["mlp"],
        min_length=1,
        description="With ratio: what is made smaller, all by the same factor: mlp (inner units of the MLPs), heads (attention heads, a group with its keys and values), hidden (channels between the layers), layers.",
    )
    layers: int | None = Field(None, ge=1, description="Number of layers of the result.")
    mlp: int | None = Field(None, ge=1, description="Inner units of each MLP (intermediate_size) of the result.")
    heads: int | None = Field(None, ge=1, description="Attention heads of each layer of the result.")
    kv_heads: int | None = Field(
        None,
        ge=1,
        description="Heads of keys and values. None: the number that the heads need, if each keeps its queries.",
    )
    hidden: int | None = Field(None, ge=1, description="Channels between the layers (hidden_size) of the result.")
    round_to: int = Field(
        64, ge=1, description="With ratio: mlp and hidden are multiples of this, which kernels and group sizes like."
    )
    importance: Literal["contribution", "activation"] = Field(
        "contribution",
        description="Of MLP units and heads: mean size of what a unit adds to the hidden state (contribution), or of its activation alone (as Minitron). Channels go by the activations of the norms, layers by how little they turn the hidden state (ShortGPT).",
    )

    @model_validator(mode="after")
    def _fits(self) -> StructureConfig:
        sizes = [n for n in ("layers", "mlp", "heads", "kv_heads", "hidden") if getattr(self, n) is not None]
        if self.ratio is None and not sizes:
            raise ValueError("set ratio (for example 0.7), or sizes: layers, mlp, heads, kv_heads, hidden")
        if self.ratio is not None and sizes:
            raise ValueError(f"ratio chooses the sizes, and {sizes[0]} is given too: leave one of them out")
        # By its value: settings that name a stage are written out and read again, with every default in them.
        if self.remove != type(self).model_fields["remove"].default and self.ratio is None:
            raise ValueError("remove says what ratio makes smaller, and there is no ratio: leave remove out")
        if self.heads and self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        return self


class PruneConfig(CompressConfig):
    """Pruning: single weights become zero (weights), or whole units are removed (structure)."""

    method: Literal["prune"] = "prune"
    name: str = Field("prune", pattern=NAME, description="Name of the stage's folder in the run.")
    weights: SparseWeightsConfig | None = Field(None, description="Set single weights to zero. None: see structure.")
    structure: StructureConfig | None = Field(None, description="Remove units, heads or layers. None: see weights.")

    @model_validator(mode="after")
    def _one(self) -> PruneConfig:
        if (self.weights is None) == (self.structure is None):
            raise ValueError(
                "set either weights (for example {algorithm: wanda, sparsity: 0.5}), whose result has the same shapes, "
                "or structure (for example {ratio: 0.7}), whose result is a smaller model"
            )
        needs = "structure" if self.weights is None else self.weights.algorithm
        if self.calibration is None and needs != "magnitude":
            raise ValueError(f"{needs} looks at what the layers multiply: set calibration, for example to rows of text")
        return self
