"""Everything that needs a GPU to be known: checks first, then short benchmarks. Run by `make gpu`.

    make gpu                             # 4.7 minutes on one large GPU
    make gpu ARGS="--json figures.json"  # all figures, as JSON
    make gpu ARGS=--dry                  # the same code with tiny sizes on a CPU
    make gpu ARGS="--only sampler,speed_sft"  # some items, by the beginning of their names, _ for a space

Every item runs in a process of its own: one that fails, hangs or breaks the GPU's state leaves the others alone. The
exit code is 1 where one failed. Items for which no time is left are skipped. README.md beside this file says more.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[1]))
# Whether there is a GPU is asked of its driver, so that this process never starts CUDA: children are forked from it.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

PRELOADED = [
    "peft", "datasets", "transformers.models.llama.modeling_llama", "transformers.models.qwen2.modeling_qwen2",
    "posttrain.runs.runner", "posttrain.methods.rl.rl_stage", "posttrain.methods.preference.offline",
    "posttrain.sampling.engine",
]  # fmt: skip
SHOWN = 9000
"""Characters of the closing report at most."""


@dataclass(frozen=True)
class Item:
    """name; where its function is, in this folder; seconds that it takes on a large GPU, more or less."""

    name: str
    home: str
    seconds: float


# In the order of their importance: what does not fit into the time is at the end. Seconds are those of an H100 where
# they were measured (benchmarks/results/gpu-h100.json), else estimates.
ITEMS = [
    Item("device", "run:device", 6),
    Item("speed sft 0.5B", "speed:sft_qwen", 25),
    Item("speed trl sft 0.5B", "peers:trl_sft", 48),
    Item("speed dpo 0.5B", "peers:own_dpo", 21),
    Item("speed trl dpo 0.5B", "peers:trl_dpo", 46),
    Item("speed grpo 0.5B", "peers:own_grpo", 57),
    Item("speed trl grpo 0.5B", "peers:trl_grpo", 72),
    Item("speed decoding 1.5B", "limits:decoding", 23),
    Item("speed sft 0.5B, compiled", "speed:sft_qwen_compiled", 25),
    Item("fsdp", "limits:fsdp", 15),
    Item("memory", "limits:memory", 15),
    Item("kernels", "kernels:check", 15),
    Item("attention", "attention:check", 4),
    Item("models", "models:check", 28),
    Item("masters", "models:masters", 17),
    Item("quantized", "quantized:check", 27),
    Item("sampler", "sampler:check", 75),
    Item("sft", "recipes:sft", 15),
    Item("dpo", "recipes:dpo", 15),
    Item("grpo", "recipes:grpo", 40),
    Item("killed", "recipes:killed", 35),
    Item("syncs", "syncs:check", 2),
    Item("varlen", "attention:probe", 1),
    Item("speed sft 135M", "speed:sft_smol", 5),
    Item("speed sampling", "speed:sampling", 22),
    Item("profile decoding", "limits:decoding_profile", 22),
    Item("profile 0.5B", "speed:profile_qwen", 22),
    Item("profile 135M", "speed:profile_smol", 20),
    Item("speed trl 135M", "speed:trl", 19),
    Item("speed sft 135M, compiled", "speed:sft_compiled", 17),
]


def device(where: Any) -> Any:
    """What all of this runs on."""
    import torch
    import transformers

    from gpu.base import Account

    numbers = {"torch": torch.__version__, "transformers": transformers.__version__, "python": sys.version.split()[0],
               "device": "cpu", "cuda": torch.version.cuda}  # fmt: skip
    if where.cuda:
        properties = torch.cuda.get_device_properties(0)
        numbers |= {"device": properties.name, "GiB": round(properties.total_memory / 2**30, 1),
                    "capability": list(torch.cuda.get_device_capability())}  # fmt: skip
    return Account(numbers=numbers, note=f"{numbers['device']}, torch {numbers['torch']}")


def work(item: Item, folder: Path, dry: bool) -> None:
    """One item, in a process of its own: its result goes to a file, and all that it prints to another."""
    out, log = folder / f"{item.name}.json", folder / f"{item.name}.log"
    os.setpgid(0, 0)  # so that it can be stopped together with what it has started
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    result: dict[str, Any] = {"status": "failed"}
    try:
        import torch

        from gpu.base import Where

        module, _, function = item.home.partition(":")
        found = getattr(importlib.import_module(f"gpu.{module}"), function)(
            Where(torch.device("cpu" if dry else "cuda"), folder, dry)
        )
        result = {"status": "failed" if found.failed else "ok", "note": found.note, "numbers": found.numbers}
        if found.failed:
            result["failed"] = found.failed
    except BaseException as error:
        result |= {"failed": [f"{type(error).__name__}: {error}"[:1500]], "traceback": traceback.format_exc()[-6000:]}
    out.write_text(json.dumps(result, default=str))


def started(item: Item, folder: Path, dry: bool) -> None:
    """The forked child. Where the parent has touched CUDA after all, a child can't: the program is started anew."""
    import torch

    if not dry and getattr(torch._C, "_cuda_isInBadFork", bool)():
        os.execv(sys.executable, [sys.executable, str(HERE), "--item", item.name, "--folder", str(folder)])
    work(item, folder, dry)


