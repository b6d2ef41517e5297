"""The R1 chain on a real model: accuracy after each stage, on other wordings and other things, and shortcuts.

    pip install 'posttrain[bench,gguf]'
    python benchmarks/claims/real_problems.py --json figures.json --plots FOLDER

Runs the recipe r1_words once a seed (other rows for every stage) on SmolLM2. A shortcut is a rule that looks at the
numbers of the question without knowing what is asked of them: how many problems the best one gets right, and how many
of the last model's answers are what it says. Half an hour a seed on one core; --at-once runs several seeds together.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from arms import Claim, chart, difference, interval, machine

import posttrain
from posttrain.core.files import read_lines, write_json

STAGES = {"before": "untrained", "cold_start": "cold start", "rl": "RL", "sft": "SFT of the base", "after": "RL again"}
"""Folders of evaluations, and what they are called."""
NUMBER = re.compile(r"-?\d+")
STATEMENT = "Cold start, RL, rejection sampling, SFT and RL again: each kind of problems is solved more often"


def rules() -> dict[str, Callable[[list[int]], int]]:
    """Return shortcuts: functions of the numbers in a question, in order."""
    out: dict[str, Callable[[list[int]], int]] = {"product of all": lambda n: _product(n)}
    for times in range(1, 11):
        out[f"{times} x sum of all"] = lambda n, t=times: t * sum(n)  # type: ignore[misc]
        out[f"{times} x first"] = lambda n, t=times: t * n[0]  # type: ignore[misc]
        out[f"{times} x last"] = lambda n, t=times: t * n[-1]  # type: ignore[misc]
        out[f"{times} x largest"] = lambda n, t=times: t * max(n)  # type: ignore[misc]
    return out


def _product(numbers: Sequence[int]) -> int:
    out = 1
    for number in numbers:
        out *= number
    return out


def shortcuts(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the best rule, the share of problems that it gets right, and the share of answers that are what it says.

    Args:
        items: An evaluation's items: prompt, expected, completions.
    """
    questions = [[int(n) for n in NUMBER.findall(_question(i["prompt"]))] for i in items]
    expected = [int(_last_number(str(i["expected"])) or 0) for i in items]
    answers = [_last_number(i["completions"][0]["text"]) for i in items]
    best: dict[str, Any] = {"rule": "", "right": -1.0, "answers": 0.0}
    for name, rule in rules().items():
        said = [rule(numbers) for numbers in questions]
        right = sum(s == e for s, e in zip(said, expected, strict=True)) / len(items)
        if right > best["right"]:
            same = sum(str(s) == a for s, a in zip(said, answers, strict=True)) / len(items)
            best = {"rule": name, "right": right, "answers": same}
    return best


def _question(prompt: str) -> str:
    """Return the last turn of a prompt as text: what stands behind the last mark of a user's turn."""
    return prompt.rsplit("user", 1)[-1]


def _last_number(text: str) -> str | None:
    found = NUMBER.findall(text)
    return found[-1] if found else None


def run_seed(seed: int, work: Path) -> Path:
    """Run the recipe with the rows of a seed, in a process of its own; a run that is there is resumed."""
    folder = work / f"r1_words-{seed}"
    cold, rl, drawn = 240 * seed, [720, 3400], 3400 + 200 * seed
    settings = [
        f"seed={seed}",
        f"stages.cold_start.data.rows=[{cold}, {cold + 240}]",
        *(f"stages.{name}.problems.data.rows={rl}" for name in ("rl", "rl_again")),
        f"stages.rejection.problems.data.rows=[{drawn}, {drawn + 200}]",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "posttrain", "run", "r1_words", "--folder", str(folder), *settings],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"seed {seed} failed:\n{done.stderr[-3000:]}")
    print(f"  seed {seed}: done", flush=True)
    return folder


def folder_of(run: Path, stage: str) -> Path:
    """Return the evaluations after a stage, whose folder has its number in front."""
    return next(p for p in (run / "evaluations").iterdir() if p.name == stage or p.name.split("-", 1)[-1] == stage)


def figures(runs: Sequence[Path]) -> dict[str, Any]:
    """Return the accuracy of every test after every stage, the gains over the cold start, and the shortcuts."""
    folders = [folder_of(runs[0], stage) for stage in STAGES]
    tests = sorted(set.intersection(*({p.stem for p in folder.glob("*.jsonl")} for folder in folders)))
    reached: dict[str, dict[str, list[float]]] = {test: {} for test in tests}
    for stage, title in STAGES.items():
        for test in tests:
            values = [json.loads((folder_of(run, stage) / f"{test}.json").read_text())["value"] for run in runs]
            reached[test][title] = values
    gains = {t: difference(of["RL again"], of["cold start"]) for t, of in reached.items()}
    found = {t: [shortcuts(read_lines(folder_of(run, "after") / f"{t}.jsonl")) for run in runs] for t in tests}
    best = {
        t: {
            "rule": of[0]["rule"],
            "problems": interval([s["right"] for s in of]),
            "answers": interval([s["answers"] for s in of]),
        }
        for t, of in found.items()
    }
    return {
        "statement": STATEMENT,
        "note": "SmolLM2-135M-Instruct; greedy answers. Gains are of the last stage over the cold start, by seed.",
        "arms": {title: {} for title in STAGES.values()},
        **{test: {title: interval(of) for title, of in by.items()} for test, by in reached.items()},
        "gain": gains,
        "best shortcut": best,
        "verdict": {test: gain["verdict"] for test, gain in gains.items()},
    }


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw the accuracy of every test over the stages, with intervals over seeds."""
    import numpy as np

    with chart(Claim(14, STATEMENT, (), lambda _: {}), path) as axes:
        for test in result["verdict"]:
            mean, low, high = np.array(list(result[test].values())).T
            spread = np.nan_to_num(np.array([mean - low, high - mean]))
            axes.errorbar(list(result[test]), mean, yerr=spread, capsize=3, marker="o", label=test)
        axes.set_ylabel("right answers")
        axes.set_ylim(0, 1.02)


def main() -> None:
    parser = argparse.ArgumentParser(description="The R1 chain on word problems, on a real model.")
    parser.add_argument("--seeds", default="0,1,2", help="comma between (0,1,2)")
    parser.add_argument("--at-once", type=int, default=2, help="runs at the same time, a core each (2)")
    parser.add_argument("--work", type=Path, default=Path("runs/claims"), help="folder of the runs (runs/claims)")
    parser.add_argument("--plots", type=Path, help="folder for claim-14.svg")
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args()
    seeds = [int(n) for n in args.seeds.split(",")]
    args.work.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.at_once) as pool:
        runs = list(pool.map(lambda seed: run_seed(seed, args.work), seeds))
    result = figures(runs)
    if args.plots:
        draw(result, args.plots / "claim-14.svg")
    if args.json:
        claims = {"posttrain": posttrain.__version__, "machine": machine(), "seeds": seeds, "claims": {"14": result}}
        write_json(args.json, claims)
    print(" ".join(f"{test}={verdict}" for test, verdict in result["verdict"].items()))


if __name__ == "__main__":
    main()
