"""posttrain serve: a model behind OpenAI's HTTP interface, on this machine."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from posttrain.cli.arguments import Device, DryRun, TrustRemoteCode, named_model, print_plan
from posttrain.core.errors import RecipeError

if TYPE_CHECKING:
    from posttrain.config import ModelConfig
    from posttrain.models.adapter_source import AdapterSource
    from posttrain.serving.batcher import Batcher
    from posttrain.serving.http_server import ApiServer

STOP_SECONDS = 30.0
"""Seconds that running answers get to end after Ctrl-C."""


def serve_command(
    model: Annotated[str, typer.Argument(help="A run's folder, or any model: Hub name, folder, .gguf file.")],
    host: Annotated[str, typer.Option(help="Address to listen on; others than loopback need a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free port.")] = 8000,
    name: Annotated[str | None, typer.Option(help="Name of the model for clients. If not given: its source's.")] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=SOURCE", help="LoRA adapter on the model, under a name for clients; several times."),
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option(metavar="VARIABLE", help="Environment variable with the key that clients must send.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Longest answer in tokens where a request does not say.")
    ] = 512,
    max_running: Annotated[
        int | None, typer.Option(min=1, help="Completions computed together. If not given: 128 on a CPU, 512 on a GPU.")
    ] = None,
    max_waiting: Annotated[int, typer.Option(min=0, help="Prompts that may wait; more get status 429.")] = 256,
    cache_mb: Annotated[
        float | None, typer.Option(min=1.0, help="MiB for keys and values. If not given: a fifth of the memory.")
    ] = None,
    int8_cache: Annotated[bool, typer.Option("--int8-cache", help="Keep keys and values in 8 bits.")] = False,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    dry_run: DryRun = False,
) -> None:
    """Serve a model to programs that speak OpenAI's protocol."""
    key = os.environ.get(api_key_env) if api_key_env else None
    if api_key_env and not key:
        raise RecipeError(f"the environment variable {api_key_env} holds no key: set it, or leave --api-key-env out")
    config = named_model(model, device, trust_remote_code)
    from posttrain.serving.bounded_server import LOOPBACK, check_port, port_error

    if host not in LOOPBACK and key is None:
        raise RecipeError(f"--host {host} lets other machines in: give a key with --api-key-env VARIABLE")

    own = name or served_name(model)
    sources = named_adapters(adapter or [], own)
    check_port(host, port)

    from posttrain.sampling.served_adapters import find_served
    from posttrain.serving.http_server import ApiServer
    from posttrain.serving.open_model import open_adapters, open_model_api

    adapters = find_served(config, sources)
    if dry_run:
        access = "without a key" if key is None else f"with the key in {api_key_env}"
        listens = f"http://{host}:{port or '(any free port)'}/v1, as {', '.join([own, *adapters])}, {access}"
        print_plan(_plan(config, adapters, cache_mb, listens))
        return
    api = open_model_api(config, own, max_tokens, max_waiting, max_running, cache_mb, int8_cache)
    apis = [api, *open_adapters(api, config, sources, adapters)]
    try:
        server = ApiServer(host, port, apis, key)
    except OSError as error:  # taken since
        api.batcher.close(0)
        raise port_error(f"{host}:{port}", error) from error
    serve_until_stopped(server, api.batcher)


def _plan(
    config: ModelConfig, adapters: Mapping[str, AdapterSource], cache_mb: float | None, listens: str
) -> Iterator[tuple[str, str]]:
    """Yield what would be served, by the configurations of the model and its adapters alone."""
    from posttrain.models.loading import load_tokenizer
    from posttrain.runs.dry_run import model_line
    from posttrain.sampling.engine import MEMORY_SHARE
    from posttrain.sampling.memory import memory_bytes

    line = model_line(config)
    yield line
    for name, adapter in adapters.items():
        targets = adapter.settings.get("target_modules")
        layers = targets if isinstance(targets, str) else ", ".join(sorted(targets or []))
        yield "adapter", f"{name}: {adapter.location}, rank {adapter.settings.get('r')} on {layers}"
    if not load_tokenizer(config).chat_template:
        yield "!", "the model has no chat template: /v1/chat/completions is refused, /v1/completions answers"
    if cache_mb is not None:
        yield "cache", f"{cache_mb:,.0f} MiB for keys and values"
    elif line[1].endswith("cpu"):
        yield "cache", f"{memory_bytes() * MEMORY_SHARE['cpu'] / 2**20:,.0f} MiB for keys and values"
    else:
        yield "cache", f"{MEMORY_SHARE['cuda']:.0%} of the GPU's memory for keys and values"
    yield "listens", listens


def named_adapters(given: Sequence[str], model: str) -> dict[str, str]:
    """Return the source of each adapter by its name.

    Args:
        given: NAME=SOURCE of each.
        model: Name of the model.

    Raises:
        RecipeError: One is not of that form, or has a name that is taken.
    """
    sources: dict[str, str] = {}
    for text in given:
        name, _, source = text.partition("=")
        if not (name and source):
            raise RecipeError(f"--adapter {text!r}: expected NAME=SOURCE, such as terse=runs/terse")
        if name in sources or name == model:
            raise RecipeError(f"--adapter {text!r}: the name {name!r} is taken; models and adapters need one each")
        sources[name] = source
    return sources


def served_name(source: str) -> str:
    """Return the name under which clients know a model: that of its source, without folders of this machine."""
    if re.match(r"(tiny|lab|package):", source):
        return source
    path = Path(source).expanduser()
    if not path.exists():  # a name of the Hub
        return source
    path = path.resolve()
    path = path.parent if path.name == "model" else path  # of a run
    return path.stem if path.suffix == ".gguf" else path.name


def serve_until_stopped(server: ApiServer, batcher: Batcher) -> None:
    """Serve until Ctrl-C or SIGTERM; running answers then get `STOP_SECONDS` seconds, or until the second signal."""
    shown = f"[{server.server_name}]" if ":" in server.server_name else server.server_name
    thread = threading.Thread(target=server.serve_forever, name="posttrain-http", daemon=True)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        thread.start()
        typer.echo(f"serving {', '.join(server.models)} at http://{shown}:{server.server_port}/v1 (Ctrl-C stops)")
        while thread.is_alive():
            thread.join(1.0)
    except KeyboardInterrupt:
        typer.echo("stopping: running answers are finished first (Ctrl-C again: at once)")
        try:
            batcher.close(STOP_SECONDS)
        except KeyboardInterrupt:
            batcher.close(0.0)
        server.finish_writing()
    finally:
        server.shutdown()
        server.server_close()
        signal.signal(signal.SIGTERM, before)
