"""Claims about reasoning that one setting did not settle: ReFT over SFT, self-consistency, exploration.

    pip install 'posttrain[bench]'
    python benchmarks/claims/reasoning.py --json figures.json --plots FOLDER

Everything is in the laboratory, with `arms.py`: a seed is another base model and another run. 81 to 85: ReFT against
SFT on the same questions, by kind of chain and number of questions; longer sums than those trained on measure
generalisation. 9: self-consistency as reward, by how good the majority is at the start. 10: exploration where rewards
are rare, each part alone and all together. 11: the variance of the gradient with and without step-wise rewards.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from arms import Arm, Claim, Curve, difference, interval, main

Curves = dict[str, list[Curve]]


def values(curves: list[Curve], *path: str) -> list[float]:
    """Return a figure of the last evaluation, for each seed."""
    out = []
    for curve in curves:
        found: Any = curve.more
        for name in path:
            found = found[name]
        out.append(float(found))
    return out


# ------------------------------------------------------------------------------------------------------------ 8: ReFT
TEST = {"n": 16, "k": [16], "sampler": {"max_tokens": 128}}
VERIFIER = {
    "kind": "function",
    "name": "verifier",
    "function": "posttrain.data.synthetic.sum_chains:valid_additions",
    "isolated": False,
}
PASSES = 9600
"""Sequences that the longest SFT trains on; PPO samples 3,840 completions and trains on each twice."""


def measured(program: bool) -> str:
    """Return the evaluations: held-out sums as long as those trained on, and longer ones."""
    judge: dict[str, Any] = {"kind": "numeric", "extract": "last_line"}
    if program:
        judge = {"kind": "program", "limits": {"seconds": 2, "memory_mb": 128}}
    own = {"judge": judge, "vote": "program" if program else "last_line", "rank_by": [] if program else [VERIFIER]}
    tests = []
    for name, terms in (("sums", [4, 5]), ("longer", [6, 7])):
        problems = {"kind": "lab", "held_out": True, "size": 128, "seed": 1, "terms": terms}
        tests.append({"name": name, "kind": "sample", "problems": problems, **TEST, **own})
    return json.dumps(tests)


def strategies(curves: list[Curve], *path: str) -> dict[str, list[float]]:
    """Return the accuracy of one sample, of the vote of 16 and of the best of 16 by the verifier, for each seed."""
    out: dict[str, list[float]] = {}
    for curve in curves:
        found: Any = curve.more
        for name in path:
            found = found[name]
        for strategy in found["strategies"]:
            if strategy["name"] != "pass":
                out.setdefault(strategy["name"], []).append(float(strategy["points"][-1]["value"]))
    return out


def reft_over_sft(curves: Curves) -> dict[str, Any]:
    """ReFT minus the best SFT arm, for every measure; the best is that of the same measure, which favours SFT."""
    reached: dict[str, Any] = {}
    against: dict[str, Any] = {}
    for test, path in (("sums", ()), ("longer", ("longer",))):
        by_arm = {name: strategies(of, *path) for name, of in curves.items()}
        for measure in by_arm["ReFT"]:
            title = f"{test}, {measure}"
            accuracy = {name: found[measure] for name, found in by_arm.items()}
            reached[title] = {name: interval(of) for name, of in accuracy.items()}
            best = max((n for n in accuracy if n != "ReFT"), key=lambda n: reached[title][n][0])
            against[title] = {"best of SFT": best, **difference(accuracy["ReFT"], accuracy[best])}
    return {"reached": reached, "against": against, "verdict": {n: g["verdict"] for n, g in against.items()}}


def reft_claim(number: int, chain: str, questions: int) -> Claim:
    """Return the claim for a kind of chain and a number of questions."""
    program = chain == "program"
    recipe = "reft_program" if program else "reft"
    warm = 6 if program else 2  # the model has never read a program
    batch = 16 if questions < 100 else 32
    rows = (
        f"stages.warmup.data.source=lab:{chain}",
        f"stages.warmup.data.rows=[0, {questions}]",
        f"stages.warmup.batch_size={batch}",
        f"evaluate={measured(program)}",
    )

    def sft(name: str, epochs: int) -> Arm:
        settings = (*rows, f"stages.warmup.epochs={epochs}")
        return Arm(name, recipe, settings, ("warmup",), None, "sums", also=("longer",))

    epochs = PASSES // questions
    own = (*rows, f"stages.warmup.epochs={warm * 2}", f"stages.reft.problems.size={questions}")
    reft = Arm("ReFT", recipe, own, ("warmup", "reft"), "reft", "sums", also=("longer",))
    return Claim(
        number,
        f"ReFT beats SFT on the same {questions} questions with chains of kind {chain}",
        (
            sft(f"SFT, {warm * 2} epochs (the warm-up)", warm * 2),
            sft(f"SFT, {epochs // 8} epochs", epochs // 8),
            sft(f"SFT, {epochs} epochs", epochs),
            reft,
        ),
        reft_over_sft,
        "Held-out sums of 4 and 5 numbers, and longer ones of 6 and 7: one sample, the vote and the best of 16. The "
        "longest SFT trains on more sequences than ReFT does.",
    )


REFT = [
    reft_claim(81, "paths", 48),
    reft_claim(82, "paths", 300),
    reft_claim(83, "careful", 48),
    reft_claim(84, "careful", 300),
    reft_claim(85, "program", 48),
]

# ------------------------------------------------------------------------------------------------- 9: self-consistency
AGREE = (
    "stages.rl.rewards=[{kind: self_consistency, name: agree, extract: last_line}, "
    "{kind: exact, name: right, extract: last_line, weight: 0}]"
)
RUN = ("stages.rl.held_out.problems.size=256", "stages.rl.held_out.every=5", "stages.rl.steps=40")
STARTS = (16, 32, 48, 96, 192, 384)


def threshold(curves: Curves) -> dict[str, Any]:
    """Gain by agreement from each start, with the accuracy of greedy answers and of the first samples' majority."""
    gain = {n: difference([c.last for c in of], [c.first for c in of]) for n, of in curves.items()}
    pairs = [(c.first, c.last - c.first) for of in curves.values() for c in of]
    grows = [first for first, gained in pairs if gained > 0.1]
    fails = [first for first, gained in pairs if gained <= 0.1]
    return {
        "before": {n: interval([c.first for c in of]) for n, of in curves.items()},
        "best measurement": {n: interval([max(y for _, y in c.points) for c in of]) for n, of in curves.items()},
        "after": {n: interval([c.last for c in of]) for n, of in curves.items()},
        "agreement after": {n: interval([c.last_record["reward/agree"] for c in of]) for n, of in curves.items()},
        "gain": gain,
        "lowest start of a run that gains 0.1": min(grows, default=None),
        "highest start of a run that does not": max(fails, default=None),
        "verdict": {n: g["verdict"] for n, g in gain.items()},
    }


