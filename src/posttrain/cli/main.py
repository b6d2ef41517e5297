"""The command line. Everything heavy is imported inside the command that needs it: --help must be quick."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from posttrain.core.errors import PosttrainError, RecipeError

if TYPE_CHECKING:
    from rich.console import Console

    from posttrain.config import ModelConfig, Recipe


class _Group(TyperGroup):
    """Turns the errors that a person can act on into one message and an exit code; others keep their traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except PosttrainError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2 if isinstance(error, RecipeError) else 1) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Group,
    help="From a pretrained language model to a measurably better one. Start with: posttrain run quickstart",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes_app = typer.Typer(help="The recipes that come along: list, show, copy.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="Name of a recipe that comes along, or a YAML file.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings at any depth: stages.sft.optimizer.lr=1e-4"),
]


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False, emoji=False)


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


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE|FOLDER", help="A recipe, or a run's folder to go on with.")],
    overrides: Overrides = None,
    folder: Annotated[Path | None, typer.Option(help="Folder of the run. [default: runs/NAME]")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Set an earlier run in the folder aside, start over.")] = False,
) -> None:
    """Carry a recipe through: evaluate, train, evaluate again, report. Goes on where it was stopped."""
    from posttrain.recipe.parsing import load_recipe

    path = Path(recipe)
    if path.is_dir() and (path / "recipe.yaml").is_file():
        if overrides or (folder is not None and folder.resolve() != path.resolve()):
            raise RecipeError(
                f"{path} is a run, and goes on with its own settings in its own folder. For other settings: "
                f"posttrain run {path / 'recipe.yaml'} name=NEW_NAME {' '.join(overrides or [])}".rstrip()
            )
        folder = path
    checked = load_recipe(recipe, overrides or ())  # before anything heavy loads
    from posttrain.runs.runner import run as run_recipe

    run_recipe(checked, folder=folder, fresh=fresh)


@recipes_app.command("list")
def recipes_list() -> None:
    """Names and what they do."""
    import yaml
    from rich.table import Table

    from posttrain.recipe.parsing import shipped

    table = Table(box=None, show_header=False, pad_edge=False)
    for name, file in shipped().items():
        table.add_row(f"[bold]{name}[/]", yaml.safe_load(file.read_text(encoding="utf-8")).get("description", ""))
    _console().print(table)


@recipes_app.command("show")
def recipes_show(
    name: RecipeArgument,
    fields: Annotated[bool, typer.Option("--fields", help="Print every setting there is, with its default.")] = False,
) -> None:
    """Print a recipe, or every setting that a recipe can have."""
    if not fields:
        typer.echo(_recipe_text(name), nl=False)
        return
    from posttrain.recipe.parsing import load_recipe
    from posttrain.recipe.schema import settings

    load_recipe(name)  # a wrong name is an error here too
    for s in settings():
        typer.echo(f"{s.key} = {s.default}    ({s.type})" if s.default else f"{s.key}    ({s.type})")
        if s.description:
            typer.echo(f"    {s.description}")


@recipes_app.command("copy")
def recipes_copy(
    name: RecipeArgument,
    to: Annotated[Path | None, typer.Argument(metavar="DEST", help="File or folder. [default: NAME.yaml]")] = None,
) -> None:
    """Write a recipe to a file of your own, to be changed."""
    text = _recipe_text(name)
    target = to or Path(f"{name}.yaml")
    if target.is_dir():
        target = target / f"{name}.yaml"
    try:
        with target.open("x", encoding="utf-8") as f:
            f.write(text)
    except FileExistsError:
        raise RecipeError(f"{target} exists already; name another file") from None
    except OSError as error:
        raise RecipeError(f"can't write {target}: {error.strerror}") from error
    from posttrain.runs.machine import program

    typer.echo(f"wrote {target}; run it with: {program()} run {target}")


