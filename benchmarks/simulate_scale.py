"""Simulate reinforcement learning on 8 to 1,024 GPUs, and write the tables and the chart of docs/scale.md.

    python benchmarks/simulate_scale.py                     # simulates what is missing from the figures (an hour)
    python benchmarks/simulate_scale.py --only calibration  # one part: calibration, sweep, changes, failures
    python benchmarks/simulate_scale.py --tables            # rewrites the tables and the chart from the figures
    python benchmarks/simulate_scale.py --check             # fails if the page is not what the figures say

The figures are in benchmarks/results/scale.json, written after every run, so that an interrupted simulation resumes.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from scale import plans, published
from scale.parts import DENSE, H100, MIXTURE, Engine, dispatch_seconds, sharded_seconds, with_mean
from scale.plans import SIZES, Workload

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ROOT / "benchmarks" / "results" / "scale.json"
PAGE = ROOT / "docs" / "scale.md"
CHART = ROOT / "docs" / "experiments" / "scale" / "throughput.svg"
MODELS = {"32B": DENSE, "235B-A22B": MIXTURE}
BLOCK = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(?P<end><!-- end of table -->)", re.DOTALL)
STALE = (0, 1, 2, 4)
GPU_HOURS = {"Llama 3": 54 * 24 * 16384 / 419, "Meta's clusters": 7.9 * 1024}
"""Hours of a GPU to a failure."""
RESTART = 300.0
"""Seconds until a lost part runs again (an assumption)."""
CHECKPOINT = 10
"""Updates from one checkpoint to the next (an assumption)."""


class Figures:
    """Results by name, kept in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        """Return the value of this name; make and keep it if it is missing."""
        if name not in self.values:
            self.values[name] = make()
            self.path.write_text(json.dumps(self.values, indent=1) + "\n")
            print(name, json.dumps(self.values[name])[:200], flush=True)
        return self.values[name]


def constants() -> dict[str, Any]:
    """Return what the published figures set."""
    engine, shares = published.calibrated()
    return {"engine": asdict(engine), "shares": shares, "transfer": asdict(published.transfer()),
            "own engine": asdict(published.own_engine())}  # fmt: skip


def workload(found: dict[str, Any]) -> Workload:
    """Return the workload of the page.

    The mixture of 235B trains at the share that the published step of 30B-A3B reaches: that of 235B-A22B, 2%, is of an
    update of 512 sequences, which leaves its pipeline of eight stages idle for most of the time.
    """
    shares = {DENSE.name: found["shares"]["32B"], MIXTURE.name: found["shares"]["30B-A3B"]}
    return Workload(Engine(**found["engine"]), published.transfer(), shares)


def division(figures: Figures, name: str, gpus: int, work: Workload) -> tuple[int, int] | None:
    found = figures.get(f"{name}, {gpus} GPUs: division", lambda: plans.divided(MODELS[name], gpus, work))
    return tuple(found) if found else None  # type: ignore[return-value]


def check(work: Workload) -> dict[str, Any]:
    """Return the figures of a small run, which a test repeats."""
    return plans.point(DENSE, 32, (24, 8), 1, replace(work, prompts=4, lengths=with_mean(500, 1.0, 2000)), 2)


def sweep(figures: Figures, work: Workload) -> None:
    """All sizes: sampling and training in turn on all GPUs, and apart with four bounds of staleness."""
    for gpus in SIZES:
        for name, model in MODELS.items():
            if gpus >= plans.trainers_needed(model):
                figures.get(f"{name}, {gpus} GPUs: in turn", partial(plans.point, model, gpus, None, 0, work))
            parts = division(figures, name, gpus, work)
            for stale in STALE if parts else ():
                run = partial(plans.point, model, gpus, parts, stale, work)
                figures.get(f"{name}, {gpus} GPUs: staleness {stale}", run)


def changes(found: dict[str, Any], work: Workload, name: str) -> dict[str, Workload]:
    """Return the workloads of the sensitivity table: one constant of the base changed in each."""
    shares, engine = dict(work.shares), work.engine
    own = replace(Engine(**found["own engine"]), most=engine.most)

    def training(share: float) -> Workload:
        return replace(work, shares={**shares, MODELS[name].name: share})

    mixture = {"training reaches 2.2% (235B-A22B's published step)": training(found["shares"]["235B-A22B"]),
               "training reaches 33.8% (AutoModel, a mixture of 120B)": training(334e12 / H100.operations)}  # fmt: skip
    dense = {"training reaches 15%": training(0.15), "training reaches 45%": training(0.45)}
    return {
        **(mixture if MODELS[name].experts else dense),
        "sampler: twice the overhead of a sequence": replace(
            work, engine=replace(engine, sequence=engine.sequence * 2)
        ),
        "sampler: overheads of posttrain's engine": replace(work, engine=own),
        "lengths: sigma 1.5": replace(work, lengths=with_mean(6000, 1.5, 32768)),
        "weights: a quarter of the rate": replace(work, transfer=replace(work.transfer, rate=work.transfer.rate / 4)),
        "weights: moved while samplers decode": replace(work, hidden=True),
        "keys and values recomputed for new weights": replace(work, recompute=True),
        "rewards of 30 s": replace(work, reward=30.0),
        "lengths: sigma 0.5": replace(work, lengths=with_mean(6000, 0.5, 32768)),
        "memory's bandwidth: 60% in place of 80%": replace(work, engine=replace(engine, efficiency=0.6)),
        "computing of samplers: 25% in place of 50%": replace(work, engine=replace(engine, compute=0.25)),
    }


