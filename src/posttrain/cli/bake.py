"""posttrain bake: write a soft prompt for programs without peft."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from posttrain.cli.arguments import Device, DryRun, TrustRemoteCode, named_model, print_plan
from posttrain.core.errors import ModelError
from posttrain.core.visible_text import visible


def bake_command(
    model: Annotated[str, typer.Argument(help="A run's folder, or any folder or Hub name of a soft prompt.")],
    folder: Annotated[Path, typer.Argument(help="Folder for soft_prompt.safetensors.")],
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    dry_run: DryRun = False,
) -> None:
    """Write a soft prompt as tensors for vLLM (prompt_embeds) and transformers (a cached prefix)."""
    config = named_model(model, device, trust_remote_code)
    from posttrain.models.loading import load_model, source_adapter
    from posttrain.models.soft_prompt_files import BAKED_FILE, bake, baked_tensors, is_soft_prompt

    adapter = source_adapter(config)
    if adapter is None or not is_soft_prompt(adapter.settings):  # known before the weights are read
        kind = "a whole model" if adapter is None else f"an adapter of kind {adapter.settings.get('peft_type')}"
        raise ModelError(
            f"model source {model!r} is {kind}, and no soft prompt: name the run's folder, or the stage's model "
            "folder, of a stage with adapter kind prompt, prefix, p_tuning or p_tuning_v2"
        )
    if (folder / BAKED_FILE).exists():
        raise ModelError(f"{folder / BAKED_FILE} exists already: name another folder, or remove the file first")
    if dry_run:
        from posttrain.runs.dry_run import model_line

        tensors = baked_tensors(adapter)
        once = ", after a pass of the base over the virtual tokens" if tensors == ("vectors", "keys", "values") else ""
        kind = f"{adapter.settings['peft_type']}, {adapter.settings.get('num_virtual_tokens')} virtual tokens"
        writes = f"{folder / BAKED_FILE}: {', '.join(tensors)}{once}"
        print_plan([model_line(config), ("prompt", kind), ("writes", writes)])
        return
    file = bake(load_model(config)[0], folder)
    typer.echo(visible(f"base   {adapter.base}"))
    for name, shape in _shapes(file):
        typer.echo(f"{name:<6} {shape}")
    typer.echo(visible(f"wrote  {file}"))


def _shapes(file: Path) -> list[tuple[str, list[int]]]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return [(name, opened.get_slice(name).get_shape()) for name in sorted(opened.keys())]
