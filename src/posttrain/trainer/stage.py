"""The base class of every method: what a stage of a run is, and the glue that all training methods share.

This module and those of the stages import no torch when they are loaded, so that a recipe is checked in a moment; what
is heavy is imported inside the functions that need it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from posttrain.config.settings import DataConfig, ModelConfig, StageBase
from posttrain.core.epoch_order import RowWeights, epoch_size
from posttrain.core.errors import ModelError
from posttrain.core.types import Metric
from posttrain.trainer.workload import Workload, together

if TYPE_CHECKING:
    from posttrain.trainer.loop import BatchAt, OnStep, Trainer
    from posttrain.trainer.policy import LoadedPolicy

Functions = Mapping[str, Callable[..., Any]]


@dataclass(frozen=True)
class StageContext:
    """Inputs for reading a stage's data.

    Attributes:
        tokenizer: The model's tokenizer.
        context: The model's context length in tokens. None: the model names none.
        functions: Callables handed over from Python that the recipe names. None: unknown, because nothing will run;
            names of functions are not checked then.
        evaluations: Settings of the recipe's evaluations, whose items a method that makes rows keeps out of them.
    """

    tokenizer: Any
    context: int | None
    functions: Functions | None = None
    evaluations: Sequence[Any] = ()


@dataclass(frozen=True)
class StageRun:
    """Inputs of a stage's run.

    Attributes:
        model: The model to start from.
        folder: The stage's folder in the run.
        seed: Seeds everything random in the stage.
        resources: Closed after training (samplers, worker processes).
        weights: How often each row is drawn in an epoch. None: each once.
    """

    model: ModelConfig
    folder: Path
    seed: int
    resources: ExitStack
    weights: RowWeights | None = None

    def batches(self, samples: Sequence[Any], config: Any) -> tuple[BatchAt, int]:
        """Return a stage's batches by step, and its number of steps, as `EpochsConfig` has them."""
        from posttrain.trainer.loop import permutation_batches

        epochs, most = config.epochs, config.max_steps
        return permutation_batches(samples, config.batch_size, epochs, self.seed, most, self.weights)


def _behind_soft_prompt(context: StageContext, adapter: Any) -> StageContext:
    """Return the context with the room that a soft prompt leaves in it."""
    if context.context is None or adapter is None or not adapter.is_soft_prompt:
        return context
    room = context.context - sum(adapter.virtual_tokens())
    if room < 2:
        raise ModelError(
            f"adapter: {sum(adapter.virtual_tokens())} virtual tokens leave no room for a text in the model's context "
            f"of {context.context}: lower their number"
        )
    return replace(context, context=room)