SMALL_RUNS = {"32B": (32, 32, 32), "235B-A22B": (64, 56, 72)}
"""Groups of an update, trainers, and GPUs that sample: as much work for a GPU as in the sweep on 256 GPUs."""


def sensitivity(figures: Figures, work: Workload) -> None:
    """Smaller updates on fewer GPUs at staleness 1, with one constant changed."""
    for name, model in MODELS.items():
        prompts, trainers, sampling = SMALL_RUNS[name]
        bases = {"base": work, **changes(figures.values["constants"], work, name)}
        for change, changed in bases.items():
            small = replace(changed, prompts=prompts)
            make = partial(plans.point, model, trainers + sampling, (trainers, sampling), 1, small, 4)
            figures.get(f"{name}, small run, {change}", make)


def failures(figures: Figures, work: Workload) -> None:
    """Seconds that a lost trainer and a lost sampler cost, on 1,024 GPUs at staleness 1."""
    for name, model in MODELS.items():
        parts = division(figures, name, 1024, work)
        assert parts is not None
        plan = replace(plans.apart(model, *parts, 1, work), restart=RESTART, checkpoint=CHECKPOINT)
        figures.get(f"{name}, 1024 GPUs: lost parts", partial(plans.cost_of_failure, plan))


# ------------------------------------------------------------------------------------------------------------- the page
def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a table of Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in [head, *rows]]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]]) + "\n"


def rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def constants_table(values: dict[str, Any]) -> str:
    found, own = values["constants"]["engine"], values["constants"]["own engine"]
    shares, moving = values["constants"]["shares"], values["constants"]["transfer"]
    micro = 1e6
    rows = [
        ["sampler, seconds of a layer in a step", f"{found['layer'] * micro:.0f} µs", "vLLM"],
        ["the same, sampler over two nodes", f"{found['layer_across'] * micro:.0f} µs", "NeMo-RL"],
        ["sampler, seconds of a sequence in a step", f"{found['sequence'] * micro:.0f} µs", "vLLM"],
        ["posttrain's engine: layer; sequence", f"{own['layer'] * micro:.0f}; {own['sequence'] * micro:.1f} µs",
         "posttrain"],
        *[[f"training, share of 989 TFLOP/s: {name}", f"{share:.1%}", "NeMo-RL"] for name, share in shares.items()],
        ["weights, bytes per second", f"{moving['rate'] / 1e9:.1f} GB/s", "checkpoint-engine"],
        ["weights, seconds for each doubling of the samplers", f"{moving['doubling']:.3f}", "checkpoint-engine"],
        *[[f"hours of a GPU to a failure ({name})", f"{hours:,.0f}", name] for name, hours in GPU_HOURS.items()],
        ["an hour of a GPU", "$2", "DeepSeek"],
        ["sampler: share of the memory's bandwidth; of the operations", "80%; 50%", "assumption"],
        ["training state, bytes for a parameter; share of the memory", "16; 85%", "assumption"],
        ["a reward: seconds of a worker; workers", "1; one for each GPU", "assumption"],
        ["restart of a lost part; updates between checkpoints", f"{RESTART:.0f} s; {CHECKPOINT}", "assumption"],
    ]  # fmt: skip
    return table(["constant", "value", "source"], rows)


def sources_table(values: dict[str, Any]) -> str:
    return table(["source", "what it is"], [[name, text] for name, text in published.SOURCES.items()])


def validation_table(values: dict[str, Any]) -> str:
    rows = [
        [r["source"], r["what"], rate(r["published"]), rate(r["simulated"]),
         "sets a constant" if r["fitted"] else f"{r['error']:+.0%}"]
        for r in values["validation"]
    ]  # fmt: skip
    return table(["source", "figure", "published", "simulated", "error"], rows)