def agreeing(rows: int, name: str = "", *settings: str) -> Arm:
    """Return an arm that starts from so many careful chains."""
    start = (f"stages.cold_start.data.rows=[0, {rows}]", f"stages.cold_start.batch_size={min(rows, 16)}")
    return Arm(f"{rows} chains{name}", "r1", (*RUN, AGREE, *start, *settings), ("cold_start", "rl"))


HELD = (", KL 0.1", "stages.rl.kl={coefficient: 0.1}")
AGREEMENT = Claim(
    9,
    "Self-consistency as reward improves where the majority is right often enough at the start",
    (*map(agreeing, STARTS), *(agreeing(rows, *HELD) for rows in (96, 384))),
    threshold,
    "The cold start is one epoch on so many careful chains; then 40 steps without any label. The best measurement of a "
    "run can be chosen only with labels.",
)

# ----------------------------------------------------------------------------------------------------- 10: exploration
BUDGET = ("stages.rl.held_out.problems.size=256", "stages.rl.held_out.every=5", "stages.rl.steps=60")
OFF = (
    *(f"stages.rl.exploration.{k}=null" for k in ("entropy_target", "adaptive_group_size", "curriculum", "replay")),
    "stages.rl.exploration.partial_rollouts=null",
    "stages.rl.exploration.dynamic_sampling=0",
)
PARTS = {
    "dynamic sampling": ("stages.rl.exploration.dynamic_sampling=2",),
    "steered temperature": ("stages.rl.exploration.entropy_target={control: temperature, target: 0.35}",),
    "more for hard prompts": ("stages.rl.exploration.adaptive_group_size={first: 4}",),
    "curriculum": ("stages.rl.exploration.curriculum={}",),
    "replay": ("stages.rl.exploration.replay={}",),
}


