"""Add up what is known of the inputs that the weight matrices of a decoder layer multiply."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.models.weight_matrices import LayerMatrix

STATISTICS = ("hessian", "squares", "absolute", "inputs")
"""What `InputStatistics` can collect."""
MOST_INPUTS = 4096
"""Most inputs of a matrix that are kept (statistic "inputs")."""


class InputStatistics:
    """Add up the inputs x of a matrix, a token at a time.

    A token that several rows share counts once for each, so that numbers are those of the rows one at a time.

    Attributes:
        tokens: Number of tokens.
        hessian_I_I: Sum of x x^T in float32; None if it is not collected. Likewise the others:
        absolute_I: Sum of |x| in float64.
        inputs: The first inputs, up to `MOST_INPUTS` tokens, in float32.
    """

    def __init__(self, statistics: Sequence[str]) -> None:
        if unknown := set(statistics) - set(STATISTICS):
            raise ValueError(f"no statistic of inputs is called {sorted(unknown)[0]!r}: there are {STATISTICS}")
        self.statistics = frozenset(statistics)
        self.tokens = 0.0
        self.hessian_I_I: Tensor | None = None
        self.absolute_I: Tensor | None = None
        self._squares_I: Tensor | None = None
        self._inputs: list[Tensor] = []

    def add(self, x_N_I: Tensor, counts_N: Tensor | None = None) -> None:
        """Add the inputs of some tokens.

        Args:
            x_N_I: The inputs.
            counts_N: How often each counts. None: once.
        """
        x = x_N_I.detach().float()
        counts = torch.ones(len(x), device=x.device) if counts_N is None else counts_N.float()
        self.tokens += float(counts.sum())
        if "hessian" in self.statistics:
            scaled = x if counts_N is None else x * counts.sqrt()[:, None]
            if self.hessian_I_I is None:
                self.hessian_I_I = x.new_zeros(x.shape[1], x.shape[1])
            self.hessian_I_I.addmm_(scaled.t(), scaled)
        elif "squares" in self.statistics:
            self._squares_I = _added(self._squares_I, counts.double() @ x.double().square())
        if "absolute" in self.statistics:
            self.absolute_I = _added(self.absolute_I, counts.double() @ x.double().abs())
        if "inputs" in self.statistics:
            room = MOST_INPUTS - sum(map(len, self._inputs))
            self._inputs += [x[:room].clone()] if room > 0 else []

    def scale(self, factor: float) -> None:
        """Let everything that was added count this many times as much."""
        self.tokens *= factor
        for total in (self.hessian_I_I, self.absolute_I, self._squares_I):
            if total is not None:
                total.mul_(factor)

    @property
    def squares_I(self) -> Tensor:
        """Return the sum of x^2 of each column in float64; its root is the norm of a column of inputs."""
        if self.hessian_I_I is not None:
            return self.hessian_I_I.diagonal().double()
        return _collected(self._squares_I, "squares")

    @property
    def mean_absolute_I(self) -> Tensor:
        """Return the mean of |x| of each column in float64."""
        return _collected(self.absolute_I, "absolute") / self.tokens

    @property
    def inputs_N_I(self) -> Tensor:
        """Return the inputs that were kept."""
        return _collected(torch.cat(self._inputs) if self._inputs else None, "inputs")


def _added(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total.add_(more)


def _collected(value: Tensor | None, name: str) -> Tensor:
    if value is None:
        raise ValueError(f"the statistic {name!r} was not collected")
    return value


class InputObserver(torch.overrides.TorchFunctionMode):
    """Collect statistics of the inputs of matrices, within its context, from whatever passes run there.

    Modules that are given the same tensor (query, key and value; gate and up) share their statistics: they are computed
    once. Products with a slice of a parameter that holds all experts are seen as they are computed; transformers'
    kernels that compute all experts at once are put aside meanwhile.

    With `hold`, inputs wait for `add_held`, which is told how much each token of the pass counts. In the mean over all
    tokens they count once then.
    """

    def __init__(self, matrices: Sequence[LayerMatrix], statistics: Sequence[str], hold: bool = False) -> None:
        super().__init__()
        self._matrices, self._wanted, self._hold = list(matrices), statistics, hold
        self._held: list[tuple[InputStatistics, Tensor, bool]] = []
        self._total, self._weighted_total = 0.0, 0.0
        self._weighted: dict[int, InputStatistics] = {}
        self.counts_N: Tensor | None = None
        self.found: dict[str, InputStatistics] = {}
        self._leaders: dict[str, str] = {}
        self._newest: tuple[Tensor, str] | None = None
        self._experts: dict[int, LayerMatrix] = {}
        self._undo: list[Any] = []

    def __enter__(self) -> InputObserver:
        for matrix in self._matrices:
            if matrix.expert is None:
                handle = matrix.module.register_forward_pre_hook(_hook_of(self, matrix))
                self._undo.append(handle.remove)
        for matrix in self._matrices:
            if matrix.expert is not None:
                self._experts[matrix.weight_O_I.data_ptr()] = matrix
        for module in {id(m.module): m.module for m in self._experts.values()}.values():
            eager = getattr(type(module).forward, "__wrapped__", None)
            if eager is not None and "forward" not in vars(module):
                module.forward = eager.__get__(module)
                self._undo.append(lambda module=module: delattr(module, "forward"))
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for undo in self._undo:
            undo()
        self._undo.clear()
        self._newest = None
        for statistics in self._weighted.values():
            statistics.scale(self._total / self._weighted_total)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._experts and func in PRODUCTS and len(args) >= 2 and isinstance(args[1], Tensor):
            matrix = self._experts.get(args[1].data_ptr())
            if matrix is not None and args[1].ndim == 2:
                self.take(matrix, args[0])
        return func(*args, **(kwargs or {}))

    def take(self, matrix: LayerMatrix, x: Tensor) -> None:
        """Add the inputs that a matrix is given in this pass."""
        flat = x.reshape(-1, x.shape[-1])
        if not len(flat):
            return
        name = matrix.name
        if matrix.expert is None:
            if self._newest is None or self._newest[0] is not x:
                self._newest = x, name
            leader = self._leaders.setdefault(name, self._newest[1])
            if leader != name and leader == self._newest[1]:
                self.found[name] = self.found[leader]
                return
            if leader != name:  # shared its input in the first pass and does not now: that can't be undone
                raise RuntimeError(f"{name} is given another input than {leader} in one pass, and the same in another")
        statistics = self.found.setdefault(name, InputStatistics(self._wanted))
        # An expert is given some of the tokens, and which ones is not seen: each counts once.
        fits = self.counts_N is not None and len(self.counts_N) == len(flat) and ".experts." not in name
        if self._hold:
            self._held.append((statistics, flat.detach().clone(), fits))  # a layer may write into its inputs later
        else:
            statistics.add(flat, self.counts_N if fits else None)

    def add_held(self, weights_N: Tensor) -> None:
        """Add the inputs of a pass, each token with a weight beside its count.

        Args:
            weights_N: Weights of the tokens of the pass.
        """
        assert self.counts_N is not None
        counts_N = self.counts_N * weights_N
        self._total += float(self.counts_N.double().sum())
        self._weighted_total += float(counts_N.double().sum())
        for statistics, x, fits in self._held:
            statistics.add(x, counts_N if fits else None)
            if fits:
                self._weighted[id(statistics)] = statistics
        self._held.clear()


PRODUCTS = (torch.nn.functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
"""Functions by which models multiply with the weight of one expert."""


def _hook_of(observer: InputObserver, matrix: LayerMatrix) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        observer.take(matrix, args[0])

    return hook
