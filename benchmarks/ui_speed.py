"""Measure how fast `posttrain ui` answers with many runs and many rollouts.

    python benchmarks/ui_speed.py [FOLDER]

Writes 1,000 runs and 100,352 rollouts (196 steps of 512) into FOLDER (a temporary one if not given), serves them, and
prints the seconds of each request: the first one, and one after it.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import threading
import time
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlencode

from posttrain.core.types import Rollout, RolloutGroup
from posttrain.sampling.rollout_store import write_rollouts
from posttrain.ui.pages import UiState
from posttrain.ui.run_index import RunIndex
from posttrain.ui.ui_server import UiServer

RUNS, STEPS, GROUPS, EACH = 1000, 196, 64, 8
RECIPE = "name: r\nmodel: {source: tiny:llama}\nstages: [{method: sft, name: sft, data: {source: rows.jsonl}}]\n"


def write_runs(root: Path) -> None:
    """Write runs with a manifest of some 20 kB each, as those of real runs are."""
    examples = [{"text": "word " * 400, "pieces": [["word " * 300, 0], ["word " * 100, 1]]} for _ in range(4)]
    for number in range(RUNS):
        run = root / f"run-{number:04d}"
        run.mkdir(parents=True)
        stage = {"name": "sft", "method": "sft", "makes": "model", "status": "done", "steps": 100}
        manifest = {"status": "done", "created": "2026-01-01T00:00:00", "model": {"source": "tiny:llama"}}
        data = [{"stage": "sft", "examples": examples}]
        (run / "manifest.json").write_text(json.dumps({**manifest, "stages": [stage], "data": data}, indent=1))
        (run / "recipe.yaml").write_text(RECIPE)


def write_many_rollouts(folder: Path) -> None:
    """Write rollouts with completions of 80 words."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(2000)]
    for step in range(1, STEPS + 1):
        groups = [
            RolloutGroup(
                tuple(range(50)),
                {"answer": "7", "source": "made"},
                [
                    Rollout(
                        tuple(range(100)), (-0.5,) * 100, "stop", " ".join(rng.choices(words, k=80)), {}, rng.random()
                    )
                    for _ in range(EACH)
                ],
            )
            for _ in range(GROUPS)
        ]
        write_rollouts(folder, step, groups, None, [" ".join(rng.choices(words, k=40))] * GROUPS, list(range(GROUPS)))


def main(root: Path) -> None:
    """Write what is missing, and measure."""
    if not (root / "run-0000").is_dir():
        write_runs(root)
        write_many_rollouts(root / "run-0000" / "stages" / "0-rl" / "rollouts")
    server = UiServer(0, UiState(RunIndex([root]), root / "votes.jsonl"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    run = {"run": str(root / "run-0000")}
    for title, path, query in (
        ("list of 1,000 runs", "/", {}),
        ("newest rollouts", "/rows", run),
        ("rollouts by reward", "/rows", {**run, "order": "best"}),
        ("rollouts that contain a rare text", "/rows", {**run, "text": "qqqqq"}),
        ("rollouts with a reward of 0.99 or more", "/rows", {**run, "low": "0.99"}),
    ):
        took = []
        for _ in range(2):
            began, connection = time.perf_counter(), HTTPConnection("127.0.0.1", server.server_port)
            connection.request("GET", f"{path}?{urlencode(query)}", headers={"Authorization": f"Bearer {server.token}"})
            answer = connection.getresponse()
            size = len(answer.read())
            took.append(time.perf_counter() - began)
            assert answer.status == 200, answer.status
        print(f"{title:<42} {took[0]:.2f} s, then {took[1]:.2f} s  ({size / 1000:,.0f} kB)")
    server.shutdown()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(Path(folder))
