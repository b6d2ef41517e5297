"""posttrain merge: one model from the weights of several."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from posttrain.cli.arguments import TrustRemoteCode, named_model
from posttrain.core.errors import ModelError
from posttrain.core.visible_text import visible


def merge_command(
    models: Annotated[list[str], typer.Argument(help="Runs' folders, or folders, files or Hub names of models.")],
    output: Annotated[Path, typer.Option(help="Folder for the merged model.")],
    base: Annotated[
        str | None,
        typer.Option(help="The model that they were trained from. None: the first model, for averages alone."),
    ] = None,
    algorithm: Annotated[
        str | None, typer.Option(help="linear (the default), slerp, ties, dare_ties, ...: docs/merging.md.")
    ] = None,
    ensemble: Annotated[
        str | None,
        typer.Option(help="In place of an algorithm: arithmetic or geometric, which pools output distributions."),
    ] = None,
    confidence: Annotated[
        str | None, typer.Option(help="With --ensemble: entropy or max_probability, for weights at every token.")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="A weight for each model, such as 1,0.5.")] = None,
    setting: Annotated[
        list[str] | None, typer.Option(help="Setting of the algorithm as KEY=VALUE, such as density=0.5; repeatable.")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="base, or one of the models, if they differ.")] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="base, one of the models, or a template, if they differ.")
    ] = None,
    adapter_rank: Annotated[
        int | None, typer.Option(help="Write the change of the base as a LoRA adapter of this rank, by SVD.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of random masks.")] = 0,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Merge models into one, or pool what several say, without training."""
    from pydantic import ValidationError

    from posttrain.methods.merge.merge import Merge
    from posttrain.methods.merge.merge_settings import MergeConfig
    from posttrain.trainer.stage import StageContext

    if output.exists():
        raise ModelError(f"{output} exists already: name another folder, or remove it first")
    if ensemble is not None and (algorithm is not None or setting):
        raise ModelError("--ensemble pools distributions and merges no weights: leave --algorithm and --setting out")
    if confidence is not None and ensemble is None:
        raise ModelError("--confidence is a setting of --ensemble: add --ensemble arithmetic or geometric")
    algorithm = algorithm or "linear"
    if base is None and algorithm not in AVERAGES:
        raise ModelError(f"{algorithm} merges changes from a base: name it with --base")
    start = named_model(models[0] if base is None else base, "cpu", trust_remote_code)
    for model in models:
        named_model(model, "cpu", trust_remote_code)
    try:
        way: dict[str, Any] = {"algorithm": {"name": algorithm, **_settings(setting or [])}}
        if ensemble is not None:
            way = {"ensemble": {"pool": ensemble, "confidence": confidence}}
        config = MergeConfig.model_validate(
            {
                "models": _weighted(models, weights),
                **way,
                "tokenizer": tokenizer,
                "chat_template": chat_template,
                "dtype": dtype,
                "adapter": None if adapter_rank is None else {"rank": adapter_rank},
            }
        )
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise ModelError(f"{place}: {message}" if place else message) from error
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.writing-") as work:
        done = Merge(config, StageContext(None, None)).run(start, Path(work), seed)
        (Path(work) / "model").rename(output)
    typer.echo(visible(f"wrote   {output}"))
    for name, value in done["made"].items():
        typer.echo(f"{name}: {value:,}")


AVERAGES = ("linear", "slerp", "multi_slerp", "karcher")
"""Algorithms that need no base."""


def _weighted(models: list[str], weights: str | None) -> list[dict[str, Any]]:
    if weights is None:
        return [{"source": model} for model in models]
    numbers = weights.split(",")
    if len(numbers) != len(models):
        raise ModelError(f"--weights has {len(numbers)} numbers, and there are {len(models)} models")
    return [{"source": model, "weight": number.strip()} for model, number in zip(models, numbers, strict=True)]


def _settings(pairs: list[str]) -> dict[str, Any]:
    import yaml

    out = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ModelError(f"--setting {pair!r}: expected KEY=VALUE, for example density=0.5")
        out[name] = yaml.safe_load(text)
    return out