def explores(curves: Curves) -> dict[str, Any]:
    """Each part against none: mean held-out accuracy over as many completions as both sampled."""
    none = curves["none"]
    against = {}
    for name, of in curves.items():
        if name != "none":
            ends = [min(a.points[-1][0], b.points[-1][0]) for a, b in zip(of, none, strict=True)]
            gained, plain = ([c.area(end) for c, end in zip(runs, ends, strict=True)] for runs in (of, none))
            against[name] = difference(gained, plain)
    return {
        "after": {n: interval([c.last for c in of]) for n, of in curves.items()},
        "against": against,
        "verdict": {n: g["verdict"] for n, g in against.items()},
    }


EXPLORATION = Claim(
    10,
    "Exploration and trajectory management pay where rewards are rare",
    (
        Arm("none", "r1_zero", (*OFF, *BUDGET)),
        *(Arm(name, "r1_zero", (*OFF, *BUDGET, *setting)) for name, setting in PARTS.items()),
        Arm("all together", "r1_zero", (*OFF, *BUDGET, *(s for setting in PARTS.values() for s in setting))),
    ),
    explores,
    "Recipe r1_zero; --seeds 0,1,2,3,4 for five. Compared over equal numbers of completions.",
)

# ------------------------------------------------------------------------------------------ 13: steps and length hacked
RIGHT = "{kind: exact, name: right, extract: last_line%s}"
NOT_TRAINED_ON = RIGHT % ", weight: 0"
PLAIN = "right or wrong"


def hacked(curves: Curves) -> dict[str, Any]:
    """Accuracy, mean length and reward at the end; hacked: less accurate than with the right-or-wrong reward alone."""
    plain = curves[PLAIN]
    against = {n: difference([c.last for c in of], [c.last for c in plain]) for n, of in curves.items() if n != PLAIN}
    words = {"refuted: the opposite holds": "hacked: less accurate", "reproduced": "more accurate"}
    return {
        "before": {n: interval([c.first for c in of]) for n, of in curves.items()},
        "after": {n: interval([c.last for c in of]) for n, of in curves.items()},
        "tokens": {n: interval([c.last_record["completions/mean_length"] for c in of]) for n, of in curves.items()},
        "reward": {n: interval([c.last_record["reward"] for c in of]) for n, of in curves.items()},
        "against": against,
        "verdict": {n: words.get(g["verdict"], g["verdict"]) for n, g in against.items()},
    }


HACKING = Claim(
    13,
    "A reward of steps or of length alone is hacked: it rises, and answers get no better",
    tuple(
        Arm(name, "lab", (f"stages.rl.rewards={rewards}", *RUN))
        for name, rewards in {
            PLAIN: f"[{RIGHT % ''}]",
            "right, and true steps": f"[{RIGHT % ''}, {{kind: valid_steps, name: steps, weight: 0.5}}]",
            "true steps alone": f"[{NOT_TRAINED_ON}, {{kind: valid_steps, name: steps}}]",
            "length alone": f"[{NOT_TRAINED_ON}, {{kind: length, target: 40, width: 40}}]",
        }.items()
    ),
    hacked,
    "Recipe lab, 40 steps. A step is a line whose equation is true, whatever it is about; length is rewarded up to 40 "
    "tokens. Careful right answers have about 25.",
)

CLAIMS = {c.number: c for c in (*REFT, AGREEMENT, EXPLORATION, HACKING)}

if __name__ == "__main__":
    main(CLAIMS, "Claims about reasoning, tried in the laboratory.")
