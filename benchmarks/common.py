"""What the benchmarks share: their data, the operations a step needs, the machine's matrix rate, memory."""

from __future__ import annotations

import csv
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Conversation = dict[str, list[int]]
"""{"input_ids": ids, "completion_mask": 1 on tokens that carry loss}, as TRL takes pre-tokenised rows."""
Batch = list[Conversation]


# ---------------------------------------------------------------------------------------------------------------- data
def texts(path: Path) -> list[str]:
    """The column `text` of a TSV file."""
    with path.open(encoding="utf-8", newline="") as file:
        return [row["text"] for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]


def running_text(tsv: Path, rng: random.Random, encode: Callable[[str], list[int]]) -> Callable[[int], list[int]]:
    """Return what gives n tokens of reviews, one after the other in random order, at each call."""
    reviews, stream = texts(tsv), list[int]()
    rng.shuffle(reviews)

    def source(count: int) -> list[int]:
        while len(stream) < count:
            stream.extend(encode(reviews.pop() + " "))
        taken = stream[:count]
        del stream[:count]
        return taken

    return source


def plain_encoder(tokenizer: Any) -> Callable[[str], list[int]]:
    """Return what encodes text without special tokens."""
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False))


def lengths(count: int, shortest: int, longest: int, rng: random.Random) -> list[int]:
    """Lengths spread evenly on a logarithmic scale, the shortest and the longest among them, in random order."""
    ratio = longest / shortest
    inner = [round(shortest * ratio ** ((i + rng.random()) / (count - 2))) for i in range(count - 2)]
    drawn = [shortest, *inner, longest]
    rng.shuffle(drawn)
    return drawn


