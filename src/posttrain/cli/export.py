"""posttrain export: write a model in another program's format, and check that it answers as it did."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posttrain.cli.arguments import DryRun, TrustRemoteCode, named_model, print_plan
from posttrain.core.errors import ModelError
from posttrain.core.visible_text import visible

if TYPE_CHECKING:
    from posttrain.models.adapter_source import AdapterSource

HF_LAYOUT = ("hf", "vllm", "mlx", "hub")
"""Names of one layout, after the programs that read it."""
EXPORT_FORMATS = ("gguf", "ollama", *HF_LAYOUT, "adapter")
MOST_KL = 0.01
"""Nats of a next token's distribution by which a format that rounds nothing may differ."""


def export_command(
    model: Annotated[str, typer.Argument(help="A run's folder, or any folder, file or Hub name of a model.")],
    output: Annotated[Path, typer.Option(help="The file to write (gguf), or the folder (all others).")],
    to: Annotated[
        str,
        typer.Option(
            help="gguf (llama.cpp); ollama: that with a Modelfile; hf, vllm, mlx, hub: the whole model in the Hugging "
            "Face layout, which transformers, vLLM, mlx-lm and the Hub read; adapter: an adapter alone, for peft."
        ),
    ] = "gguf",
    quantization: Annotated[
        str, typer.Option(help="F32, F16, Q8_0, Q4_1, Q4_0, Q4_K; auto: what the model is quantised to, else F16.")
    ] = "auto",
    embeddings: Annotated[
        str | None, typer.Option(help="Type of the embedding and the output head (Q8_0 beside 4 bits).")
    ] = None,
    check: Annotated[
        int, typer.Option(help="Prompts that the model and what was written are asked; 0: no check.", min=0, max=20)
    ] = 20,
    trust_remote_code: TrustRemoteCode = False,
    dry_run: DryRun = False,
) -> None:
    """Write a model for other programs, with its tokenizer and chat template, and check its answers."""
    if to not in EXPORT_FORMATS:
        raise ModelError(f"--to {to!r}: a model can be written as {', '.join(EXPORT_FORMATS)}")
    if output.exists() and (output.is_file() or any(output.iterdir())):
        raise ModelError(f"{output} exists already: name another place, or remove it first")
    config = named_model(model, "cpu", trust_remote_code)
    if dry_run:
        print_plan(_plan(model, config, output, to, quantization, embeddings, check))
        return
    if to == "adapter":
        adapter = _adapter(model, config)
        shutil.copytree(adapter.location, output, dirs_exist_ok=True)
        typer.echo(visible(f"wrote   {output}, an adapter of {adapter.base}"))
        return
    import torch

    from posttrain.models.loading import load_model

    hf, tokenizer = load_model(config, torch.float32)
    if to in HF_LAYOUT:
        from posttrain.models.saving import write_whole

        write_whole(hf, tokenizer, output, None)
        written, exact = output, True
        typer.echo(visible(f"wrote   {output}"))
    else:
        written, exact = _gguf(hf, tokenizer, output, to, quantization, embeddings)
    if check:
        _check(hf, tokenizer, written, check, exact, to)


def _gguf(
    hf: Any, tokenizer: Any, output: Path, to: str, quantization: str, embeddings: str | None
) -> tuple[Path, bool]:
    """Write a GGUF file, and a Modelfile for Ollama; return (the file, whether its weights are floats)."""
    from posttrain.models.gguf_export import export_gguf
    from posttrain.sampling.protocol import stop_tokens

    if to == "ollama":
        from posttrain.models.ollama_export import turn_parts, write_modelfile

        turn_parts(tokenizer)  # a template that can't be written is known before the weights are
    done = export_gguf(hf, tokenizer, output / "model.gguf" if to == "ollama" else output, quantization, embeddings)
    typer.echo(visible(f"wrote   {done.file} ({done.bytes / 2**20:.1f} MiB)"))
    if to == "ollama":
        file = write_modelfile(tokenizer, stop_tokens(hf, tokenizer), done.file, output)
        typer.echo(visible(f"wrote   {file}; in its folder: ollama create NAME -f Modelfile"))
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
    return done.file, set(done.types) <= {"F32", "F16"}


def _plan(
    model: str, config: Any, output: Path, to: str, quantization: str, embeddings: str | None, check: int
) -> list[tuple[str, str]]:
    """Return what would be written, by the model's configuration alone."""
    from posttrain.runs.dry_run import model_line

    if to == "adapter":
        return [model_line(config), ("writes", f"{output}: an adapter of {_adapter(model, config).base}")]
    if to in HF_LAYOUT:
        from posttrain.models.model_shape import model_shape

        shape = model_shape(config)
        first, size, kind = model_line(config, shape), 4 * shape.parameters, "float32, adapters merged"
    else:
        from posttrain.models.gguf_export import planned_gguf

        first, (size, kind) = model_line(config), planned_gguf(config, quantization, embeddings)
    from posttrain.eval.export_check import reader_of

    checks = f"{check} prompts, read by {reader_of(to)}" if check else "none"
    file = output / "model.gguf and Modelfile" if to == "ollama" else output
    return [first, ("writes", f"{file}: {kind}, about {size / 2**20:,.1f} MiB"), ("check", checks)]


def _adapter(model: str, config: Any) -> AdapterSource:
    """Return the adapter at a source. Raises ModelError for a whole model."""
    from posttrain.models.loading import source_adapter

    adapter = source_adapter(config)
    if adapter is None:
        raise ModelError(
            f"{model!r} is a whole model and no adapter: name the folder of a stage that was trained with adapter: "
            "..., which has the adapter beside its model (stages/0-NAME/adapter), or export --to hf"
        )
    return adapter


def _check(hf: Any, tokenizer: Any, written: Path, prompts: int, exact: bool, to: str) -> None:
    """Compare answers, print what was found, and raise ModelError if what was written is another model."""
    from posttrain.eval.export_check import ANSWER_TOKENS, CHECK_PROMPTS, check_export

    found = check_export(hf, tokenizer, written, CHECK_PROMPTS[:prompts], to=to)
    typer.echo(
        f"check   {found.prompts} prompts, read by {found.reader}: {found.same_prompts} have the same tokens, "
        f"{found.same_answers} the same {ANSWER_TOKENS} greedy tokens; KL of the next token {found.kl_mean:.2g} nats "
        f"in the mean, {found.kl_max:.2g} at most"
    )
    if found.same_prompts < found.prompts:
        raise ModelError(
            f"{written} was written, but its tokenizer or chat template makes other tokens of "
            f"{found.prompts - found.same_prompts} prompts than the model's own"
        )
    if exact and not found.kl_max <= MOST_KL:
        raise ModelError(f"{written} was written in floats, but its next-token distribution differs from the model's")
