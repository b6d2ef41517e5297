"""The command line. Heavy imports are inside the command that needs them, so that --help is fast."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from posttrain.cli.bake import bake_command
from posttrain.cli.chat import chat_command
from posttrain.cli.compose_command import compose_command
from posttrain.cli.doctor import doctor_command
from posttrain.cli.evaluate import evaluate_command
from posttrain.cli.export import export_command
from posttrain.cli.inspect_command import inspect_command
from posttrain.cli.lab import lab_command
from posttrain.cli.memory_command import memory_command
from posttrain.cli.merge_command import merge_command
from posttrain.cli.new_command import new_command
from posttrain.cli.push import push_command
from posttrain.cli.recipes import recipes_app
from posttrain.cli.report import report_command
from posttrain.cli.run import run_command
from posttrain.cli.serve import serve_command
from posttrain.cli.sweep_command import sweep_command
from posttrain.cli.ui_command import ui_command
from posttrain.core.errors import PosttrainError, RecipeError
from posttrain.core.files import cache_folder, os_error
from posttrain.core.secrets import hide_secrets
from posttrain.core.visible_text import show_text_as_it_is, visible


class _Group(TyperGroup):
    """Print the errors that a person can act on as one message, with an exit code; others keep their traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except PosttrainError as error:
            _echo_error(error)
            raise typer.Exit(2 if isinstance(error, RecipeError) else 1) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except Exception as error:
            message = _unwritable_cache(error) or _refused_by_the_system(error)
            if message is None:
                raise
            _echo_error(message)
            raise typer.Exit(1) from None


def _echo_error(error: object) -> None:
    typer.echo(f"error: {visible(hide_secrets(str(error)))}", err=True)


def _unwritable_cache(error: Exception) -> str | None:
    """Return a message if an error comes from a cache folder that can't be written."""
    reason = os_error(error)
    if reason is None or not reason.filename:
        return None
    hub = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    failed = Path(os.fsdecode(reason.filename))
    for folder, variable in ((cache_folder(), "POSTTRAIN_CACHE"), (hub, "HF_HOME")):
        if folder == failed or folder in failed.parents or failed in folder.parents:
            return f"the cache folder {folder} can't be written ({reason.strerror}): set {variable} to another folder"
    return None


def _refused_by_the_system(error: Exception) -> str | None:
    """Return a message if the operating system refused to open or write a file, which is no fault of the program."""
    if not isinstance(error, OSError) or not error.filename:
        return None
    writable = error.errno in (errno.EROFS, errno.EACCES, errno.EPERM)
    hint = ". Runs go elsewhere with output=FOLDER or --folder FOLDER" if writable else ""
    return f"{os.fsdecode(error.filename)[:300]}: {error.strerror}{hint}"


app = typer.Typer(
    cls=_Group,
    help="From a pretrained language model to a measurably better one. Start with: posttrain run quickstart",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("new")(new_command)
app.command("run")(run_command)
app.command("sweep")(sweep_command)
app.command("inspect")(inspect_command)
app.command("evaluate")(evaluate_command)
app.command("chat")(chat_command)
app.command("serve")(serve_command)
app.command("bake")(bake_command)
app.command("export")(export_command)
app.command("push")(push_command)
app.command("merge")(merge_command)
app.command("compose")(compose_command)
app.command("ui")(ui_command)
app.command("report")(report_command)
app.command("lab")(lab_command)
app.command("memory")(memory_command)
app.command("doctor")(doctor_command)
app.add_typer(recipes_app, name="recipes")


def _version(wanted: bool) -> None:
    if wanted:
        from posttrain import __version__

        typer.echo(f"posttrain {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line."""
    show_text_as_it_is()
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception:
        sys.stderr.write(visible(hide_secrets(traceback.format_exc())))
        sys.exit(1)


if __name__ == "__main__":
    main()