def carried_out(item: Item, folder: Path, dry: bool, left: float) -> dict[str, Any]:
    """The item's result; one that hangs is killed, one that dies is told by how it died."""
    began = time.perf_counter()
    process = multiprocessing.get_context("fork").Process(target=started, args=(item, folder, dry))
    process.start()
    process.join(max(20.0, left if dry else min(left, 30 + 4 * item.seconds)))
    result: dict[str, Any] = {"status": "failed"}
    out, log = folder / f"{item.name}.json", folder / f"{item.name}.log"
    if process.is_alive():
        assert process.pid is not None
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        result["failed"] = ["it was stopped: it took much longer than it should"]
    elif out.exists():
        result = json.loads(out.read_text())
    else:
        result["failed"] = [f"the process ended with status {process.exitcode} and left no result"]
    if result["status"] == "failed" and log.exists():
        result["printed"] = log.read_text(errors="replace")[-3000:]
    return {**result, "seconds": round(time.perf_counter() - began, 1)}


def told(results: dict[str, dict[str, Any]], seconds: float) -> str:
    """The table, with what failed below it; short enough to be read in a log's end."""
    from gpu.targets import reached

    lines = [*reached(results), "", f"{'item':<26}{'':<9}{'seconds':>8}"]
    for name, r in results.items():
        lines.append(f"{name:<26}{r['status']:<9}{r.get('seconds', 0):>8.1f}  {r.get('note', '')[:150]}")
    bad = {n: r for n, r in results.items() if r["status"] == "failed"}
    room = (SHOWN - sum(map(len, lines))) // max(1, len(bad))
    for name, r in bad.items():
        more = r.get("traceback", "") or "\n".join(r.get("printed", "").splitlines()[-8:])
        said = [f"--- {name}", *(f"  {line}" for line in r.get("failed", [])[:12])]
        lines.append("\n".join([*said, more[-max(200, room - sum(map(len, said))) :]])[:room])
    count = {s: sum(r["status"] == s for r in results.values()) for s in ("ok", "failed", "skipped")}
    return "\n".join([*lines, ", ".join(f"{n} {s}" for s, n in count.items()) + f", {seconds:.0f} s"])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What needs a GPU: checks, then short benchmarks.")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--minutes", type=float, help="time limit; what does not fit is skipped (4.7; dry: 30)")
    parser.add_argument("--json", type=Path, help="write all figures to this file, after every item")
    parser.add_argument("--only", default="", help="items to run, by the beginning of their names, with commas")
    parser.add_argument("--item", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    args = parse()
    minutes = args.minutes if args.minutes is not None else 30.0 if args.dry else 4.7
    began = time.perf_counter()
    if args.item:
        work(next(i for i in ITEMS if i.name == args.item), args.folder, args.dry)
        return 0
    for module in PRELOADED:
        importlib.import_module(module)
    results: dict[str, dict[str, Any]] = {}
    folder = Path(tempfile.mkdtemp(prefix="posttrain-gpu-"))
    os.environ["POSTTRAIN_CACHE"] = str(folder / "cache")
    try:
        for item in ITEMS:
            if args.only and not item.name.startswith(tuple(args.only.replace("_", " ").split(","))):
                continue
            left = 60 * minutes - (time.perf_counter() - began)
            if left < (1 if args.dry else item.seconds):
                results[item.name] = {"status": "skipped", "note": "out of time"}
            else:
                results[item.name] = carried_out(item, folder, args.dry, left)
            print(f"{item.name}: {results[item.name]['status']}", file=sys.stderr, flush=True)
            seconds = time.perf_counter() - began
            if args.json:
                text = json.dumps({"dry": args.dry, "seconds": round(seconds, 1), "items": results}, indent=1)
                args.json.write_text(text, encoding="utf-8")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(told(results, time.perf_counter() - began), flush=True)
    return int(any(r["status"] == "failed" for r in results.values()))


if __name__ == "__main__":
    sys.exit(main())
