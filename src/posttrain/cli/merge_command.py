"""posttrain merge: one model from the weights of several."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posttrain.cli.arguments import DryRun, TrustRemoteCode, named_model, print_plan
from posttrain.core.errors import ModelError
from posttrain.core.visible_text import visible

if TYPE_CHECKING:
    from posttrain.config import ModelConfig
    from posttrain.methods.merge.merge_settings import MergeConfig


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
    experts: Annotated[
        str | None,
        typer.Option(help="In place of an algorithm: prompts, random or zeros, the routers of a mixture of experts."),
    ] = None,
    prompts: Annotated[
        list[str] | None, typer.Option(help="With --experts prompts: rows of each model, in the order of the models.")
    ] = None,
    top_k: Annotated[int, typer.Option(help="With --experts: experts that compute each token.")] = 2,
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
    dry_run: DryRun = False,
) -> None:
    """Merge models into one, or pool what several say, without training."""
    if output.exists():
        raise ModelError(f"{output} exists already: name another folder, or remove it first")
    if prompts and experts != "prompts":
        raise ModelError("--prompts are for routers from prompts: add --experts prompts")
    if confidence is not None and ensemble is None:
        raise ModelError("--confidence is a setting of --ensemble: add --ensemble arithmetic or geometric")
    ways = {
        "ensemble": None if ensemble is None else {"pool": ensemble, "confidence": confidence},
        "experts": None if experts is None else {"router": experts, "top_k": top_k},
    }
    if base is None and (algorithm or "linear") not in AVERAGES:
        raise ModelError(f"{algorithm} merges changes from a base: name it with --base")
    start = named_model(models[0] if base is None else base, "cpu", trust_remote_code)
    [named_model(model, "cpu", trust_remote_code) for model in models]
    from posttrain.methods.merge.merge import Merge
    from posttrain.trainer.stage import StageContext

    config = _checked(
        {
            "models": _listed(models, weights, prompts or []),
            **_way(ways, algorithm, setting or []),
            "tokenizer": tokenizer,
            "chat_template": chat_template,
            "dtype": dtype,
            "adapter": None if adapter_rank is None else {"rank": adapter_rank},
        }
    )
    if dry_run:
        print_plan(_plan(config, start, output))
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.writing-") as work:
        done = Merge(config, StageContext(None, None)).run(start, Path(work), seed)
        (Path(work) / "model").rename(output)
    typer.echo(visible(f"wrote   {output}"))
    for name, value in done["made"].items():
        typer.echo(f"{name}: {value:,}")


AVERAGES = ("linear", "slerp", "multi_slerp", "karcher")
"""Algorithms that need no base."""


def _plan(config: MergeConfig, start: ModelConfig, output: Path) -> list[tuple[str, str]]:
    """Return what would be merged, by the models' configurations alone."""
    from posttrain.models.model_shape import model_shape
    from posttrain.runs.dry_run import model_line

    sources = [start.source, *(str(model.source) for model in config.models)]
    lines, shapes = [], []
    for source in dict.fromkeys(sources):
        own = start.model_copy(update={"source": source})
        shapes.append(model_shape(own))
        lines.append(model_line(own, shapes[-1]))
    ways = {"algorithm": config.algorithm, "ensemble": config.ensemble, "experts": config.experts}
    name, way = next((name, way) for name, way in ways.items() if way is not None)
    settings = way.model_dump(exclude_none=True, mode="json") if hasattr(way, "model_dump") else way
    told = ", ".join(f"{k} {v}" for k, v in settings.items()) if isinstance(settings, dict) else str(settings)
    lines.append((name, told))
    if len({(s.kind, s.hidden, s.layers) for s in shapes}) > 1:
        lines.append(("!", "the models differ in type, width or number of layers, which most ways of merging refuse"))
    return [*lines, ("writes", str(output))]


def _way(others: dict[str, Any], algorithm: str | None, setting: list[str]) -> dict[str, Any]:
    """Return the setting that says how the models become one: an algorithm, unless another way is given."""
    given = {name: value for name, value in others.items() if value is not None}
    if len(given) > 1:
        raise ModelError("--ensemble and --experts make models in two ways: give one of them")
    if given and (algorithm is not None or setting):
        raise ModelError(f"--{next(iter(given))} stands in place of an algorithm: leave --algorithm and --setting out")
    return given or {"algorithm": {"name": algorithm or "linear", **_settings(setting)}}


def _checked(values: dict[str, Any]) -> MergeConfig:
    """Return checked settings; what is wrong with them becomes the command's error."""
    from pydantic import ValidationError

    from posttrain.methods.merge.merge_settings import MergeConfig

    try:
        return MergeConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise ModelError(f"{place}: {message}" if place else message) from error


def _listed(models: list[str], weights: str | None, prompts: list[str]) -> list[dict[str, Any]]:
    """Return the settings of each model; an option that is given has as many values as there are models."""
    listed: list[dict[str, Any]] = [{"source": model} for model in models]
    for name, values in (("weight", [] if weights is None else weights.split(",")), ("prompts", prompts)):
        if values and len(values) != len(models):
            option = "--weights has" if name == "weight" else "--prompts was given"
            raise ModelError(f"{option} {len(values)} values, and there are {len(models)} models")
        for model, value in zip(listed, values, strict=False):
            model[name] = value.strip() if name == "weight" else {"source": value}
    return listed


def _settings(pairs: list[str]) -> dict[str, Any]:
    import yaml

    out = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ModelError(f"--setting {pair!r}: expected KEY=VALUE, for example density=0.5")
        out[name] = yaml.safe_load(text)
    return out
