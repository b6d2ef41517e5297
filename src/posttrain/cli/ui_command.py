"""posttrain ui: a local page with all runs."""

from __future__ import annotations

import importlib
import signal
import threading
from pathlib import Path
from typing import Annotated

import typer

from posttrain.core.errors import RecipeError

DEFAULT_FOLDER = "runs"


def ui_command(
    folders: Annotated[
        list[Path] | None, typer.Argument(metavar="FOLDER", help="Folders with runs. [default: runs]")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free port.")] = 0,
    votes: Annotated[
        Path | None, typer.Option(help="File of votes for answers. [default: votes.jsonl in the first folder]")
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
) -> None:
    """Show all runs in a local page: live curves, comparisons, stored rows, chat with two models, starting a run."""
    roots = folders or [Path(DEFAULT_FOLDER)]
    for root in roots:
        if root.exists() and not root.is_dir():
            raise RecipeError(f"{root} is no folder: name the folder that runs are in, such as {DEFAULT_FOLDER}")
    from posttrain.ui.pages import UiState
    from posttrain.ui.run_index import RunIndex
    from posttrain.ui.ui_server import UiServer

    state = UiState(RunIndex(roots), votes or roots[0] / "votes.jsonl")
    try:
        server = UiServer(port, state)
    except OSError as error:
        raise RecipeError(f"port {port} can't be listened on ({error.strerror}): give another --port") from error
    threading.Thread(target=importlib.import_module, args=("pyarrow.parquet",), daemon=True).start()  # takes a second
    thread = threading.Thread(target=server.serve_forever, name="posttrain-ui", daemon=True)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        thread.start()
        typer.echo(f"runs in {', '.join(map(str, roots))}: {server.address} (Ctrl-C stops)")
        if show:
            typer.launch(server.address)
        while thread.is_alive():
            thread.join(1.0)
    except KeyboardInterrupt:
        typer.echo("stopped")
    finally:
        server.shutdown()
        server.server_close()
        state.chats.close()
        signal.signal(signal.SIGTERM, before)
