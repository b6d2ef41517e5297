"""`posttrain` in a process of its own that has the imports behind it, so that it can be started often.

The processes are forked from a server that has imported what a run imports and done nothing else: each is a program
like any other, with its own signals, files and exit code, a second after it is asked for rather than five.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path

MODULES = [
    "datasets", "peft", "pyarrow.parquet", "rich.progress", "torch", "transformers.models.llama.modeling_llama",
    "posttrain.cli.main", "posttrain.runs.runner", "posttrain.report.build", "posttrain.eval.tasks",
    "posttrain.methods.rl.rl_stage",
    "posttrain.methods.preference.offline", "posttrain.methods.reward_model.pairwise", "tests.invariants.warm",
]  # fmt: skip
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(MODULES)


def posttrain(
    arguments: list[str], log: Path, environment: Mapping[str, str], before: Callable[[], None] | None = None
) -> ForkServerProcess:
    """Start `posttrain ARGUMENTS`; what it prints is put behind `log`. before: called in the process, first."""
    root = Path(__file__).parents[2]
    given = {"PYTHONPATH": f"{root}{os.pathsep}{root / 'src'}", **environment}  # for the workers of rewards
    process = CONTEXT.Process(target=_main, args=(arguments, log, given, before))
    process.start()
    return process


def _main(arguments: list[str], log: Path, environment: dict[str, str], before: Callable[[], None] | None) -> None:
    os.environ.update(environment)
    with log.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.argv = ["posttrain", *arguments]
    if before is not None:
        before()
    from posttrain.cli.main import main

    main()


__all__ = ["posttrain"]
