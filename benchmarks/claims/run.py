"""Claims about reinforcement learning, tried in the laboratory: three seeds, intervals, curves.

    pip install 'posttrain[bench]'
    python benchmarks/claims/run.py --json figures.json --plots FOLDER     # all of them: 1.5 hours on two cores
    python benchmarks/claims/run.py --claims 3,5 --seeds 0                 # some, one seed: no verdict

Every run is a shipped recipe with other settings, in a process of its own on one core, two at a time; runs are kept in
--work, and an interrupted benchmark goes on where it was. A seed is a laboratory of its own (`lab:SEED`: another base
model) and the seed of the run. A claim is «reproduced» where the 95% interval over seeds (Student's t, paired by
seed) leaves out zero on the right side, «refuted» where it does on the wrong one, and otherwise not settled.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from arms import Arm, Claim, Curve, difference, fewer, interval, main, verdict

Curves = dict[str, list[Curve]]

EXACT = "{kind: exact, name: right, extract: last_line}"
PLAIN = ("stages.rl.held_out.problems.size=256", "stages.rl.held_out.every=3", "stages.rl.steps=30")
BINARY = Arm("right or wrong", "lab", PLAIN)


def lasts(curves: list[Curve]) -> list[float]:
    return [c.last for c in curves]


def headline(curves: list[Curve], key: str = "value") -> list[float]:
    return [float(c.more[key]) for c in curves]


# ------------------------------------------------------------------------------------------------------------ 1: ReFT
QUESTIONS = ("evaluate.sums.n=4", "evaluate.sums.k=[]", "evaluate.sums.problems.size=512")


def reft(curves: Curves) -> dict[str, Any]:
    """After ReFT against after SFT, for whichever number of epochs reached most, on held-out questions."""
    reached = {name: interval(headline(of)) for name, of in curves.items()}
    best = max((n for n in curves if n != "ReFT"), key=lambda n: reached[n][0])
    return {"reached": reached, "against": best, **difference(headline(curves["ReFT"]), headline(curves[best]))}


REFT = Claim(
    1,
    "ReFT beats SFT on the same questions, on held-out ones",
    (
        Arm("SFT, warm-up's epochs", "reft", QUESTIONS, ("warmup",), None, "sums"),
        Arm("SFT, 8 epochs", "reft", (*QUESTIONS, "stages.warmup.epochs=8"), ("warmup",), None, "sums"),
        Arm("SFT, 32 epochs", "reft", (*QUESTIONS, "stages.warmup.epochs=32"), ("warmup",), None, "sums"),
        Arm("ReFT", "reft", QUESTIONS, ("warmup", "reft"), "reft", "sums"),
    ),
    reft,
    "Accuracy of one completion sampled at temperature 1; ReFT "
    "is compared with the best of the SFT arms; its own warm-up is one epoch.",
)


# ----------------------------------------------------------------------------------------------------- 2: base models
def several_times(curves: Curves) -> dict[str, Any]:
    """Last over first accuracy, and whether its interval lies above twice."""
    (runs,) = curves.values()
    ratios = [c.last / c.first for c in runs]
    mean, low, high = interval(ratios)
    return {
        "before": interval([c.first for c in runs]),
        "after": interval(lasts(runs)),
        "ratio": [mean, low, high],
        "by_seed": ratios,
        "verdict": verdict(low - 2, high - 2, [r - 2 for r in ratios]),
    }


BASE = Claim(
    2,
    "RL on the base model with rule rewards alone raises held-out accuracy several times over",
    (BINARY,),
    several_times,
    "Several times: the interval of the ratio lies above 2.",
)


# ----------------------------------------------------------------------------------------------------- 3: step rewards
GOAL = 0.8


def sooner(curves: Curves) -> dict[str, Any]:
    """Completions until a held-out accuracy of 0.8, right-or-wrong over step-wise."""
    return {
        "goal": GOAL,
        "completions": {n: [c.rollouts_to(GOAL) for c in of] for n, of in curves.items()},
        **fewer(*([c.rollouts_to(GOAL) for c in curves[n]] for n in ("step-wise", BINARY.name))),
        "mean_accuracy": difference(*([c.area() for c in curves[n]] for n in ("step-wise", BINARY.name))),
    }


STEPS = Claim(
    3,
    "Step-wise rewards reach a given accuracy with fewer rollouts than binary ones",
    (
        BINARY,
        Arm(
            "step-wise",
            "lab",
            (*PLAIN, f"stages.rl.rewards=[{EXACT}, {{kind: valid_steps, name: steps, weight: 0.5}}]"),
        ),
    ),
    sooner,
    f"Ratio of the completions sampled until {GOAL:.0%}; also the mean accuracy over the whole run.",
)


# ------------------------------------------------------------------------------------------------- 4: self-consistency
MEASURED = "{kind: exact, name: right, extract: last_line, weight: 0}"
AGREE = f"stages.rl.rewards=[{{kind: self_consistency, name: agree, extract: last_line}}, {MEASURED}]"


def improves(curves: Curves) -> dict[str, Any]:
    """After minus before, without a label; for the base model and for one that is mostly right."""
    (base, warm) = curves.values()
    ends = {
        n: {"before": interval([c.first for c in of]), "after": interval(lasts(of))}
        for n, of in zip(curves, (base, warm), strict=True)
    }
    started = {n: difference(lasts(of), [c.first for c in of]) for n, of in curves.items()}
    return {"from": ends, "gain": started, "verdict": {n: g["verdict"] for n, g in started.items()}}


CONSISTENT = Claim(
    4,
    "Self-consistency as reward improves without any label",
    (
        Arm("from the base model", "lab", (*PLAIN, AGREE)),
        Arm("from a cold start", "r1", (*PLAIN, AGREE), ("cold_start", "rl")),
    ),
    improves,
    "The reward is the share of a prompt's other completions with the same answer; accuracy is measured and not "
    "trained on. From a cold start: after one epoch on 48 careful chains (recipe r1's first stage).",
)


# ------------------------------------------------------------------------------------------------------ 5: exploration
OPTIONS = ("entropy_target", "adaptive_group_size", "curriculum", "replay", "partial_rollouts")
OFF = tuple(f"stages.rl.exploration.{k}=null" for k in OPTIONS)
ZERO = (*OFF, *PLAIN, "stages.rl.exploration.dynamic_sampling=0", "stages.rl.steps=45", "stages.rl.held_out.every=5")
PARTS = {
    "dynamic sampling": "stages.rl.exploration.dynamic_sampling=2",
    "steered temperature": "stages.rl.exploration.entropy_target={control: temperature, target: 0.35}",
    "more for hard prompts": "stages.rl.exploration.adaptive_group_size={first: 4}",
}


def pays(curves: Curves) -> dict[str, Any]:
    """Each part against none: mean held-out accuracy over equally many completions, and completions until 0.8."""
    first = next(iter(curves))
    none = curves[first]
    out: dict[str, Any] = {"mean_accuracy": {n: interval(areas(of, none)) for n, of in curves.items()}, "against": {}}
    for name, of in curves.items():
        if name != first:
            gain = difference(areas(of, none), areas(none, none))
            out["against"][name] = {**gain, "to_goal": fewer(*([c.rollouts_to(GOAL) for c in r] for r in (of, none)))}
    return {**out, "verdict": {n: g["verdict"] for n, g in out["against"].items()}}


def areas(of: list[Curve], beside: list[Curve]) -> list[float]:
    """Mean accuracy over as many completions as both of a seed's runs sampled."""
    return [c.area(min(c.points[-1][0], b.points[-1][0])) for c, b in zip(of, beside, strict=True)]