def conversation(length: int, source: Callable[[int], list[int]], tokenizer: Any) -> Conversation:
    """A ChatML conversation of exactly `length` tokens: user and assistant turns of reviews, the assistant's learnt.

    source: gives n tokens of running review text. A turn's end token is learnt where the turn is, the newline after it
    is not. No system turn: a shared prefix would be an advantage of its own, and is not what is measured here.
    """

    encode = plain_encoder(tokenizer)
    start, end, newline = encode("<|im_start|>"), encode("<|im_end|>"), encode("\n")
    heads = [start + encode("user\n"), start + encode("assistant\n")]
    exchanges = 1 + length // 200
    frame = exchanges * (sum(map(len, heads)) + 2 * len(end) + 2 * len(newline)) - len(newline)
    if length < frame + 2 * exchanges:
        raise ValueError(f"a conversation takes {frame + 2 * exchanges} tokens at least, and {length} were asked for")
    free, turns = length - frame, 2 * exchanges
    ids: list[int] = []
    mask: list[int] = []
    for turn in range(turns):
        body = source(free * (turn + 1) // turns - free * turn // turns)
        learnt = turn % 2
        after = newline if turn < turns - 1 else []
        ids += heads[learnt] + body + end + after
        mask += [0] * len(heads[learnt]) + [learnt] * (len(body) + len(end)) + [0] * len(after)
    return {"input_ids": ids, "completion_mask": mask}


def make_batches(
    steps: int, size: int, shortest: int, longest: int, seed: int, tokenizer: Any | None, tsv: Path | None, vocab: int
) -> list[Batch]:
    """The batches of a run, the same for the same arguments: conversations made of reviews, or, without a tokenizer,
    of random ids (half of each learnt), which is all that a model with random weights needs."""
    rng = random.Random(seed)
    drawn = [lengths(size, shortest, longest, rng) for _ in range(steps)]
    if tokenizer is None or tsv is None:
        return [
            [{"input_ids": rng.choices(range(3, vocab), k=n), "completion_mask": [int(i >= n // 2) for i in range(n)]}
             for n in batch] for batch in drawn
        ]  # fmt: skip
    source = running_text(tsv, rng, plain_encoder(tokenizer))
    return [[conversation(n, source, tokenizer) for n in batch] for batch in drawn]


def counts(batch: Batch) -> dict[str, int]:
    """Tokens, loss tokens, and causal pairs of a query and a key of a batch."""
    sizes = [len(c["input_ids"]) for c in batch]
    return {
        "tokens": sum(sizes),
        "loss_tokens": sum(sum(c["completion_mask"][1:]) for c in batch),
        "pairs": sum(n * (n + 1) // 2 for n in sizes),
    }


# ---------------------------------------------------------------------------------------------------------- operations
def shapes(model: nn.Module) -> tuple[Counter[tuple[int, int]], tuple[int, int]]:
    """Linear layers of a causal language model as {(outputs, inputs): how many}, and the output head's (V, H)."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    found = Counter(
        (m.out_features, m.in_features) for m in model.modules() if isinstance(m, nn.Linear) and m is not head
    )
    return found, (int(head.weight.shape[0]), int(head.weight.shape[1]))


def operations(model: nn.Module, batch: Batch, rank: int = 0) -> float:
    """Floating point operations that a training step on the batch can't do without; a multiply-add is two.

        layers     6 P T       P parameters of all linear layers but the head, T tokens: 2 forward, 4 backward (the
                               gradients of inputs and of weights); with LoRA 4 P T, for frozen weights get no gradient,
                               and 6 p T for the p parameters of the adapters of rank r: p = r (outputs + inputs)
        head       6 V H N     N loss tokens only; 4 V H N with LoRA
        attention  12 A L C    C causal pairs (each query with itself and what is before it), L layers, A = heads times
                               head dimension: 2 A a pair for the scores, 2 A for the values, and twice that backward

    With LoRA the first layer's inputs need no gradient either; that half per cent or less is not subtracted.
    Recomputation, padding, masked pairs, and the head on prompt tokens are work that someone does, not work that is
    needed. Norms, activations, embeddings, softmax and the optimizer are not counted: they are not matrix products.
    """
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    n, (layers, (vocab, hidden)) = counts(batch), shapes(model)
    weights = sum(o * i * k for (o, i), k in layers.items())
    passes = 4 if rank else 6
    adapters = sum(rank * (o + i) * k for (o, i), k in layers.items())
    width = config.num_attention_heads * (getattr(config, "head_dim", None) or hidden // config.num_attention_heads)
    return float(
        passes * weights * n["tokens"]
        + 6 * adapters * n["tokens"]
        + passes * vocab * hidden * n["loss_tokens"]
        + 12 * width * config.num_hidden_layers * n["pairs"]
    )


# ---------------------------------------------------------------------------------------------------- the matrix rate
def use_route(route: str) -> None:
    """Choose what multiplies float32 matrices on a CPU: `default` (MKL in most builds of torch) or `onednn`.

    torch hands products to oneDNN only when told that reduced precision will do; on a CPU without AMX, oneDNN has no
    faster reduced-precision kernel for them and runs its float32 one, which `error` in `matrix_rates` shows.
    """
    if route == "onednn":
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # type: ignore[attr-defined]
    else:
        torch.backends.mkldnn.matmul.fp32_precision = "ieee"  # type: ignore[attr-defined]


def best_seconds(product: Callable[[], Tensor], repeats: int) -> float:
    """Seconds of the fastest of several runs, after one that is not counted."""
    device = product().device
    found = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        product()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return min(found)


def matrix_rates(model: nn.Module, batch: Batch, dtype: torch.dtype, device: str, repeats: int = 7) -> dict[str, float]:
    """Operations a second of this step's own matrix products: forward, input gradient and weight gradient of every
    linear layer at the batch's tokens, and of the head at its loss tokens, each at its fastest.

    Returns `rate` (all of them together, each as often as the step does it), `best` (the fastest single product) and
    `error` (largest difference from float64, as a part of the largest entry).
    """
    n, (layers, head) = counts(batch), shapes(model)
    operations_done = seconds = best = error = 0.0
    for (out, inp), times, rows in [(s, k, n["tokens"]) for s, k in layers.items()] + [(head, 1, n["loss_tokens"])]:
        x = torch.randn(rows, inp, device=device, dtype=dtype)
        w = torch.randn(out, inp, device=device, dtype=dtype)
        g = torch.randn(rows, out, device=device, dtype=dtype)
        some = slice(0, 64)
        exact = x[some].double() @ w.double().t()
        error = max(error, float(((x @ w.t())[some].double() - exact).abs().max() / exact.abs().max()))
        for product in (lambda: x @ w.t(), lambda: g @ w, lambda: g.t() @ x):  # noqa: B023
            took = best_seconds(product, repeats)
            each = 2.0 * rows * out * inp
            operations_done += times * each
            seconds += times * took
            best = max(best, each / took)
    return {"rate": operations_done / seconds, "best": best, "error": error}


# --------------------------------------------------------------------------------------------------- model and memory
def random_qwen(folder: Path, layers: int = 24) -> str:
    """A Qwen2 in the shape of the 0.5B one, with random weights."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    Qwen2ForCausalLM(config).save_pretrained(folder / "model")
    return str(folder / "model")


def peak_memory_mib(device: str) -> float:
    """Highest resident memory of this process so far (CPU: VmHWM, else ru_maxrss), or highest allocated on the GPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024


def median(values: list[float]) -> float:
    """The median, or not-a-number of nothing."""
    return statistics.median(values) if values else float("nan")


def write_json(path: str | Path, value: Any) -> None:
    Path(path).write_text(json.dumps(value, indent=1), encoding="utf-8")


def read_json(path: str | Path) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8"))


# ----------------------------------------------------------------------------------------------------------- processes
def in_child(job: Mapping[str, Any], python: str, script: Path, folder: Path, fresh: bool = False) -> dict[str, Any]:
    """Run `script --child FILE` in a process of its own, and return what it wrote into FILE.out.

    Args:
        job: What the process is told, as JSON in FILE; `who` and `settings` name it.
        python: The Python that runs it.
        script: The benchmark.
        folder: Folder of the files.
        fresh: Nothing is known from an earlier run: posttrain's cache is empty.

    Raises:
        SystemExit: It failed; with the end of what it printed.
    """
    path = folder / f"{job['who']}-{time.monotonic_ns()}.json"
    write_json(path, dict(job))
    quiet = {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    if fresh:
        quiet["POSTTRAIN_CACHE"] = str(folder / f"cache-{time.monotonic_ns()}")
    command = [python, str(script), "--child", str(path)]
    done = subprocess.run(command, env={**os.environ, **quiet}, capture_output=True, text=True)
    out = Path(f"{path}.out")
    if done.returncode or not out.exists():
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-25:])
        told = job["settings"] or "its defaults"
        raise SystemExit(f"{job['who']} with {told} failed (exit {done.returncode}):\n{tail}")
    return dict(read_json(out))
