"""Find the weight matrices of a model: those of linear layers, and of experts that lie in one parameter."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class LayerMatrix:
    """Name a weight that multiplies inputs: the weight of a linear module, or of one expert of a mixture.

    Attributes:
        name: Name in the model; of an expert with its number, as in "model.layers.0.mlp.experts.down_proj.3".
        module: The module that holds the weight.
        parameter: Name of the parameter in the module.
        expert: Which expert of a parameter that holds the weights of all. None: the parameter is one matrix.
        transposed: The parameter is stored as (I, O).
    """

    name: str
    module: nn.Module
    parameter: str = "weight"
    expert: int | None = None
    transposed: bool = False

    @property
    def weight_O_I(self) -> Tensor:
        """Return the weight, (outputs, inputs): a view, so that writing into it changes the model."""
        weight: Tensor = getattr(self.module, self.parameter).detach()
        weight = weight if self.expert is None else weight[self.expert]
        return weight.t() if self.transposed else weight

    @property
    def parameter_name(self) -> str:
        """Return the name in the model of the parameter that the weight lies in."""
        return f"{self.name}.{self.parameter}" if self.expert is None else self.name.rpartition(".")[0]


def matrices_of(module: nn.Module, prefix: str = "") -> list[LayerMatrix]:
    """Return the matrices inside a module, in its order: linear modules, GPT-2's Conv1D, and experts in one parameter.

    Args:
        module: A decoder layer, a linear module, or a whole model.
        prefix: Name of the module in the model.
    """
    found: list[LayerMatrix] = []
    for name, part in module.named_modules(prefix=prefix):
        if isinstance(part, nn.Linear):
            found.append(LayerMatrix(name, part))
        elif type(part).__name__ == "Conv1D":
            found.append(LayerMatrix(name, part, transposed=True))
        elif hasattr(part, "is_transposed") or type(part).__name__.endswith("ParallelExperts"):
            for parameter, value in part.named_parameters(recurse=False):
                if value.ndim == 3:
                    found += [expert_matrix(name, part, parameter, expert) for expert in range(len(value))]
    return found


def expert_matrix(name: str, module: nn.Module, parameter: str, expert: int) -> LayerMatrix:
    """Return the matrix of one expert.

    Args:
        name: Name of the module in the model.
        module: The module, which says by `is_transposed` in which order transformers keeps inputs and outputs.
        parameter: Name of the parameter in the module.
        expert: Number of the expert.
    """
    transposed = bool(getattr(module, "is_transposed", False))
    return LayerMatrix(f"{name}.{parameter}.{expert}", module, parameter, expert, transposed)
