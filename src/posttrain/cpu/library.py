"""Decoding steps and attention on a CPU through kernels of our own, compiled once on the machine that runs them.

torch's products reach half of the memory's bandwidth where rows are few, and what lies between two of them costs as
much again in small operations. `decode.c` has what a decoding step needs, down to a whole layer in one call (see
`models.layer`), `training.c` the same of many rows, forward and back, `tree.c` the attention of everything else (see
`models.tree`), `vocabulary.c` softmaxes over a vocabulary (see `models.vocabulary`) and draws from them. They are
compiled by the C compiler that the system has, into the cache folder, in some five seconds. Where there is none, where
torch brings no GNU OpenMP (whose threads the kernels share), or where a result is not torch's own to rounding,
everything goes through torch as before. `POSTTRAIN_NATIVE=0` switches the kernels off.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCES = [
    Path(__file__).parent.joinpath("csrc", name)
    for name in ("decode.c", "attention.c", "quantized.c", "training.c", "tree.c", "vocabulary.c")
]
HEADER = Path(__file__).parent / "csrc" / "kernels.h"
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-shared", "-fPIC", "-Wl,-Bsymbolic")
LEAST_COLUMNS = 8
"""What a tile needs; see `decode.c`."""

KeysValues = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
"""Keys and values of a region: each float32, or int8 and its scales; see `csrc/attention.c`."""

_state: dict[str, Any] = {}


class Packed(ctypes.Structure):
    """A weight (n, k) in few bits, in the layout of `quantized.c`; zero and order may be 0.

    kept: the tensors whose memory it points into.
    """

    kept: list[Tensor]

    _fields_ = (
        *((n, ctypes.c_void_p) for n in ("values", "zero", "order")),
        *((n, ctypes.c_long) for n in ("n", "k", "group", "bits")),
    )


class Matrix(ctypes.Structure):
    """x W^T + bias + scale (x A^T) B^T: w (n, k); bias may be 0, and so may a (rank, k) and b (n, rank).

    packed: in place of w, or null.
    """

    _fields_ = (
        *((n, ctypes.c_void_p) for n in ("w", "bias", "a", "b")),
        ("packed", ctypes.POINTER(Packed)),
        *((n, ctypes.c_long) for n in ("n", "rank")),
        ("scale", ctypes.c_float),
    )


class Layer(ctypes.Structure):
    """A decoder layer's weights and sizes, as `layer` in `decode.c` takes them. q_norm and k_norm may be 0.

    kept: the tensors whose memory it points into.
    """

    kept: list[Tensor]

    MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
    _fields_ = (
        *((n, ctypes.c_void_p) for n in ("norm", "after", "q_norm", "k_norm")),
        *((n, Matrix) for n in MATRICES),
        *((n, ctypes.c_long) for n in ("hidden", "heads", "kv", "size", "inner", "rank")),
        *((n, ctypes.c_float) for n in ("eps", "head_eps", "after_eps", "scale")),
    )


class Kernels:
    """The compiled library. Arguments are float32, on the CPU; nothing is checked here."""

    def __init__(self, path: Path) -> None:
        # PyDLL keeps Python's lock: the kernels' scratch memory is one, and a call takes milliseconds at most.
        self.lib = ctypes.PyDLL(str(path))
        pointer, long = ctypes.c_void_p, ctypes.c_long
        self.lib.use_threads.argtypes = [pointer, pointer, pointer, ctypes.c_int]
        self.lib.linear.argtypes = [pointer, pointer, pointer, pointer, long, long, long]
        self.lib.quantized_linear.argtypes = [pointer, ctypes.POINTER(Packed), pointer, pointer, long]
        self.lib.dequantize.argtypes = [ctypes.POINTER(Packed), pointer, pointer, long]
        self.lib.gated.argtypes = [pointer, pointer, pointer, long]
        self.lib.rms_norm_rows.argtypes = [pointer] * 3 + [long] * 2 + [ctypes.c_float] * 2
        self.lib.rms_norm_back.argtypes = [pointer] * 4 + [long] * 2 + [ctypes.c_float] * 2
        self.lib.gated_back.argtypes = [pointer] * 5 + [long]
        self.lib.attend.argtypes = [pointer] * 10 + [ctypes.c_float]
        self.lib.rotate_rows.argtypes = [pointer] * 6 + [long] * 3
        self.lib.draw.argtypes = [pointer] * 4 + [long] * 2
        self.lib.layer.argtypes = [ctypes.POINTER(Layer)] + [pointer] * 9
        self.lib.use_whole_vectors.argtypes = [ctypes.c_int]
        self.lib.absorb.argtypes = [pointer] * 4 + [long] * 2 + [ctypes.c_int]
        self.lib.tree_attention.argtypes = [pointer] * 8 + [ctypes.c_float] + [pointer] * 2
        self.lib.tree_attention_back.argtypes = [pointer] * 8 + [ctypes.c_float] + [pointer] * 6
        nothing = ("gated", "gated_back", "rms_norm_rows", "rms_norm_back", "rotate_rows", "absorb", "dequantize")
        for name in ("use_threads", "use_whole_vectors", *nothing):
            getattr(self.lib, name).restype = None
        self.openmp = _openmp()
        names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
        self.entries = [ctypes.cast(getattr(self.openmp, name), pointer) for name in names]
        self.threads = 0
        self.lib.use_whole_vectors(self._whole_vectors())

    def _whole_vectors(self) -> bool:
        """Measure whether 24 rows take as long as two vectors of 16.

        One processor multiplies a vector at once and another in two parts, and neither reports it. The results are the
        same.
        """
        x, weight = (torch.ones(n, 512, dtype=torch.float32, device="cpu") for n in (24, 480))
        times = []
        for whole in (False, True):
            self.lib.use_whole_vectors(whole)
            taken = []
            for _ in range(8):
                began = time.perf_counter()
                self.linear(x, weight)
                taken.append(time.perf_counter() - began)
            times.append(min(taken))
        return times[1] < 1.1 * times[0]

    def use_threads(self) -> None:
        """Use as many threads as torch does now."""
        count = torch.get_num_threads()
        if count != self.threads:
            self.lib.use_threads(*self.entries, count)
            self.threads = count

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute x W^T + b.

        Args:
            x: (..., K).
            weight: (N, K), contiguous, with N >= LEAST_COLUMNS.
            bias: (N,).
        """
        if not x.is_contiguous():
            x = x.contiguous()
        *before, k = x.shape
        n = weight.shape[0]
        y = x.new_empty(*before, n)
        self.use_threads()
        bias_at = 0 if bias is None else bias.data_ptr()
        if self.lib.linear(x.data_ptr(), weight.data_ptr(), bias_at, y.data_ptr(), x.numel() // k, k, n):
            raise MemoryError("no memory for a decoding step's rows")
        return y

    def quantized_linear(self, x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
        """Compute x W^T + b of a weight in few bits.

        Args:
            x: (..., k).
            packed: W (n, k), see `posttrain.cpu.quantized_matmul`.
            bias: (n,).
        """
        if not x.is_contiguous():
            x = x.contiguous()
        y = x.new_empty(*x.shape[:-1], packed.n)
        self.use_threads()
        bias_at = 0 if bias is None else bias.data_ptr()
        if self.lib.quantized_linear(x.data_ptr(), packed, bias_at, y.data_ptr(), x.numel() // packed.k):
            raise MemoryError("no memory for a decoding step's rows")
        return y

    def dequantize(self, packed: Packed, rows: Tensor | None = None) -> Tensor:
        """Return rows of a weight in few bits as float32: (..., k).

        Args:
            packed: The weight (n, k), see `posttrain.cpu.quantized_matmul`.
            rows: Integers of any shape, from 0 to n - 1. None: all rows.

        Raises:
            IndexError: A row is not one of the weight's.
        """
        shape = (packed.n,) if rows is None else tuple(rows.shape)
        if rows is not None:
            rows = rows.long().contiguous()
            least, most = (int(x) for x in rows.aminmax()) if rows.numel() else (0, 0)
            if least < 0 or most >= packed.n:
                raise IndexError(f"rows are {least} to {most}, and must be 0 to {packed.n - 1}")
        y = torch.empty(*shape, packed.k)
        self.use_threads()
        at = 0 if rows is None else rows.data_ptr()
        self.lib.dequantize(packed, at, y.data_ptr(), y.numel() // packed.k)
        return y

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """Compute silu(gate) * up, both contiguous and of one shape."""
        y = torch.empty_like(gate)
        self.use_threads()
        self.lib.gated(gate.data_ptr(), up.data_ptr(), y.data_ptr(), gate.numel())
        return y

    def gated_back(self, gate: Tensor, up: Tensor, d: Tensor, in_place: bool) -> tuple[Tensor, Tensor]:
        """Compute the gradients of gate and up from that of silu(gate) * up. All tensors are contiguous.

        Args:
            gate: As `gated` takes it.
            up: Likewise.
            d: Gradient of the result.
            in_place: The gradient of gate takes the place of `d`.
        """
        d_gate, d_up = d if in_place else torch.empty_like(d), torch.empty_like(d)
        self.use_threads()
        self.lib.gated_back(*(x.data_ptr() for x in (gate, up, d, d_gate, d_up)), gate.numel())
        return d_gate, d_up

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, shift: float, out: Tensor | None = None) -> Tensor:
        """Compute x / sqrt(mean(x^2) + eps) (weight + shift) over the last dimension.

        Args:
            x: Contiguous.
            weight: Of the last dimension.
            eps: Added to the mean.
            shift: Added to the weight.
            out: Memory for the result, contiguous. None: fresh.
        """
        y, h = torch.empty_like(x) if out is None else out, x.shape[-1]
        self.use_threads()
        self.lib.rms_norm_rows(x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.numel() // h, h, eps, shift)
        return y

    def rms_norm_back(self, x: Tensor, weight: Tensor, dy: Tensor, eps: float, shift: float) -> Tensor:
        """Compute the gradient of x from that of `rms_norm`.

        Args:
            x: As there, and so the others.
            weight: Likewise.
            dy: Gradient of the result, contiguous.
            eps: Likewise.
            shift: Likewise.
        """
        dx, h = torch.empty_like(x), x.shape[-1]
        self.use_threads()
        at = (t.data_ptr() for t in (x, weight, dy, dx))
        self.lib.rms_norm_back(*at, x.numel() // h, h, eps, shift)
        return dx

    def rotate(self, x: Tensor, cosine: Tensor, sine: Tensor, out: Tensor | None = None) -> Tensor:
        """Compute x cos + (-x_2, x_1) sin.

        Args:
            x: (heads, M, size) with last stride 1.
            cosine: (M, size), contiguous.
            sine: (M, size), contiguous.
            out: Memory for the result, with last stride 1. None: fresh.
        """
        y = torch.empty_like(x) if out is None else out
        strides = [(ctypes.c_long * 2)(t.stride(0), t.stride(1)) for t in (x, y)]
        self.use_threads()
        self.lib.rotate_rows(
            x.data_ptr(), strides[0], cosine.data_ptr(), sine.data_ptr(), y.data_ptr(), strides[1], *x.shape
        )
        return y

    def layer(
        self,
        layer: Layer,
        x: Tensor,
        cosine: Tensor,
        sine: Tensor,
        own: KeysValues,
        shared: KeysValues | None,
        columns: Tensor,
        prompts: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """Compute a whole decoder layer.

        Args:
            layer: Its weights.
            x: (M, hidden), contiguous.
            cosine: (M, size), contiguous.
            sine: (M, size), contiguous.
            own: As `attend` takes it, and so the others.
            shared: Likewise.
            columns: Likewise.
            prompts: Likewise.
        """
        y = torch.empty_like(x)
        self.use_threads()
        sizes = (ctypes.c_long * 3)(len(x), own[0][0].shape[2], 0 if shared is None else shared[0][0].shape[2])
        at = (None if t is None else t.data_ptr() for t in (columns, *(prompts or (None, None))))
        tensors = (t.data_ptr() for t in (x, y, cosine, sine))
        if self.lib.layer(layer, *tensors, _addresses(own, shared), *at, sizes):
            raise MemoryError("no memory for a decoding step")
        return y

    def draw(self, logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Draw (tokens, log-probabilities), as `sampling.token_sampling`.

        Logits (M, V) contiguous, uniforms float64.
        """
        rows, vocabulary = logits.shape
        tokens, logprobs = torch.empty(rows, dtype=torch.long), logits.new_empty(rows)
        self.use_threads()
        if self.lib.draw(
            logits.data_ptr(), uniforms.data_ptr(), tokens.data_ptr(), logprobs.data_ptr(), rows, vocabulary
        ):
            raise MemoryError("no memory for drawing tokens")
        return tokens, logprobs

    def absorb(self, z: Tensor, top: Tensor, total: Tensor, weighted: Tensor | None, keep: bool) -> None:
        """Add a tile of logits to each row's softmax, in place. All tensors are contiguous.

        Args:
            z: Logits (M, V).
            top: The largest so far.
            total: Sum of e^(z - top).
            weighted: Sum of e^(z - top) (z - top), if wanted.
            keep: z becomes e^(z - top).
        """
        self.use_threads()
        at = 0 if weighted is None else weighted.data_ptr()
        self.lib.absorb(z.data_ptr(), top.data_ptr(), total.data_ptr(), at, *z.shape, keep)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        own: KeysValues,
        shared: KeysValues | None,
        columns: Tensor,
        prompts: tuple[Tensor, Tensor] | None,
        window: int | None,
        scale: float,
    ) -> Tensor:
        """Compute attention of the newest tokens.

        Args:
            query: (heads, M, size).
            key: (kv heads, M, size).
            value: (kv heads, M, size).
            own: Keys and values, (slots, kv heads, columns, size) contiguous; row i is in slot i.
            shared: Keys and values of prompts, likewise.
            columns: Where each row's newest token goes.
            prompts: (slot in shared, length) of each row.
            window: How many of the last positions are seen, the newest included (None: all).
            scale: Multiplies the scores.

        Returns:
            (M, heads, size).
        """
        heads, rows, size = query.shape
        kv = key.shape[0]
        out = query.new_empty(rows, heads, size)
        self.use_threads()
        strides = (ctypes.c_long * 6)(*(x.stride(i) for x in (query, key, value) for i in (0, 1)))
        wide = 0 if shared is None else shared[0][0].shape[2]
        sizes = (ctypes.c_long * 7)(rows, kv, heads // kv, size, own[0][0].shape[2], wide, window or 0)
        prompts_at = (0, 0) if prompts is None else tuple(x.data_ptr() for x in prompts)
        failed = self.lib.attend(
            query.data_ptr(), key.data_ptr(), value.data_ptr(), strides, _addresses(own, shared), out.data_ptr(),
            columns.data_ptr(), *prompts_at, sizes, scale,
        )  # fmt: skip
        if failed:
            raise MemoryError("no memory for a decoding step's attention")
        return out


def _addresses(own: KeysValues, shared: KeysValues | None) -> Any:
    """Return eight addresses: keys, their scales, values, their scales, of both regions; null for what is missing."""
    parts = (*own, *(shared or ((), ())))
    pairs = ((*(t.data_ptr() for t in part), *(None,) * (2 - len(part))) for part in parts)
    return (ctypes.c_void_p * 8)(*(address for pair in pairs for address in pair))


def kernels() -> Kernels | None:
    """Return the compiled kernels, or None if they are not available (`why` has the reason); found once a process."""
    if "kernels" not in _state:
        _state["kernels"] = None
        try:
            _state["kernels"] = _open()
        except _Unavailable as e:
            _state["why"] = str(e)
    return _state["kernels"]  # type: ignore[no-any-return]


def is_plain(weight: Tensor) -> bool:
    """Return True for a tensor that a kernel can read: float32 without gaps on the CPU, no subclass."""
    known = type(weight) in (Tensor, torch.nn.Parameter) and weight.device.type == "cpu"
    return known and weight.dtype == torch.float32 and weight.is_contiguous()


def fits(weight: Tensor) -> bool:
    """Return True if `Kernels.linear` can take this matrix."""
    return is_plain(weight) and weight.shape[0] >= LEAST_COLUMNS


def why() -> str:
    """Write that the kernels are in use, or why not."""
    return "compiled kernels" if kernels() is not None else f"torch ({_state['why']})"


class _Unavailable(Exception):
    pass


def _open() -> Kernels:
    if os.environ.get("POSTTRAIN_NATIVE", "1") == "0":
        raise _Unavailable("POSTTRAIN_NATIVE is 0")
    if sys.maxsize < 2**32 or not sys.platform.startswith("linux"):
        raise _Unavailable("kernels are for 64-bit Linux")
    path = _compiled()
    try:
        found = Kernels(path)
    except (OSError, AttributeError) as e:
        raise _Unavailable(f"the compiled kernels can't be loaded: {e}") from e
    from posttrain.cpu.kernel_checks import is_exact

    if not is_exact(found):
        raise _Unavailable("the compiled kernels are not exact on this processor")
    return found


def _openmp() -> ctypes.CDLL:
    """The OpenMP library that torch itself uses, so that there is one pool of threads."""
    for path in sorted(Path(torch.__file__).parent.joinpath("lib").glob("libgomp*")):
        return ctypes.CDLL(str(path))
    raise OSError("torch brings no GNU OpenMP library")


def _compiled() -> Path:
    """The shared library for this source, compiler and processor; compiled if it is not there yet."""
    from posttrain.core.files import cache_folder

    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise _Unavailable("no C compiler: cc, gcc and clang are not on the PATH")
    try:
        said = subprocess.run([compiler, "--version"], capture_output=True, timeout=30).stdout
        parts = (*(p.read_bytes() for p in (*SOURCES, HEADER)), repr(FLAGS).encode(), said, _processor())
        name = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
        path = cache_folder() / "native" / f"kernels-{name}.so"
        if path.exists():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            fresh = Path(folder) / "kernels.so"
            done = subprocess.run(
                [compiler, *FLAGS, *map(str, SOURCES), "-o", str(fresh)], capture_output=True, text=True, timeout=600
            )
            if done.returncode:
                raise _Unavailable(f"{compiler} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
            os.replace(fresh, path)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise _Unavailable(f"compiling failed: {e}") from e
    return path


def _processor() -> bytes:
    """Return what -march=native depends on: machines may share a cache folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return b""
    kept = {line for line in lines if line.split(":")[0].strip() in ("model name", "flags", "Features", "CPU part")}
    return "\n".join(sorted(kept)).encode()
