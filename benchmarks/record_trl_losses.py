"""Records what TRL's own code makes of fixed tensors, for tests/functional/test_recorded_trl.py to compare with.

    pip install 'posttrain[bench]'
    python benchmarks/record_trl_losses.py            # writes tests/losses/recorded_trl.json

A GRPOTrainer or RLOOTrainer is built by its own constructor around a tiny random model, one for each setting. Three of
its inputs are then fixed: what was sampled (`_generate`), the rewards (a reward function), and the log-probabilities
(`_get_per_token_logps_and_entropies`). Everything between is TRL's: `_generate_and_score_completions` makes the
advantages (and the weights against sampler mismatch), `_compute_loss` the loss. Recorded are advantages, loss, its
gradient in every log-probability, and the logged metrics. The tensors come from Python's random, rounded to four
digits, and lie in the file: who reads it needs neither TRL nor its seed.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PROMPTS, G = 4, 4
LENGTHS = [3, 7, 1, 5, 2, 2, 6, 4, 7, 1, 3, 5, 4, 6, 2, 7]
REWARDS = [1.0, 0.0, 0.0, 1.0, 0.5, 0.25, -1.0, 2.0, 1.0, 1.0, 1.0, 1.0, 0.1, 0.7, 0.3, 0.2]  # third group: no signal
LONGEST = 8


def tensors(seed: int) -> dict[str, Any]:
    """Log-probabilities by sequence: old ones, and new, reference and sampler ones at various distances."""
    r = random.Random(seed)
    old = [[round(-abs(r.gauss(0, 1.2)) - 0.01, 4) for _ in range(n)] for n in LENGTHS]

    def near(spread: float) -> list[list[float]]:
        return [[round(min(x + r.gauss(0, spread), -0.001), 4) for x in row] for row in old]

    return {
        "lengths": LENGTHS,
        "group": [i // G for i in range(len(LENGTHS))],
        "rewards": REWARDS,
        "old": old,
        "new": near(0.35),
        "reference": near(0.5),
        "sampler": near(0.3),
        "longest": LONGEST,
    }


def padded(rows: list[list[float]]) -> torch.Tensor:
    """Rows of numbers to a matrix, padded with 0 as TRL does."""
    return torch.tensor([row + [0.0] * (max(LENGTHS) - len(row)) for row in rows])


class Fixed:
    """Mixed into a TRL trainer: its samples and log-probabilities are the recorded ones."""

    data: dict[str, Any]
    new: torch.Tensor

    def _generate(self, prompts: list[str]) -> tuple[Any, ...]:
        prompt_ids = [[3, 4]] * len(prompts)
        completion_ids = [[5] * (n - 1) + [1] for n in LENGTHS]
        texts = ["x"] * len(prompts)
        if isinstance(self, trl.RLOOTrainer):
            return prompt_ids, completion_ids, texts
        sampled = self.data["sampler"] if getattr(self, "use_vllm", False) else None
        return prompt_ids, completion_ids, None, texts, sampled, {}, None, None

    def _get_per_token_logps_and_entropies(
        self, model: Any, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor, None]:
        if model is getattr(self, "ref_model", None):
            logps = padded(self.data["reference"])
        elif torch.is_grad_enabled():
            logps = self.new
        else:
            logps = padded(self.data["old"])
        return logps, torch.zeros_like(logps), None


class GRPO(Fixed, trl.GRPOTrainer):  # type: ignore[misc]
    """TRL's GRPO on fixed tensors."""


class RLOO(Fixed, trl.RLOOTrainer):  # type: ignore[misc]
    """TRL's RLOO on fixed tensors."""


