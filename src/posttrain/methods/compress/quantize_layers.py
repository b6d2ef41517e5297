"""Quantise the layers of a model one after another."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.core.errors import ModelError
from posttrain.core.types import Sample
from posttrain.methods.compress.awq import search_column_scales
from posttrain.methods.compress.calibration_pass import CalibratedLayer, LayerByLayer, calibrate
from posttrain.methods.compress.gptq import gptq, output_error
from posttrain.methods.compress.input_statistics import InputStatistics
from posttrain.methods.compress.quantize_settings import QuantizeConfig
from posttrain.methods.compress.scale_folding import Fold, find_folds
from posttrain.models.adapter_targets import is_experts_weight
from posttrain.models.compressed_reading import share_with_head
from posttrain.models.fake_quantization import noted_grid, quantizable
from posttrain.models.language_model import LanguageModel
from posttrain.models.quantization_grid import Grid, check_group, round_to_nearest
from posttrain.models.quantized_weight import QuantizedWeight, attach_quantized, attach_to_matrix, quantized_matrices
from posttrain.models.weight_matrices import LayerMatrix, matrices_of

COLLECTED = {"gptq": ("hessian",), "awq": ("hessian", "absolute"), "rtn": ("squares",)}


def chosen_settings(config: QuantizeConfig, source: Path) -> tuple[QuantizeConfig, list[str]]:
    """Return the settings with what is left open filled in, and notes on a grid that the model was not trained for.

    Args:
        config: The stage's settings.
        source: The model's folder, which may say for which grid it was trained.
    """
    trained = noted_grid(source) if source.is_dir() else None
    bits = config.bits or (4 if trained is None else trained.bits)
    group = {4: 32, 8: 0}[bits] if trained is None else trained.group or 0
    chosen = {
        "bits": bits,
        "group": group if config.group is None else config.group,
        "symmetric": (trained is None or trained.symmetric) if config.symmetric is None else config.symmetric,
        "skip": ([] if trained is None else trained.skip) if config.skip is None else config.skip,
    }
    notes = []
    if trained is not None:
        wanted = {**trained.model_dump(), "group": trained.group or 0}
        others = [
            f"{name}: {chosen[name]} (trained with {wanted[name]})" for name in chosen if chosen[name] != wanted[name]
        ]
        if config.algorithm != "rtn" or config.search_scales or config.activation_bits:
            others.append("another way of rounding than to nearest: use algorithm: rtn alone")
        if others:
            notes = [
                "the model was trained for another grid, so this is not the model as it was trained: "
                + ", ".join(others)
            ]
    return config.model_copy(update=chosen), notes


class LayerQuantizer:
    """Quantise a model's layers in place, each with what the quantised layers before it give.

    Attributes:
        matrices: The weights of linear layers and of experts, by name.
        steps: Number of steps, for progress.
        unreached: Matrices that no calibration row has reached: experts that no token was sent to.
        entries: What became of each matrix.
    """

    def __init__(self, policy: LanguageModel, config: QuantizeConfig) -> None:
        self.policy, self.config = policy, config
        base = policy.base
        skip = list(config.skip or [])
        self.matrices = {name: LayerMatrix(name, module) for name, module in quantizable(base, skip).items()}
        self.matrices |= {m.name: m for m in matrices_of(base) if m.expert is not None and not _skipped(m, skip)}
        assert config.bits is not None and config.symmetric is not None
        dtype = next(base.parameters()).dtype
        if config.format == "gguf" and dtype == torch.float32:
            dtype = torch.float16  # a GGUF file's scales, so that both files hold the same numbers
        self.grid = Grid(config.bits, config.group or None, config.symmetric, config.search_scales, dtype)
        self._check()
        self.head = self._head()
        self.unreached: list[str] = []
        self.entries: list[dict[str, Any]] = []
        self.scaled: list[dict[str, Any]] = []
        self.steps = len(LayerByLayer(policy).layers) if config.calibration is not None else len(self.matrices)

    def _check(self) -> None:
        base, config = self.policy.base, self.config
        if not self.matrices:
            kind = base.config.get_text_config().model_type
            raise ModelError(f"{kind}: no linear layers that can be quantised (skip is {config.skip})")
        widths = [matrix.weight_O_I.shape[1] for matrix in self.matrices.values()]
        others = [base.get_input_embeddings().weight.shape[1]] if config.embeddings or config.head else []
        check_group(self.grid, [*widths, *others], "")
        known = {m.parameter_name for m in matrices_of(base)}
        for name, parameter in base.named_parameters():
            if not is_experts_weight(base, name, parameter) or _matches(name, config.skip or []):
                continue
            reason = "in a way that is not known here" if name not in known else None
            if config.activation_bits is not None:
                reason = "and the inputs of experts can't be rounded (activation_bits)"
            if reason is not None:
                raise ModelError(
                    f"{name} holds the weights of all experts of a layer, {reason}: set "
                    f"skip: ['*{name.rsplit('.', 2)[-2]}*'] to quantise the other layers and leave the experts in full"
                )

    def _head(self) -> nn.Linear | None:
        """Return the output head, if it is to be quantised by itself."""
        base = self.policy.base
        head, table = base.get_output_embeddings(), base.get_input_embeddings()
        if self.config.head is None:
            return None
        if not isinstance(head, nn.Linear):
            raise ModelError("head: the model has no output head that is a linear layer")
        if head.weight is table.weight:
            raise ModelError(
                "head: the output head shares the weights of the embeddings; set embeddings to quantise both, or leave "
                "head out"
            )
        return head

    def run(self, samples: Sequence[Sample], progress: Callable[[int], None]) -> None:
        """Quantise everything that is asked for.

        Args:
            samples: Calibration rows; empty for rounding to nearest.
            progress: Called with the number of steps that are done.
        """
        config = self.config
        if config.calibration is None:
            for done, matrix in enumerate(self.matrices.values(), 1):
                self._quantize(matrix, None)
                progress(done)
        else:
            folds: list[list[Fold]] = []
            if config.algorithm == "awq":
                folds = find_folds(self.policy, LayerByLayer(self.policy).layers)
            wanted = set(self.matrices)
            statistics = COLLECTED[config.algorithm]
            head, relative = self.head is not None, config.algorithm == "awq"
            for layer in calibrate(self.policy, samples, statistics, wanted.__contains__, head=head, relative=relative):
                self._layer(layer, folds[layer.number] if layer.number < len(folds) else [])
                progress(layer.number + 1)
        self._embeddings()

    def _layer(self, layer: CalibratedLayer, folds: Sequence[Fold]) -> None:
        """Quantise one decoder layer, or the output head."""
        if layer.module is self.head:
            self._quantize(layer.matrices[0], layer.statistics.get(layer.matrices[0].name))
            return
        scales = self._scale(layer, folds) if folds else {}
        for matrix in layer.matrices:
            self._quantize(matrix, layer.statistics.get(matrix.name), scales.get(matrix.name))

    def _scale(self, layer: CalibratedLayer, folds: Sequence[Fold]) -> dict[str, Tensor]:
        """Search and apply AWQ's scales of a layer; return them by matrix."""
        found: dict[str, Tensor] = {}
        searched = []
        for fold in folds:
            names = [f"{layer.name}.{target}" for target in fold.targets]
            statistics = layer.statistics.get(names[0])
            if statistics is None or any(name not in self.matrices for name in names):
                continue
            assert statistics.hessian_I_I is not None
            weights = [target.weight_O_I for target in fold.targets.values()]
            given = statistics.hessian_I_I, statistics.mean_absolute_I, self.grid, fold.repeats, fold.size
            search = search_column_scales(weights, *given)
            searched.append((fold, search))
            found |= dict.fromkeys(names, search.scales_I)
            gain = search.error / search.plain_error if search.plain_error > 0 else 1.0
            self.scaled.append({"layers": names, "exponent": search.exponent, "error_ratio": round(gain, 6)})
        for fold, search in searched:  # once all are searched, on the weights as they were
            fold.apply(search.scales_I)
        return found

    def _quantize(
        self, matrix: LayerMatrix, statistics: InputStatistics | None, scales_I: Tensor | None = None
    ) -> None:
        """Quantise one linear layer, or one matrix of an expert.

        Args:
            matrix: The matrix.
            statistics: What is known of its inputs. None: nothing.
            scales_I: AWQ's scales, by which its inputs are divided since.
        """
        config, grid, weight_O_I, is_head = self.config, self.grid, matrix.weight_O_I, matrix.module is self.head
        if is_head:
            assert config.head is not None
            grid = Grid(config.head, grid.group, grid.symmetric, grid.search, grid.dtype)
        algorithm = config.algorithm if statistics is not None else "rtn"
        inputs = None if is_head else config.activation_bits
        hessian = None if statistics is None else statistics.hessian_I_I
        if hessian is not None and scales_I is not None:
            hessian = hessian / (scales_I[:, None] * scales_I)
        if hessian is not None and config.algorithm == "gptq":
            weight = gptq(weight_O_I, hessian, grid, config.damping, config.act_order, inputs)
        else:
            squares = None if statistics is None else statistics.squares_I if hessian is None else hessian.diagonal()
            weight = round_to_nearest(weight_O_I, grid, squares, inputs)
        entry: dict[str, Any] = {"layer": matrix.name, "algorithm": algorithm, "bits": grid.bits, "group": weight.group}
        if hessian is not None:
            entry["output_error"] = round(output_error(weight_O_I, weight.dense(), hessian), 8)
        if config.calibration is not None and statistics is None:
            self.unreached.append(matrix.name)
        attach_to_matrix(matrix, weight)
        self.entries.append(entry)

    def _embeddings(self) -> None:
        """Quantise the embeddings, and a head that no calibration has reached, by rounding to nearest."""
        config, base = self.config, self.policy.base
        if self.head is not None and config.calibration is None:
            name = next(n for n, m in base.named_modules() if m is self.head)
            self._quantize(LayerMatrix(name, self.head), None)
        if config.embeddings is None:
            return
        table = base.get_input_embeddings()
        name = next(n for n, m in base.named_modules() if m is table)
        grid = Grid(config.embeddings, self.grid.group, self.grid.symmetric, self.grid.search, self.grid.dtype)
        weight = round_to_nearest(table.weight, grid)
        attach_quantized(table, weight)
        share_with_head(base)
        self.entries.append({"layer": name, "algorithm": "rtn", "bits": grid.bits, "group": weight.group})

    def record(self) -> dict[str, Any]:
        """Return what became of each layer, for the stage's folder."""
        return {"layers": self.entries, "unreached": self.unreached, "scales": self.scaled}

    def summary(self) -> dict[str, Any]:
        """Return the manifest's entry."""
        weights: list[QuantizedWeight] = [weight for _, weight in quantized_matrices(self.policy.base)]
        few = sum(weight.values_O_I.numel() for weight in weights)
        total = sum(p.numel() for p in self.policy.base.parameters())
        size = next(self.policy.base.parameters()).element_size()
        stored = sum(weight.nbytes for weight in weights) + (total - few) * size
        errors = [entry["output_error"] for entry in self.entries if "output_error" in entry]
        return {
            "layers": len(self.entries),
            "share of the weights": round(few / total, 4),
            "bytes": stored,
            "bytes before": total * size,
            **({"mean relative output error": round(sum(errors) / len(errors), 6)} if errors else {}),
            **({"rounded to nearest, no rows": len(self.unreached)} if self.unreached else {}),
        }


def _skipped(matrix: LayerMatrix, skip: Sequence[str]) -> bool:
    """Return True if patterns name an expert's matrix, or the parameter that holds it with all others."""
    return _matches(matrix.name, skip) or _matches(matrix.parameter_name, skip)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
