"""posttrain bake: write a soft prompt for programs without peft."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from posttrain.cli.arguments import Device, TrustRemoteCode, named_model
from posttrain.core.errors import ModelError
from posttrain.core.visible_text import visible


def bake_command(
    model: Annotated[str, typer.Argument(help="A run's folder, or any folder or Hub name of a soft prompt.")],
    folder: Annotated[Path, typer.Argument(help="Folder for soft_prompt.safetensors.")],
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write a soft prompt as tensors for vLLM (prompt_embeds) and transformers (a cached prefix)."""
    config = named_model(model, device, trust_remote_code)
    from posttrain.models.loading import load_model, source_adapter
    from posttrain.models.soft_prompt_files import BAKED_FILE, bake, is_soft_prompt

    adapter = source_adapter(config)
    if adapter is None or not is_soft_prompt(adapter.settings):  # known before the weights are read
        kind = "a whole model" if adapter is None else f"an adapter of kind {adapter.settings.get('peft_type')}"
        raise ModelError(
            f"model source {model!r} is {kind}, and no soft prompt: name the run's folder, or the stage's model "
            "folder, of a stage with adapter kind prompt, prefix, p_tuning or p_tuning_v2"
        )
    if (folder / BAKED_FILE).exists():
        raise ModelError(f"{folder / BAKED_FILE} exists already: name another folder, or remove the file first")
    file = bake(load_model(config)[0], folder)
    typer.echo(visible(f"base   {adapter.base}"))
    for name, shape in _shapes(file):
        typer.echo(f"{name:<6} {shape}")
    typer.echo(visible(f"wrote  {file}"))


def _shapes(file: Path) -> list[tuple[str, list[int]]]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return [(name, opened.get_slice(name).get_shape()) for name in sorted(opened.keys())]