class Stage:
    """One method, from its settings to what it leaves in the run.

    A training method sets `Config`, `title` and `metrics` and implements `prepare` and `trainer`; `run` does the rest.
    A method that makes data, or that trains several models, overrides `run`. See docs/add-a-method.md.

    Attributes:
        Config: Settings class: a subclass of StageBase, TrainConfig or EpochsConfig of `posttrain.config`. Its class
            attribute `makes` names what the stage leaves: "model" (the next stage starts from it), "data" or
            "reward_model" (other stages name them as stage:NAME).
        title: Name of the method in the report.
        metrics: The metrics that the method logs, with titles and units; a name may end in * for a family.
        progress: Metrics that the progress line shows.
        sums: The loss takes log-probabilities of targets rather than the cross-entropy alone.
        rows: What a method trains on in epochs of `config.batch_size` rows a step; empty: the method has no epochs.
    """

    Config: ClassVar[type[StageBase]]
    title: str = ""
    metrics: tuple[Metric, ...] = ()
    progress: tuple[str, ...] = ("loss",)
    sums: ClassVar[bool] = False

    def __init__(self, config: Any, context: StageContext) -> None:
        self.config, self.context = config, _behind_soft_prompt(context, getattr(config, "adapter", None))
        self.data: list[tuple[str, Any]] = []
        self.rows: Sequence[Any] = ()

    def prepare(self) -> list[tuple[str, Any]]:
        """Read the stage's data, before the first stage trains, so that mistakes in any are reported at once.

        Returns:
            (title, data) pairs for `posttrain inspect`; the manifest stores each data's `stats`.

        Raises:
            DataError, ModelError, RewardError: What is wrong with the data, the model or the rewards.
        """
        raise TypeError(f"{type(self).__name__} must implement prepare()")

    def preview(self, model: ModelConfig, seed: int) -> list[tuple[str, Any]]:
        """Return the (title, data) pairs that `posttrain inspect` shows of a recipe: those that `prepare` returned.

        A method that makes rows of tables makes them here, to show what they are like before a run.

        Args:
            model: The recipe's model.
            seed: The seed that the stage's run would have.
        """
        return self.data

    def trainer(self, policy: LoadedPolicy, run: StageRun) -> Trainer:
        """Return the trainer whose steps the loop carries out."""
        raise TypeError(f"{type(self).__name__} must implement trainer(), or override run()")

    def open(self, run: StageRun) -> LoadedPolicy:
        """Open the model that the stage starts from, adapters attached, checked against its own forward pass."""
        from posttrain.trainer.policy import open_policy

        return open_policy(self.config, run.model, run.seed)

    def end_token(self, policy: LoadedPolicy) -> int | None:
        """Return the token that ends a turn after training, for the model's generation settings; None: unchanged."""
        return None

    def save(self, policy: LoadedPolicy, run: StageRun) -> None:
        """Save the trained model as `folder`/model."""
        from posttrain.trainer.policy import save_policy

        save_policy(policy, self.config, run.model, run.folder, run.seed, self.end_token(policy))

    def read_held_out(self, load: Callable[[Any], Any], data: Any, held_out: Any) -> tuple[Any, Any]:
        """Read training data, and held-out data without what is also trained on.

        Args:
            load: Reads data (a subclass of `posttrain.data.rows.PreparedItems`) by its settings.
            data: Settings of the training data.
            held_out: Settings of the held-out data, or the fraction of the training data that is held out (by
                `config.max_held_out` and the data's shuffle_seed, so that runs with other seeds measure the same
                rows). None: none.

        Returns:
            Both, the second None if there is none; `self.data` gets them with their titles.
        """
        from posttrain.data.held_out_rows import drop_training_overlap, hold_out
        from posttrain.data.mixing import refuse_weights

        name, trained, held = self.config.name, load(data), None
        if isinstance(held_out, float):
            most, seed = self.config.max_held_out, data.shuffle_seed or 0
            trained, held = hold_out(trained, held_out, most, seed, self.context.tokenizer, f"stage {name}")
        elif held_out is not None:
            if isinstance(held_out, DataConfig):
                refuse_weights(held_out, f"stage {name}: held_out")
            held = drop_training_overlap(load(held_out), trained, f"stage {name}")
        self.data = [(name, trained), *([] if held is None else [(f"{name} held out", held)])]
        return trained, held

    def run(self, model: ModelConfig, folder: Path, seed: int, on_step: OnStep | None = None) -> dict[str, Any]:
        """Open the policy, train it from the newest checkpoint in `folder`, and save it as `folder`/model.

        Args:
            model: The model to start from.
            folder: The stage's folder in the run.
            seed: Seeds everything random in the stage.
            on_step: Called after each step with (step, metrics, timings).

        Returns:
            The stage's entry in the manifest.
        """
        from posttrain.core import distributed
        from posttrain.core.files import write_json
        from posttrain.trainer.best_step import CHOSEN_STEP
        from posttrain.trainer.loop import train
        from posttrain.trainer.policy import summary

        with ExitStack() as resources:
            run = StageRun(model, folder, seed, resources, self.weights)
            policy = self.open(run)
            trainer = self.trainer(policy, run)
            result = train(
                trainer.learner,
                trainer,
                folder,
                checkpoint_every=self.config.checkpoint_every,
                keep=self.config.keep_checkpoints,
                title=self.config.name,
                on_step=on_step,
                epoch_of=self.epoch_after,
                shown=self.progress,
                plan=self.plan(trainer.steps),
            )
        if "model_step" in result.more and distributed.is_main():
            timeless = {name: value for name, value in result.more.items() if name != "held_out_seconds"}
            write_json(folder / CHOSEN_STEP, timeless)
        self.save(policy, run)
        epochs = self.epoch_after(result.steps)
        return summary(result, policy) | ({"epochs": round(epochs, 4)} if epochs is not None else {})

    def epoch_after(self, step: int) -> float | None:
        """Return the number of passes over the rows after a number of steps; None: the method has no epochs."""
        from posttrain.trainer.loop import steps_for

        config = self.config
        if not self.rows:
            return None
        count = epoch_size(len(self.rows), self.weights)
        _, drawn = steps_for(count, config.batch_size, config.epochs, config.max_steps)
        return min(step * config.batch_size, drawn) / count  # type: ignore[no-any-return]

    @cached_property
    def weights(self) -> RowWeights | None:
        """Return how often each of `rows` is drawn in an epoch, by the weights of their sources; None: each once."""
        from posttrain.data.mixing import row_weights

        return row_weights(self.data[0][1]) if self.data and self.rows else None

    def plan(self, steps: int) -> str:
        """Return a line on the steps that the stage will take, for the log; empty: the method has no epochs."""
        epochs = self.epoch_after(steps)
        if epochs is None:
            return ""
        config, rows = self.config, epoch_size(len(self.rows), self.weights)
        given = " (max_steps)" if config.max_steps is not None else ""
        line = f"{steps:,} step{'s' * (steps != 1)}{given} of {config.batch_size} rows, {epochs:.4g} epochs of {rows:,}"
        held_out = [data for title, data in self.data if title.endswith(" held out")]
        return line + "".join(f"; {data.stats['used']:,} held-out rows are measured" for data in held_out)

    def workload(self) -> Workload:
        """Return what a step computes, once the data is read; `posttrain memory` estimates memory from it."""
        return Workload(together(self.rows), getattr(self.config, "batch_size", 1), self.sums)

    @property
    def entries(self) -> list[dict[str, Any]]:
        """Return the manifest's entries of the data that was read."""
        return [{"stage": title, **data.stats} for title, data in self.data]

    def about(self) -> dict[str, Any]:
        """Return the content of the stage's method.json, from which the report takes titles, units and groups."""
        return {"method": self.config.method, "title": self.title, "metrics": [asdict(m) for m in self.metrics]}