def gains_table(values: dict[str, Any]) -> str:
    """The gain of asynchronous over synchronous tokens per second and GPU, published and simulated."""
    by = {r["what"].removesuffix(": seconds of a step"): r for r in values["validation"]}
    rows = []
    for name, synchronous, asynchronous, ratio in (
        ("32B", "32B, synchronous, 32 GPUs", "32B, one update stale, 32 + 32 GPUs", 2),
        ("235B-A22B", "235B-A22B, synchronous, 256 GPUs", "235B-A22B, one update stale, 128 + 128 GPUs", 1),
        ("30B-A3B", "30B-A3B, synchronous, 32 GPUs", "30B-A3B, one update stale, 16 + 16 GPUs", 1),
        ("30B-A3B", "30B-A3B, synchronous, 32 GPUs", "30B-A3B, eight updates stale, 128 + 64 GPUs", 6),
    ):
        gains = [by[synchronous][k] / by[asynchronous][k] / ratio for k in ("published", "simulated")]
        rows.append(
            [name, asynchronous.split(", ", 1)[1], *(f"{g:.2f}" for g in gains), f"{gains[1] / gains[0] - 1:+.0%}"]
        )
    return table(["model", "against synchronous", "published", "simulated", "error"], rows)


def throughput_table(name: str) -> Callable[[dict[str, Any]], str]:
    def make(values: dict[str, Any]) -> str:
        columns = ["in turn", *(f"staleness {s}" for s in STALE)]
        rows = []
        for gpus in SIZES:
            found: list[Any] = [values.get(f"{name}, {gpus} GPUs: {c}") for c in columns]
            parts = values.get(f"{name}, {gpus} GPUs: division")
            cells = [rate(f["completions per second"]) if f else "–" for f in found]
            best = [f["dollars per million completions"] for f in (found[0], found[2]) if f]
            cost = " / ".join(f"{b:,.0f}" for b in best) or "–"
            rows.append([f"{gpus:,}", f"{parts[0]} + {parts[1]}" if parts else "–", *cells, cost])
        head = ["GPUs", "trainers + samplers", "in turn", *(f"apart, {s}" for s in STALE), "$, in turn / apart, 1"]
        return table(head, rows)

    return make


def detail_table(name: str) -> Callable[[dict[str, Any]], str]:
    def make(values: dict[str, Any]) -> str:
        rows = []
        for gpus in SIZES:
            for label, run in (("in turn", "in turn"), ("apart, 1", "staleness 1"), ("apart, 4", "staleness 4")):
                f = values.get(f"{name}, {gpus} GPUs: {run}")
                if f:
                    rows.append([
                        f"{gpus:,}", label, rate(f["tokens per second"]), f"{f['seconds per update']:,.0f}",
                        f"{f['trainers busy']:.0%}", f"{f['samplers busy']:.0%}", f"{f['sequences per sampler']:.0f}",
                        f"{f['transfer']:.0%}", f"{f['rewards busy']:.0%}", f"{f['mean staleness']:.2f}", f["bound"],
                    ])  # fmt: skip
        head = ["GPUs", "run", "tokens/s", "s per update", "trainers", "samplers", "sequences", "weights", "rewards",
                "staleness", "bound by"]  # fmt: skip
        return table(head, rows)

    return make


def changes_table(values: dict[str, Any]) -> str:
    rows: dict[str, list[str]] = {}
    for i, name in enumerate(MODELS):
        start = f"{name}, small run, "
        base = values[f"{start}base"]
        for key, found in values.items():
            if key.startswith(start):
                change = found["completions per second"] / base["completions per second"] - 1
                shown = rate(base["completions per second"]) if found is base else f"{change:+.0%}"
                rows.setdefault(key.removeprefix(start), ["", ""])[i] = f"{shown} ({found['bound']})"
    return table(["change", *MODELS], [[change, *cells] for change, cells in rows.items()])


def failures_table(values: dict[str, Any]) -> str:
    rows = []
    for name in MODELS:
        parts = values[f"{name}, 1024 GPUs: division"]
        turn = values[f"{name}, 1024 GPUs: in turn"]["seconds per update"]
        costs = values[f"{name}, 1024 GPUs: lost parts"].values()
        whole = RESTART + 2 * turn
        for source, hours in GPU_HOURS.items():
            lost = sum(n * cost for n, cost in zip(parts, costs, strict=True)) / hours / 3600
            rows.append([name, source, f"{hours / 1024:.1f}", *(f"{c:,.0f}" for c in costs), f"{lost:.1%}",
                         f"{whole:,.0f}", f"{whole * 1024 / hours / 3600:.1%}"])  # fmt: skip
    head = ["model", "failures as in", "hours to one, 1,024 GPUs", "s, lost trainer", "s, lost sampler", "lost, apart",
            "s, in turn", "lost, in turn"]  # fmt: skip
    return table(head, rows)


