"""Continued pretraining as a stage of a recipe: documents of a domain, replay of general text, what is retained.

Sources: re-warming, re-decaying and replay, Ibrahim et al., arXiv 2403.08763; domain-adaptive pretraining, Gururangan et
al., arXiv 2004.10964.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from posttrain.config.settings import DataConfig
from posttrain.core.types import Metric
from posttrain.methods.pretrain.pretrain_settings import GENERAL_SOURCE, PretrainConfig
from posttrain.trainer.stage import Stage, StageRun
from posttrain.trainer.workload import Workload, together

if TYPE_CHECKING:
    import numpy as np

    from posttrain.data.text_documents import Documents, TokenStream
    from posttrain.methods.pretrain.new_vocabulary import NewVocabulary
    from posttrain.trainer.loop import BatchTrainer
    from posttrain.trainer.policy import LoadedPolicy

GENERAL_ROWS = 200
"""Documents of general text that are measured, unless settings name them."""
REPLAY_SEED = 7919
"""Added to the run's seed for the order of general text."""


class Pretrain(Stage):
    """Train on every token of documents."""

    Config = PretrainConfig
    title = "Continued pretraining"
    metrics = (
        Metric("loss", "Loss", "nats/token", "Training", "lower"),
        Metric("held_out/loss", "Domain, held out", "nats/token", "Training", "lower", over="loss"),
        Metric("general/loss", "General text", "nats/token", "Training", "lower", over="loss"),
        Metric("bits_per_byte", "Bits per byte", "bits/byte", "Training", "lower"),
        Metric("held_out/bits_per_byte", "Domain, held out", "bits/byte", "Training", "lower", over="bits_per_byte"),
        Metric("general/bits_per_byte", "General text", "bits/byte", "Training", "lower", over="bits_per_byte"),
        Metric("replay_share", "Replay", "share of loss tokens", "Training"),
        Metric("token_accuracy", "Token accuracy", "share of loss tokens", "Training", "higher"),
        Metric("held_out/accuracy", "Domain, held out", "share of loss tokens", "Training", over="token_accuracy"),
    )
    progress = ("loss", "held_out/loss", "general/loss")
    held_out: Documents | None = None
    general: Documents | None = None
    replay: Documents | None = None
    vocabulary: NewVocabulary | None = None
    general_settings: DataConfig | None = None
    general_name = ""
    drawn: Any = ()

    def prepare(self) -> list[tuple[str, Any]]:
        from posttrain.data.text_documents import document_stats, prepare_documents

        config: PretrainConfig = self.config
        load = partial(
            prepare_documents,
            tokenizer=self.context.tokenizer,
            context=self.context.context,
            length=config.sequence_length,
            overlap=config.overlap,
        )
        trained, self.held_out = self.read_held_out(load, config.data, config.held_out)
        self.trained = trained
        if config.replay is not None:
            self.replay = load(config.replay.data)
        self._choose_general(load)
        name = config.name
        more = [(f"{name} replay", self.replay), (f"{name} general held out", self.general)]
        self.data += [(title, data) for title, data in more if data is not None]
        for _, data in self.data:
            data.stats.update(document_stats(data.samples))  # before, they were those of all pieces
        if config.vocabulary is not None:
            self._extend_vocabulary()
        return self.data

    def _extend_vocabulary(self) -> None:
        """Make new tokens of the text that is trained on, and tokenize all text with them."""
        from posttrain.methods.pretrain.new_vocabulary import NewVocabulary

        config: PretrainConfig = self.config
        self.vocabulary = NewVocabulary(config, self.context, self.trained, self.held_out, self.general)
        replay = None if config.replay is None else config.replay.data
        held_out = config.held_out if isinstance(config.held_out, DataConfig) else config.data
        titles = {id(data): title for title, data in self.data}
        parts = {
            "trained": (config.data, self.trained),
            "held_out": (held_out, self.held_out),
            "replay": (replay, self.replay),
            "general": (self.general_settings, self.general),
        }
        new = self.vocabulary.tokenize_again(parts)
        self.data = [(titles[id(old)], data) for name, data in new.items() if (old := getattr(self, name)) is not None]
        for name, data in new.items():
            setattr(self, name, data)
        self.context = replace(self.context, tokenizer=self.vocabulary.made.tokenizer)

    def open(self, run: StageRun) -> LoadedPolicy:
        if self.vocabulary is None:
            return super().open(run)
        from posttrain.trainer.policy import open_policy

        return open_policy(self.config, run.model, run.seed, partial(self.vocabulary.extend, folder=run.folder))

    def _choose_general(self, load: Any) -> None:
        """Set the general text that is measured, none of which is trained on."""
        import logging

        from posttrain.data.held_out_rows import drop_training_overlap, hold_out

        config: PretrainConfig = self.config
        where = f"stage {config.name}: retention"
        if config.retention is False:
            return
        if config.retention is True and self.replay is not None:
            fraction, seed = 0.05, config.replay.data.shuffle_seed or 0  # type: ignore[union-attr]
            self.replay, self.general = hold_out(
                self.replay, fraction, GENERAL_ROWS, seed, self.context.tokenizer, where
            )
            self.general_settings = config.replay.data  # type: ignore[union-attr]
            self.general_name = "held out of the replay data"
            return
        named = config.retention if isinstance(config.retention, DataConfig) else _packaged_text()
        if config.retention is True and GENERAL_SOURCE in {entry.source for entry in config.data.sources()}:
            logging.getLogger("posttrain").warning(
                "%s: the domain's text is %s, and no other general text is named, so what is forgotten is not "
                "measured: give retention, or replay", where, GENERAL_SOURCE,
            )  # fmt: skip
            return
        self.general = drop_training_overlap(load(named), self.trained, where)
        if self.replay is not None:
            self.general = drop_training_overlap(self.general, self.replay, where)
        self.general_settings, self.general_name = named, named.name

    def trainer(self, policy: LoadedPolicy, run: StageRun) -> BatchTrainer:
        from posttrain.methods.pretrain.pretrain_trainer import PretrainTrainer
        from posttrain.trainer.train_step import Learner

        batches = self.batches(run.seed)
        learner = Learner(policy.policy, self.config.optimizer, self.config.systems, len(batches))
        return PretrainTrainer(learner, self, batches, run.folder)

    def batches(self, seed: int) -> list[np.ndarray]:
        """Return the numbers of the pieces of each step's batch (`mixed_batches`)."""
        import numpy as np

        from posttrain.core.epoch_order import epoch_size
        from posttrain.data.text_documents import mixed_batches

        config: PretrainConfig = self.config
        replay = None if self.replay is None else _stream(self.replay, seed + REPLAY_SEED)
        domain = _stream(self.trained, seed)
        batches = mixed_batches(
            domain,
            replay,
            0.0 if config.replay is None else config.replay.share,
            budget=config.batch_size * config.sequence_length,
            epochs=config.epochs,
            max_steps=config.max_steps,
        )
        pieces = epoch_size(len(domain.lengths), domain.weights)
        self.drawn = np.cumsum([0, *(int((batch >= 0).sum()) for batch in batches)]) / pieces
        return batches

    def epoch_after(self, step: int) -> float | None:
        return float(self.drawn[step]) if len(self.drawn) else None

    def plan(self, steps: int) -> str:
        config: PretrainConfig = self.config
        size = f"{steps:,} step{'s' * (steps != 1)} of at most {config.batch_size * config.sequence_length:,} tokens"
        text = f"{self.epoch_after(steps):.4g} epochs of {self.trained.samples.loss_tokens:,} tokens of text"
        mixed = "" if config.replay is None else f", {100 * config.replay.share:.3g}% general text between them"
        return f"{size}, {text}{mixed}"

    def end_token(self, policy: LoadedPolicy) -> int | None:
        return None  # the token that ends documents is the tokenizer's own

    def workload(self) -> Workload:
        config: PretrainConfig = self.config
        samples = self.trained.samples
        mean = max(1.0, float(samples.lengths.mean()))
        return Workload(together(samples), max(1, int(config.batch_size * config.sequence_length / mean)))


def _stream(data: Documents, seed: int) -> TokenStream:
    import numpy as np

    from posttrain.data.mixing import row_weights
    from posttrain.data.text_documents import TokenStream

    loss = np.asarray(data.samples.columns["loss"], dtype=np.int64)
    return TokenStream(data.samples.lengths, loss, seed, row_weights(data))


def _packaged_text() -> DataConfig:
    return DataConfig(
        source=GENERAL_SOURCE, layout="text", columns={"text": "text"}, shuffle_seed=0, rows=(0, GENERAL_ROWS)
    )
