"""posttrain chat: one conversation with a model, answers streamed as they are generated."""

from __future__ import annotations

from contextlib import closing
from typing import Annotated, Any

import typer

from posttrain.cli.arguments import Device, TrustRemoteCode, named_model
from posttrain.cli.conversation import Chat
from posttrain.core.errors import RecipeError
from posttrain.core.visible_text import visible


def chat_command(
    model: Annotated[str, typer.Argument(help="A run's folder, or any model: Hub name, folder, .gguf file.")],
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Print the answer to this and leave.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    image: Annotated[
        list[str] | None, typer.Option(help="Image that the first message shows. May be repeated.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.0,
    refine: Annotated[
        bool, typer.Option("--refine", help="Have it check and revise each answer; shows all of it.")
    ] = False,
    rounds: Annotated[int | None, typer.Option(min=1, help="With --refine: revisions at most. 1 if not given.")] = None,
    feedback: Annotated[
        list[str] | None,
        typer.Option(
            help="With --refine: feedback from outside in place of its own: calculator, interpreter, or "
            "module:function. May be repeated."
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="With --refine: words of the requests: math, code, question or text (as if not given)."),
    ] = None,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Talk to a model, or to what a run made."""
    config = named_model(model, device, trust_remote_code)
    given = {name: value for name, value in (("rounds", rounds), ("feedback", feedback), ("task", task)) if value}
    settings: dict[str, Any] = {"system": system, "max_new_tokens": max_new_tokens, "temperature": temperature}
    if refine:
        from posttrain.cli.refining_chat import RefiningChat, check_refine_options

        check_refine_options(given)  # before the model is loaded
        chat: Chat = RefiningChat.open(config, **settings, options=given)
    elif given:
        raise RecipeError(f"--{' and --'.join(given)} would do nothing: add --refine")
    else:
        chat = Chat.open(config, **settings)
    with closing(chat):
        for path in image or ():
            chat.show(path)
        if prompt is not None:
            for piece in chat.ask(prompt):
                typer.echo(visible(piece), nl=False)
            typer.echo()
        else:
            chat.loop()
