"""posttrain export: write a model in another program's format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from posttrain.cli.arguments import TrustRemoteCode, named_model
from posttrain.core.errors import ModelError
from posttrain.core.visible_text import visible


def export_command(
    model: Annotated[str, typer.Argument(help="A run's folder, or any folder, file or Hub name of a model.")],
    output: Annotated[Path, typer.Option(help="The file to write.")],
    to: Annotated[str, typer.Option(help="Format: gguf (llama.cpp).")] = "gguf",
    quantization: Annotated[
        str, typer.Option(help="F32, F16, Q8_0, Q4_1, Q4_0, Q4_K; auto: what the model is quantised to, else F16.")
    ] = "auto",
    embeddings: Annotated[
        str | None, typer.Option(help="Type of the embedding and the output head (Q8_0 beside 4 bits).")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write a model as a GGUF file, with its tokenizer and chat template."""
    if to != "gguf":
        raise ModelError(f"--to {to!r}: a model can be written as gguf; folders of runs are in the Hugging Face layout")
    import torch

    from posttrain.models.gguf_export import export_gguf
    from posttrain.models.loading import load_model

    config = named_model(model, "cpu", trust_remote_code)
    hf, tokenizer = load_model(config, torch.float32)
    done = export_gguf(hf, tokenizer, output, quantization, embeddings)
    typer.echo(visible(f"wrote   {done.file} ({done.bytes / 2**20:.1f} MiB)"))
    typer.echo(f"tensors {', '.join(f'{count} {kind}' for kind, count in sorted(done.types.items()))}")
    if done.exact:
        typer.echo(f"exact   {done.exact} weights keep the integers that they were quantised to")
    for note in done.notes:
        typer.echo(visible(f"note    {note}"))
    if done.rounded_again:
        typer.echo(
            f"warning: {len(done.rounded_again)} quantised weights were rounded again, to another grid "
            f"({done.rounded_again[0]}, ...): export the model that they were made of, or choose their own type (auto)",
            err=True,
        )