def _recipe_text(name: str) -> str:
    from posttrain.recipe.parsing import shipped

    have = shipped()
    if name not in have:
        import difflib

        near = difflib.get_close_matches(name, have, n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise RecipeError(f"no recipe {name!r} comes along. {hint}There are: {', '.join(have)}")
    return have[name].read_text(encoding="utf-8")


@app.command()
def inspect(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE|RUN", help="A recipe, or the folder of a run.")],
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=0, help="Samples, problems or groups to show.")] = 3,
    stage: Annotated[str | None, typer.Option(help="Name of one stage or evaluation. [default: all]")] = None,
    step: Annotated[int | None, typer.Option(help="Of a run: rollouts of this step. [default: the last]")] = None,
    held_out: Annotated[bool, typer.Option("--held-out", help="Of a run: answers to held-out problems.")] = False,
    sort: Annotated[str, typer.Option(help="Of a run: order, best, worst, suspicious.")] = "order",
    problem: Annotated[int | None, typer.Option(help="Of a run: only this problem.")] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Of a run: what the parts of its rewards drifted to, instead of rollouts.")
    ] = False,
) -> None:
    """What the model will see: tokens, which carry loss, what was dropped. Of a run: its rollouts or chains."""
    path = Path(recipe)
    if path.is_dir() and not overrides:
        from posttrain.cli import inspect_rollouts as browse

        labelled = browse.feedback(path, _console(), rows)
        plain = step is None and not (held_out or watch) and sort == "order"
        if plain and browse.chains(path, _console(), stage=stage, groups=rows, problem=problem):
            return
        if browse.stages_with_rollouts(path):
            if watch:
                browse.watch(path, _console(), stage=stage)
                return
            options = {"stage": stage, "step": step, "held_out": held_out, "sort": sort, "problem": problem}
            browse.browse(path, _console(), groups=rows, **options)  # type: ignore[arg-type]
            return
        if labelled and plain and stage is None and problem is None:
            return
    if step is not None or held_out or problem is not None or watch or sort != "order":
        raise RecipeError(
            f"{recipe} is no run with rollouts: --step, --held-out, --sort, --problem and --watch have no meaning"
        )
    from posttrain.recipe.parsing import load_recipe

    checked = load_recipe(recipe, overrides or ())
    names = [part.name for part in (*checked.stages, *checked.evaluate)]
    if stage is not None and stage not in names:
        raise RecipeError(f"no stage or evaluation {stage!r}; there are: {', '.join(names)}")
    from posttrain.cli import inspect_rows as show

    show.inspect(checked, stage, rows, _console())


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Hub name, folder, .gguf file, or a run's folder.")],
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="The recipe (or run folder) whose evaluations to run.")],
    overrides: Overrides = None,
    folder: Annotated[
        Path | None, typer.Option(help="Where items and results go. [default: runs/evaluations/…]")
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(help="Folder of other results to compare with: RUN/evaluations/before"),
    ] = None,
) -> None:
    """Run a recipe's evaluations on any model; compare two models on the same items."""
    from posttrain.recipe.parsing import load_recipe

    checked = load_recipe(recipe, overrides or ())
    if not checked.evaluate:
        raise RecipeError(f"{recipe} has no evaluations; add some under `evaluate:`")
    checked = _with_what_was_made(checked, Path(recipe))
    folder = folder or _evaluation_folder(checked, model)
    if against is not None:
        missing = [t.name for t in checked.evaluate if not (against / f"{t.name}.jsonl").is_file()]
        if missing:
            raise RecipeError(f"--against {against}: no {missing[0]}.jsonl there; name RUN/evaluations/before or alike")
    from posttrain.cli import inspect_rows as show

    show.evaluate(checked, _model_config(checked, model), folder, against, _console())


def _with_what_was_made(recipe: Recipe, run: Path) -> Recipe:
    """The recipe with what its evaluations name as stage:NAME found in the run that it is of."""
    from posttrain.config import references

    asks = {name for task in recipe.evaluate for name in references(task)}
    if not asks:
        return recipe
    from posttrain.runs.registry import made_in, resolved

    made = made_in(run, recipe)
    if asks - made.keys():
        name = sorted(asks - made.keys())[0]
        raise RecipeError(
            f"the evaluations use what stage {name!r} makes, and {run} has none: name the folder of a run that has "
            "come through that stage, as in -r runs/NAME"
        )
    return recipe.model_copy(update={"evaluate": [resolved(task, made) for task in recipe.evaluate]})


def _model_config(recipe: Recipe, source: str) -> ModelConfig:
    """The recipe's dtype and device, another model. Its chat template too, which a base model needs to be asked."""
    return recipe.model.model_copy(update={"source": source, "revision": None})


def _evaluation_folder(recipe: Recipe, model: str) -> Path:
    """One folder for each model and set of tasks: results of others would be taken for these."""
    import hashlib

    asked = "".join(t.model_dump_json() for t in recipe.evaluate) + recipe.model.model_dump_json() + str(recipe.seed)
    slug = re.sub(r"[^A-Za-z0-9_.-]+", "-", model).strip("-.")[-60:] or "model"
    path = Path(model)
    if path.exists():  # a folder's content may change under the same name
        newest = max((f.stat().st_mtime_ns for f in path.rglob("*.safetensors")), default=0)
        asked += f"{path.resolve()}{newest}"
    digest = hashlib.sha256(f"{model}{asked}".encode()).hexdigest()[:8]
    return Path(recipe.output) / "evaluations" / f"{recipe.name}-{slug}-{digest}"


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="A run's folder, or any model: Hub name, folder, .gguf file.")],
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Ask this, print the answer, leave.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps")] = "auto",
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code shipped with it.")] = False,
) -> None:
    """Talk to a model, or to what a run made."""
    from posttrain.cli.chat import Chat
    from posttrain.config import ModelConfig

    config = ModelConfig(source=model, device=device, trust_remote_code=trust_remote_code)
    talk = Chat.open(config, system=system, max_new_tokens=max_new_tokens, temperature=temperature)
    if prompt is not None:
        for piece in talk.ask(prompt):
            typer.echo(piece, nl=False)
        typer.echo()
    else:
        talk.loop()


@app.command()
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")]) -> None:
    """Write a run's page again and print its path."""
    if not (run / "manifest.json").is_file():
        raise RecipeError(f"{run} is not a run's folder (no manifest.json in it)")
    from posttrain.report import build_report

    typer.echo(str(build_report(run)))


@app.command()
def lab(
    output: Annotated[Path | None, typer.Option(help="Folder to make. [default: the cache's, for lab:SEED]")] = None,
    kind: Annotated[
        Literal["sums", "reviews"], typer.Option(help="Answers sums; or writes movie reviews, for RLHF.")
    ] = "sums",
    seed: Annotated[int, typer.Option(min=0, max=999_999_999, help="Another seed, another model of its kind.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Pretraining steps. [default: enough, in minutes]")] = None,
) -> None:
    """Make a small base model that reinforcement learning improves in minutes: to try, compare and debug methods."""
    from posttrain.lab import make

    make.command(_console(), output, kind, seed, steps)


@app.command()
def doctor() -> None:
    """Versions, devices, memory, extras, and what stands in the way. Exit code 1 when something does."""
    from posttrain.cli.doctor import examine

    raise typer.Exit(0 if examine(_console()) else 1)


def main() -> None:
    """The console script."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