def trainer(kind: type, data: dict[str, Any], folder: str, **settings: Any) -> Any:
    """A trainer as it comes, all sequences in one step; two iterations, so that it makes old log-probabilities."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(
            models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2, "a": 3, "b": 4, "x": 5}, "<unk>")
        ),
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=6,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            eos_token_id=1,
            pad_token_id=0,
        )
    )
    model.name_or_path = model.config._name_or_path = folder  # the reference model is loaded from here
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = trl.GRPOConfig if kind is GRPO else trl.RLOOConfig
    made = kind(
        model=model,
        args=config(
            output_dir=folder,
            per_device_train_batch_size=len(LENGTHS),
            num_generations=G,
            num_iterations=2,
            max_completion_length=LONGEST,
            report_to="none",
            use_cpu=True,
            bf16=False,
            **settings,
        ),
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": ["a b"] * PROMPTS}),
        reward_funcs=lambda completions, **_: data["rewards"],
    )
    made.data, made.new = data, padded(data["new"]).requires_grad_()
    made.model.train()
    made.current_gradient_accumulation_steps = 1
    return made


def record(kind: type, data: dict[str, Any], importance: str | None = None, **settings: Any) -> dict[str, Any]:
    """Advantages, loss, gradient and metrics of one setting.

    importance: correct for sampler mismatch in this mode of TRL's. It exists for vLLM alone, so the flag that says that
    vLLM sampled is set once the trainer is built.
    """
    with tempfile.TemporaryDirectory() as folder:
        made = trainer(kind, data, folder, **settings)
        if importance is not None:
            made.use_vllm, made.vllm_importance_sampling_correction = True, True
            made.vllm_importance_sampling_mode = importance
            made.vllm_importance_sampling_clip_max, made.vllm_importance_sampling_clip_min = 1.3, None
        batch = made._generate_and_score_completions([{"prompt": "a b"} for _ in LENGTHS])
        loss = made._compute_loss(made.model, batch)
        (gradient,) = torch.autograd.grad(loss, made.new)
        metrics = {
            k: v[-1] for k, v in made._metrics["train"].items() if k.startswith(("clip", "cispo", "kl", "sampl"))
        }
    result = {
        "settings": settings | ({"importance": importance} if importance else {}),
        "advantages": batch["advantages"].tolist(),
        "loss": loss.item(),
        "gradient": [row[:n] for row, n in zip(gradient.tolist(), LENGTHS, strict=True)],
        "metrics": {k: v for k, v in metrics.items() if not k.startswith("completions")},
    }
    if importance is not None:
        ratio = batch["importance_sampling_ratio"].expand(len(LENGTHS), max(LENGTHS)).tolist()
        result["importance"] = [row[:n] for row, n in zip(ratio, LENGTHS, strict=True)]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parents[1] / "tests/losses/recorded_trl.json"
    parser.add_argument("--out", type=Path, default=default, help="the file to write")
    parser.add_argument("--seed", type=int, default=3, help="of the fixed tensors")
    options = parser.parse_args()
    data = tensors(options.seed)
    base: dict[str, Any] = {"beta": 0.0, "epsilon": 0.2}
    sequence: dict[str, Any] = {"loss_type": "grpo", "importance_sampling_level": "sequence"}
    grpo: dict[str, dict[str, Any]] = {
        "grpo": base | {"loss_type": "grpo"},
        "grpo_batch_scale": base | {"loss_type": "grpo", "scale_rewards": "batch"},
        "grpo_kl": base | {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": False},  # TRL's default: True
        "grpo_kl_corrected": base | {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": True},
        "grpo_two_sided": base | {"loss_type": "grpo", "delta": 1.5},
        "dr_grpo": base | {"loss_type": "dr_grpo", "scale_rewards": "none"},
        "dapo": base | {"loss_type": "dapo", "epsilon_high": 0.28},
        "gspo": {"beta": 0.0, "epsilon": 0.03, "epsilon_high": 0.04} | sequence,
        "cispo": {"beta": 0.0, "loss_type": "cispo", "epsilon_high": 1.2},
        "importance_token": base | {"loss_type": "grpo", "importance": "token_truncate"},
        "importance_sequence": base | {"loss_type": "grpo", "importance": "sequence_truncate"},
    }
    rloo: dict[str, dict[str, Any]] = {"rloo": base, "rloo_kl": base | {"beta": 0.05}}
    cases = {name: record(GRPO, data, **settings) for name, settings in grpo.items()}
    cases |= {name: record(RLOO, data, **settings) for name, settings in rloo.items()}
    options.out.write_text(
        json.dumps({"trl": trl.__version__, "torch": torch.__version__, "tensors": data, "cases": cases}, indent=1)
        + "\n"
    )
    print(f"{len(cases)} cases of TRL {trl.__version__} in {options.out}")


if __name__ == "__main__":
    main()
