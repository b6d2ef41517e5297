"""Processes of their own that have the imports behind them, so that they can be started often.

The processes are forked from a server that has imported what a run imports and done nothing else: each is a program
like any other, with its own signals, files and exit code, a second after it is asked for rather than five.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch

MODULES = [
    "datasets", "peft", "pyarrow.parquet", "rich.progress", "torch", "transformers.models.llama.modeling_llama",
    "posttrain.cli.main", "posttrain.runs.runner", "posttrain.report.build", "posttrain.eval.tasks",
    "posttrain.methods.rl.rl_stage",
    "posttrain.methods.preference.offline", "posttrain.methods.reward_model.pairwise", "tests.warm",
]  # fmt: skip
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(MODULES)


def posttrain(
    arguments: list[str], log: Path, environment: Mapping[str, str], before: Callable[[], None] | None = None
) -> ForkServerProcess:
    """Start `posttrain ARGUMENTS`; what it prints is put behind `log`. before: called in the process, first."""
    process = CONTEXT.Process(target=_main, args=(arguments, log, dict(environment), before))
    process.start()
    return process


def run(function: Callable[..., object], *args: object, folder: Path, ranks: int = 1) -> None:
    """Call a function of a test module in processes of their own, as torchrun would start them; they must end well.

    Args:
        function: What each process calls.
        args: Its arguments.
        folder: Folder that the processes work in; what they print is put behind its file `log`.
        ranks: Number of processes.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    processes = []
    for rank in range(ranks):
        given = {**world, "RANK": rank, "LOCAL_RANK": rank} if ranks > 1 else {}
        environment = {name: str(value) for name, value in given.items()}
        processes.append(CONTEXT.Process(target=_call, args=(function, args, folder, environment)))
        processes[-1].start()
    for process in processes:
        process.join(240)
        if process.exitcode:  # the others wait for it
            for other in processes:
                other.kill()
    assert [p.exitcode for p in processes] == [0] * ranks, (folder / "log").read_text()[-4000:]


def _call(function: Callable[..., object], args: tuple[object, ...], folder: Path, environment: dict[str, str]) -> None:
    _begin(folder / "log", environment)
    os.chdir(folder)
    function(*args)


def _begin(log: Path, environment: Mapping[str, str]) -> None:
    root = Path(__file__).parents[1]
    os.environ.update({"PYTHONPATH": f"{root}{os.pathsep}{root / 'src'}", "OMP_NUM_THREADS": "1", **environment})
    torch.set_num_threads(1)
    with log.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)


def _main(arguments: list[str], log: Path, environment: dict[str, str], before: Callable[[], None] | None) -> None:
    _begin(log, environment)
    sys.argv = ["posttrain", *arguments]
    if before is not None:
        before()
    from posttrain.cli.main import main

    main()
