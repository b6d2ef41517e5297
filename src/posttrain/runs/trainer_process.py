"""The process of one trainer on a Ray cluster: it carries a recipe out as under torchrun, and replies how it ended."""

from __future__ import annotations

import os
import pickle
import re
import signal
import sys
import threading
import traceback
from typing import Any

import posttrain
from posttrain.core import errors
from posttrain.core.imports import add_import_folder
from posttrain.core.ray_cluster import set_workers
from posttrain.core.secrets import hide_secrets
from posttrain.core.visible_text import show_text_as_it_is, visible

PEER = re.compile(r"\b(gloo|nccl|closed by peer|reset by peer|TCPStore|Dist(Backend|Network|Store)Error)\b", re.I)
"""In RuntimeErrors that torch raises because another process of the group is gone."""


def main() -> None:
    """Read the frame from standard input, do the work, write the reply (a pickle) to the pipe POSTTRAIN_REPLY."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where Ray was started in a shell's background
    channel = os.fdopen(os.dup(0), "rb")
    frame = pickle.loads(channel.read(int.from_bytes(channel.read(8), "little")))
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    threading.Thread(target=_end_with, args=(channel,), daemon=True).start()
    show_text_as_it_is()
    reply = _carry_out(frame)
    sys.stdout.flush()
    with os.fdopen(int(os.environ["POSTTRAIN_REPLY"]), "wb") as pipe:
        pipe.write(pickle.dumps(reply))
    # Not through the interpreter's end: the process group waits there for the others, which may be gone.
    sys.stderr.flush()
    os._exit(0 if reply["kind"] == "done" else 1)


def _end_with(channel: Any) -> None:
    """End this process, as if killed, when the actor that started it is gone."""
    channel.read()
    os.kill(os.getpid(), signal.SIGKILL)


def _carry_out(frame: dict[str, Any]) -> dict[str, Any]:
    """Return the reply: {"kind": done, stopped, error or peer, ...}."""
    try:
        # Ray blocks SIGINT in its workers; one that came meanwhile is raised here, and is a stop.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
        if frame["version"] != posttrain.__version__:
            raise errors.ModelError(
                f"this machine has posttrain {posttrain.__version__}, and the run was started with {frame['version']}: "
                "install the same version on every machine of the cluster"
            )
        for folder in frame["import_folders"]:
            add_import_folder(folder)
        set_workers(frame["rooms"])
        from posttrain.config import Recipe
        from posttrain.runs.runner import run_here

        functions = pickle.loads(frame["functions"]) if frame["functions"] else {}
        recipe = Recipe.model_validate(frame["recipe"])
        done = run_here(recipe, frame["folder"], False, None, functions, frame["accept"], frame["placed"])
        return {"kind": "done", "value": done}
    except KeyboardInterrupt as stopped:
        return {"kind": "stopped", "message": str(stopped)}
    except errors.PosttrainError as error:
        return {"kind": "error", "class": type(error), "message": str(error)}
    except BaseException as error:
        of_torch = isinstance(error, RuntimeError) or type(error).__name__ == "CheckpointException"
        if of_torch and PEER.search(f"{type(error).__name__}: {error}"):
            return {"kind": "peer", "message": str(error)}
        sys.stderr.write(visible(hide_secrets(traceback.format_exc())))
        return {"kind": "failed", "message": f"{type(error).__name__}: {error}"}