EXPLORING = Claim(
    5,
    "Dynamic sampling and adaptive exploration each pay",
    (BINARY, *(Arm(name, "lab", (*PLAIN, setting.replace("0.35", "0.12"))) for name, setting in PARTS.items())),
    pays,
    "Redraws sample more a step, so arms are compared over equally many completions.",
)
HARD = Claim(
    6,
    "They pay where right answers are rare",
    (Arm("none", "r1_zero", ZERO), *(Arm(name, "r1_zero", (*ZERO, setting)) for name, setting in PARTS.items())),
    pays,
    "Recipe r1_zero, whose template the model has never read: 6 to 13 greedy answers in a hundred are right at first. "
    "Without its exploration, and with one part of it.",
)


# --------------------------------------------------------------------------------------------------------- 7: feedback
SHARE = 0.8


def as_good(curves: Curves) -> dict[str, Any]:
    """What gold, the reward model of people's ratings that nothing learns from, gains on held-out openings."""
    gains = {n: [c.last - c.first for c in of] for n, of in curves.items()}
    of_last = {
        name: {n: interval([float(c.last_record[name]) for c in of]) for n, of in curves.items()}
        for name in ("kl_sequence", "proxy", "proxy_gold", "completions/clipped_ratio")
    }
    return {
        "gain": {n: interval(g) for n, g in gains.items()},
        "after": {n: interval(lasts(of)) for n, of in curves.items()},
        "evaluation": {n: interval(headline(of)) for n, of in curves.items()},
        **of_last,
        "share": SHARE,
        "judge_over_people": difference(gains["a judge's labels"], gains["people's labels"]),
        "ended_over_not": difference(gains["people's labels"], gains["people's, no reward for ending"]),
        **difference(gains["a judge's labels"], [SHARE * g for g in gains["people's labels"]]),
    }


ALONE = "stages.policy.rewards=[{kind: reward_model, name: proxy, source: 'stage:proxy', normalise: true}]"


def fed(name: str, recipe: str, *overrides: str) -> Arm:
    return Arm(name, recipe, overrides, curve="policy", task="gold", measure="gold", lab="lab:reviews:")


FEEDBACK = Claim(
    7,
    "AI feedback gains no less than four fifths of what people's does",
    (
        fed("people's labels", "rlhf_lab"),
        fed("a judge's labels", "rlaif_lab"),
        fed("people's, no reward for ending", "rlhf_lab", ALONE),
    ),
    as_good,
    "The same texts and pairs for both; the gain is in the score of a reward model of other people's ratings, of "
    "samples from held-out openings.",
    "gold: held-out reward model of people's ratings",
)

CLAIMS = {c.number: c for c in (REFT, BASE, STEPS, CONSISTENT, EXPLORING, HARD, FEEDBACK)}


if __name__ == "__main__":
    main(CLAIMS, "Claims, tried in the laboratory.")