def sharding_table(values: dict[str, Any]) -> str:
    """Communication that nothing hides, beside what training computes: half of the GPUs train."""
    work = workload(values["constants"])
    tokens = work.prompt + work.lengths.mean
    rows = []
    for name, model in MODELS.items():
        for gpus in SIZES:
            trainers = gpus if gpus <= plans.trainers_needed(model) else max(plans.trainers_needed(model), gpus // 2)
            if trainers < plans.trainers_needed(model):
                continue
            completions = work.prompts * work.group
            operations = completions * model.training_operations(tokens, 2 * tokens**2, work.forwards)
            computing = operations / (trainers * H100.operations * work.shares[model.name])
            shard = plans.trainers_needed(model)
            copies = trainers // shard
            flat = sharded_seconds(model, H100, trainers, trainers, completions * tokens)
            hybrid = sharded_seconds(model, H100, copies * shard, shard, completions * tokens)
            moved = dispatch_seconds(model, H100, trainers, completions * tokens)
            cells = [f"{computing:.0f}", f"{flat:.0f}", f"{hybrid:.0f} ({copies} × {shard})"]
            cells.append(f"{moved:.0f}" if model.experts else "–")
            rows.append([name, f"{trainers:,}", *cells])
    return table(
        ["model", "trainers", "s of computing", "s of FSDP2", "s of HSDP (copies × shards)", "s of expert parallel"],
        rows,
    )


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "constants": constants_table, "sources": sources_table, "validation": validation_table, "gains": gains_table,
    "throughput-32B": throughput_table("32B"), "throughput-235B": throughput_table("235B-A22B"),
    "detail-32B": detail_table("32B"), "detail-235B": detail_table("235B-A22B"),
    "changes": changes_table, "failures": failures_table, "sharding": sharding_table,
}  # fmt: skip


def page_with_tables(text: str, values: dict[str, Any]) -> str:
    """Return the text of a page with its tables filled in."""
    return BLOCK.sub(lambda found: found[1] + "\n" + TABLES[found["name"]](values) + "\n" + found["end"], text)


def chart(values: dict[str, Any], path: Path) -> None:
    """Draw completions per second and dollars per million completions by number of GPUs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib import ticker

    matplotlib.rcParams.update({"svg.hashsalt": "scale", "svg.fonttype": "none"})
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), sharex=True)
    styles = {"in turn": ("black", "s", "in turn on all GPUs"), "staleness 0": ("tab:gray", "o", "apart, staleness 0"),
              "staleness 1": ("tab:blue", "^", "apart, staleness 1"),
              "staleness 4": ("tab:orange", "v", "apart, staleness 4")}  # fmt: skip
    for column, name in enumerate(MODELS):
        for run, (colour, marker, label) in styles.items():
            found = {g: values[key] for g in SIZES if (key := f"{name}, {g} GPUs: {run}") in values}
            for row, key in enumerate(("completions per second", "dollars per million completions")):
                axes[row][column].plot(
                    list(found), [f[key] for f in found.values()], color=colour, marker=marker, label=label
                )
        first = min(g for g in SIZES if values.get(f"{name}, {g} GPUs: in turn"))
        begin = values[f"{name}, {first} GPUs: in turn"]["completions per second"]
        axes[0][column].plot([first, 1024], [begin, begin * 1024 / first], ":", color="gray", label="proportional")
        axes[0][column].set_title(name)
    for row, label in enumerate(("completions per second", "$ per million completions")):
        for axis in axes[row]:
            axis.set(xscale="log", yscale="log", ylabel=label)
            axis.set_xticks(SIZES, [str(g) for g in SIZES])
            axis.minorticks_off()
            axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,g}"))
            axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("GPUs (H100)")
    axes[0][0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description="Simulate reinforcement learning on 8 to 1,024 GPUs.")
    parser.add_argument("--only", choices=["calibration", "sweep", "changes", "failures"])
    parser.add_argument("--figures", type=Path, default=FIGURES, help="file of the figures")
    parser.add_argument("--tables", action="store_true", help="rewrite the tables and the chart; simulate nothing")
    parser.add_argument("--check", action="store_true", help="fail if the page is not what the figures say")
    args = parser.parse_args()
    figures = Figures(args.figures)
    if args.check:
        if page_with_tables(PAGE.read_text(), figures.values) != PAGE.read_text():
            sys.exit(f"{PAGE} is not what the figures say: run this with --tables")
        return
    if not args.tables:
        found = figures.get("constants", constants)
        work = workload(found)
        if args.only in (None, "calibration"):
            engine = Engine(**found["engine"])
            figures.get("validation", lambda: published.validation(engine, found["shares"]))
        figures.get("check", lambda: check(work))
        parts = {"sweep": sweep, "changes": sensitivity, "failures": failures}
        for name, part in parts.items():
            if args.only in (None, name):
                part(figures, work)
        if args.only:
            return
    PAGE.write_text(page_with_tables(PAGE.read_text(), figures.values))
    chart(figures.values, CHART)


if __name__ == "__main__":
    main()
