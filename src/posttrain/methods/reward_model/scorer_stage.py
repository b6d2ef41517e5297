"""The part that training a reward model and a process reward model have in common: opening, saving."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import model_validator

from posttrain.config.settings import EpochsConfig
from posttrain.core.files import write_json
from posttrain.trainer.stage import Stage, StageRun

if TYPE_CHECKING:
    from posttrain.trainer.policy import LoadedPolicy


class ScorerConfig(EpochsConfig):
    """Settings of both kinds. They leave a model with a head that scores, which later stages name."""

    makes = "reward_model"
    soft_prompts: ClassVar[bool] = False

    @model_validator(mode="after")
    def _merged(self) -> ScorerConfig:
        if self.adapter is not None and self.adapter.is_soft_prompt:
            if self.soft_prompts:
                return self
            raise ValueError(
                f"adapter kind {self.adapter.kind}: a process reward model is saved whole, and a soft prompt can't be "
                "merged into it. Use lora, rslora, dora or no adapter"
            )
        if not self.merge:
            raise ValueError("merge is false, and a reward model is saved whole, its adapters merged: leave merge out")
        return self


class ScorerStage(Stage):
    """Train a model with a head that scores.

    Attributes:
        layout: "sequence", a score of a whole text, or "token", one at the end of each step.
        index: What is saved beside the model, to score as in training.
    """

    layout: ClassVar[Literal["sequence", "token"]]
    progress = ("loss", "accuracy", "held_out/accuracy")
    index: dict[str, Any]

    def open(self, run: StageRun) -> LoadedPolicy:
        """Open the model under a head that scores, checked against transformers' own forward pass."""
        from posttrain.core import distributed
        from posttrain.models.adapters import attach_to, count_parameters
        from posttrain.models.classification_head import check_soft_start, open_scorer, verify_scores
        from posttrain.models.fake_quantization import round_while_training
        from posttrain.models.language_model import LanguageModel
        from posttrain.models.loading import pick_device, pick_dtype
        from posttrain.models.quantization import check_training
        from posttrain.trainer.kept_zeros import mark_zeros
        from posttrain.trainer.policy import LoadedPolicy
        from posttrain.trainer.trained_part import train_only

        check_soft_start(run.model, self.config.adapter)
        device = pick_device(run.model.device)
        distributed.start(device)
        opened = open_scorer(run.model, self.layout, run.seed, pick_dtype(run.model.dtype, device))
        adapter = self.config.adapter
        head = "score" if hasattr(opened.hf, "score") else "classifier"  # a new one is random: it is always trained
        train_only(opened.hf, self.config.train and [*self.config.train, head])
        hf = opened.hf if adapter is None else attach_to(opened, adapter, run.seed, "SEQ_CLS")
        check_training(hf, self.config.merge, distributed.world())
        round_while_training(hf, self.config.qat)
        policy = LanguageModel(hf)
        verify_scores(policy, self.layout)
        notes = dict(opened.notes) | ({"kept_zeros": round(mark_zeros(policy), 6)} if self.config.keep_zeros else {})
        return LoadedPolicy(policy, opened.tokenizer, *count_parameters(policy), notes)

    def folder_of_model(self, run: StageRun) -> Path:
        """Return the folder in which the model is saved."""
        return run.folder / "reward_model"

    def save(self, policy: LoadedPolicy, run: StageRun) -> None:
        from posttrain.core import distributed
        from posttrain.models.classification_head import save_head
        from posttrain.models.fake_quantization import note_grid, train_in_full
        from posttrain.rewards.reward_model_scorer import INDEX
        from posttrain.trainer.policy import save_atomically

        def write(work: Path) -> None:
            train_in_full(policy.policy.hf)
            policy.notes.update(
                save_head(policy.policy, policy.tokenizer, run.model, self.layout, work, self.config.adapter, run.seed)
            )
            if distributed.is_main():
                note_grid(work, self.config.qat)
                write_json(work / INDEX, self.index)

        save_atomically(self.folder_of_model(run), write)
