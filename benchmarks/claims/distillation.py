"""On-policy distillation beats supervised distillation (GKD, arXiv 2306.13649), in the laboratory.

    pip install 'posttrain[bench]'
    python benchmarks/claims/distillation.py --json figures.json --plots FOLDER

A seed is another base model and another run, with `arms.py`. A teacher is trained on careful chains; then the base
model is distilled from it by each arm in as many optimizer steps, on the same questions: on the teacher's text, on
its distributions over answers of rows and over its own answers, and on the student's. Measured are held-out sums.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from arms import Arm, Claim, Curve, argument, chart, difference, interval, main

STEPS = argument("--steps", "60")
"""Optimizer steps of the student."""
COMMON = (f"stages.student.max_steps={STEPS}", f"stages.student.checkpoint_every={STEPS}")
OFF = ("stages.student.on_policy=0", "stages.student.sampler={}")
WRITTEN = ("stages.student.teacher_text=true", "stages.student.teacher_sampler={max_tokens: 64}")


def arm(name: str, *settings: str) -> Arm:
    """Return an arm: the recipe with other settings of the student."""
    return Arm(name, "distill", (*COMMON, *settings), curve=None, task="sums")


SUPERVISED = {
    "teacher's text (sequence level)": (*OFF, *WRITTEN, "stages.student.divergence=null"),
    "forward KL on rows": (*OFF, "stages.student.divergence=forward_kl"),
    "reverse KL on rows": (*OFF, "stages.student.divergence=reverse_kl"),
    "forward KL on the teacher's answers": (*OFF, *WRITTEN, "stages.student.divergence=forward_kl"),
}
ON_POLICY = {
    "reverse KL on-policy": ("stages.student.divergence=reverse_kl",),
    "forward KL on-policy": ("stages.student.divergence=forward_kl",),
    "JSD on-policy": ("stages.student.divergence={name: jsd, beta: 0.5}",),
    "reverse KL, half on-policy": ("stages.student.divergence=reverse_kl", "stages.student.on_policy=0.5"),
}


def accuracy(curves: list[Curve]) -> list[float]:
    """Return the accuracy of one sampled answer, for each seed."""
    return [float(curve.more["value"]) for curve in curves]


def on_policy_over_supervised(curves: dict[str, list[Curve]]) -> dict[str, Any]:
    """Every on-policy arm against the best supervised one, which favours supervised distillation."""
    reached = {name: interval(accuracy(of)) for name, of in curves.items()}
    best = max(SUPERVISED, key=lambda name: reached[name][0])
    against = {name: difference(accuracy(curves[name]), accuracy(curves[best])) for name in ON_POLICY}
    seconds = {name: interval([of_seed.seconds for of_seed in of]) for name, of in curves.items()}
    verdicts = {name: found["verdict"] for name, found in against.items()}
    return {"reached": reached, "best supervised": best, "against": against, "seconds": seconds, "verdict": verdicts}


def draw(result: dict[str, Any], claim: Claim, path: Path) -> None:
    """Draw the accuracy of each arm: a point a seed, a bar for the mean."""
    with chart(claim, path) as axes:
        for place, (name, of) in enumerate(result["arms"].items()):
            values = [float(run["evaluation"]["value"]) for run in of["runs"]]
            colour = "tab:orange" if name in ON_POLICY else "tab:blue"
            axes.barh(place, sum(values) / len(values), color=colour, alpha=0.4)
            axes.plot(values, [place] * len(values), "o", color=colour, markersize=4)
        axes.set_yticks(range(len(result["arms"])), list(result["arms"]), fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel("held-out sums, right in one sample")
        axes.plot([], [], "s", color="tab:orange", label="on-policy")
        axes.plot([], [], "s", color="tab:blue", label="supervised")


CLAIMS = {
    21: Claim(
        21,
        "On-policy distillation beats supervised distillation in as many optimizer steps",
        tuple(arm(name, *settings) for name, settings in {**SUPERVISED, **ON_POLICY}.items()),
        on_policy_over_supervised,
        "The same teacher (400 careful chains), questions, steps and learning rate; on-policy arms spend more time on "
        "sampling, which is in the seconds. The best supervised arm is chosen on the same figures.",
        draw=draw,
    )
}

if __name__ == "__main__":
    main(CLAIMS, "Claims about distillation, in the laboratory.")
