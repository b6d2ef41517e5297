"""Records what TRL's own code makes of fixed log-probabilities, for tests/functional/test_recorded_trl_preference.py.

    pip install 'posttrain[bench]'
    python benchmarks/record_trl_preference.py        # writes tests/losses/recorded_trl_preference.json

A DPOTrainer, KTOTrainer, CPOTrainer or ORPOTrainer is built by its own constructor around a tiny random model, one for
each setting. Then its loss is computed by its own method on fixed tensors: DPO and KTO get a model that answers with
the recorded per-token log-probabilities and reference sums that lie in the batch (as `precompute_ref_log_probs` puts
them there); CPO and ORPO, whose methods take log-probabilities of whole answers, get those. Recorded are losses, their
gradients and the logged rewards. The tensors come from Python's random, rounded to four digits, and lie in the file.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

CHOSEN, REJECTED = [3, 7, 1, 5, 2], [4, 2, 6, 5, 9]  # tokens of the answers of five pairs
PROMPT = 2
GOOD = [True, False, True, True, False]


def tensors(seed: int) -> dict[str, Any]:
    """Log-probabilities by answer: of the policy a token, of the reference in sum; and of mismatched answers (KTO)."""
    r = random.Random(seed)

    def rows(lengths: list[int]) -> list[list[float]]:
        return [[round(-abs(r.gauss(0, 1.2)) - 0.05, 4) for _ in range(n)] for n in lengths]

    chosen, rejected = rows(CHOSEN), rows(REJECTED)
    near = {
        f"reference_{name}": [round(sum(row) + r.gauss(0, 1.5), 4) for row in given]
        for name, given in (("chosen", chosen), ("rejected", rejected))
    }
    mismatched = rows(CHOSEN)
    near["reference_mismatched"] = [round(sum(row) - abs(r.gauss(0, 0.8)), 4) for row in mismatched]
    return {"chosen": chosen, "rejected": rejected, "mismatched": mismatched, "desirable": GOOD, **near}


def padded(rows: list[list[float]]) -> torch.Tensor:
    """Rows of numbers behind a prompt, as TRL lays per-token log-probabilities out: (sequences, longest - 1)."""
    longest = max(map(len, rows))
    return torch.tensor([[0.0] * (PROMPT - 1) + row + [0.0] * (longest - len(row)) for row in rows])


def masks(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(input ids, completion mask) of answers of these lengths behind the prompt."""
    longest = max(lengths)
    mask = torch.tensor([[0] * PROMPT + [1] * n + [0] * (longest - n) for n in lengths])
    return torch.full_like(mask, 5), mask


def answers(logps: torch.Tensor) -> Any:
    """What TRL's fused head gives, with these log-probabilities; the other numbers only go into its logs."""
    zeros = torch.zeros_like(logps)
    return SimpleNamespace(log_probs=logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), aux_loss=None)


def trainer(kind: type, config: type, rows: dict[str, list[Any]], folder: str, **settings: Any) -> Any:
    """A trainer as it comes."""
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, "a": 3, "b": 4, "x": 5}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "<unk>")),
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
    )
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=6, eos_token_id=1, pad_token_id=0, **shape))
    model.name_or_path = model.config._name_or_path = folder  # the reference model is loaded from here
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    made = kind(
        model=model,
        args=config(
            output_dir=folder,
            per_device_train_batch_size=len(GOOD),
            report_to="none",
            use_cpu=True,
            bf16=False,
            **settings,
        ),
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict(rows),
    )
    made.model.train()
    return made


def split(gradient: torch.Tensor, lengths: list[int]) -> list[list[float]]:
    return [row[PROMPT - 1 : PROMPT - 1 + n] for row, n in zip(gradient.tolist(), lengths, strict=True)]


def logged(made: Any) -> dict[str, float]:
    metrics = made._metrics["train"]
    return {k: v[-1] for k, v in metrics.items() if k.startswith(("rewards", "kl"))}


def dpo(data: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """DPO's own loss, its gradient in every log-probability, and the rewards that it logs."""
    rows = {"prompt": ["a b"] * 5, "chosen": ["x"] * 5, "rejected": ["a"] * 5}
    with tempfile.TemporaryDirectory() as folder:
        made = trainer(trl.DPOTrainer, trl.DPOConfig, rows, folder, precompute_ref_log_probs=True, **settings)
    logps = padded(data["chosen"] + data["rejected"]).requires_grad_()
    ids, mask = masks(CHOSEN + REJECTED)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask}
    inputs |= {f"ref_{k}_logps": torch.tensor(data[f"reference_{k}"]) for k in ("chosen", "rejected")}
    loss = made._compute_loss(lambda **_: answers(logps), inputs, False)
    (gradient,) = torch.autograd.grad(loss, logps)
    found = split(gradient, CHOSEN + REJECTED)
    return {
        "settings": settings,
        "loss": loss.item(),
        "gradient_chosen": found[:5],
        "gradient_rejected": found[5:],
        "metrics": logged(made),
    }


def kto(data: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """KTO's own loss on the chosen answers, as good and bad ones, with its estimate of the divergence."""
    rows: dict[str, list[Any]] = {"prompt": ["a b"] * 5, "completion": ["x"] * 5, "label": GOOD}
    with tempfile.TemporaryDirectory() as folder:
        made = trainer(trl.KTOTrainer, trl.KTOConfig, rows, folder, precompute_ref_log_probs=True, **settings)
    logps, other = padded(data["chosen"]).requires_grad_(), padded(data["mismatched"])
    ids, mask = masks(CHOSEN)
    ones = torch.ones_like(ids)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": ones, "completion_mask": mask}
    inputs |= {"KL_input_ids": ids, "KL_attention_mask": ones, "KL_completion_mask": mask}
    inputs |= {"label": torch.tensor(GOOD), "ref_logps": torch.tensor(data["reference_chosen"])}
    inputs["ref_KL_logps"] = torch.tensor(data["reference_mismatched"])
    loss = made._compute_loss(lambda **_: answers(logps if torch.is_grad_enabled() else other), inputs, False)
    (gradient,) = torch.autograd.grad(loss, logps)
    return {"settings": settings, "loss": loss.item(), "gradient": split(gradient, CHOSEN), "metrics": logged(made)}


def whole_answers(data: dict[str, Any], mean: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of whole answers, or a token: what CPO and ORPO hand to their losses."""
    chosen, rejected = ([sum(r) / (len(r) if mean else 1) for r in data[k]] for k in ("chosen", "rejected"))
    return torch.tensor(chosen, requires_grad=True), torch.tensor(rejected, requires_grad=True)


def reference_free(kind: type, config: type, data: dict[str, Any], **settings: Any) -> dict[str, Any]:
    rows = {"prompt": ["a b"] * 5, "chosen": ["x"] * 5, "rejected": ["a"] * 5}
    with tempfile.TemporaryDirectory() as folder:
        made = trainer(kind, config, rows, folder, **settings)
    is_orpo = kind is ORPOTrainer
    chosen, rejected = whole_answers(data, is_orpo or settings.get("loss_type") == "simpo")
    out = made.odds_ratio_loss(chosen, rejected) if is_orpo else made.cpo_loss(chosen, rejected)
    losses = -out[0] if is_orpo else out[0]  # ORPO subtracts what it returns
    gradients = torch.autograd.grad(losses.sum(), (chosen, rejected))
    return {
        "settings": settings,
        "losses": losses.tolist(),
        "gradient_chosen": gradients[0].tolist(),
        "gradient_rejected": gradients[1].tolist(),
        "rewards_chosen": out[1].tolist(),
        "rewards_rejected": out[2].tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parents[1] / "tests/losses/recorded_trl_preference.json"
    parser.add_argument("--out", type=Path, default=default, help="the file to write")
    parser.add_argument("--seed", type=int, default=5, help="of the fixed tensors")
    options = parser.parse_args()
    data = tensors(options.seed)
    cases = {
        "dpo": dpo(data, loss_type=["sigmoid"], beta=0.3),
        "robust_dpo": dpo(data, loss_type=["robust"], beta=0.3, label_smoothing=0.2),
        "ipo": dpo(data, loss_type=["ipo"], beta=0.4),
        "dpo_norm": dpo(data, loss_type=["sigmoid_norm"], beta=2.0),
        "kto": kto(data, beta=0.3),
        "kto_weighted": kto(data, beta=0.3, desirable_weight=0.8, undesirable_weight=1.3),
        "cpo": reference_free(CPOTrainer, CPOConfig, data, beta=0.3, loss_type="sigmoid"),
        "cpo_smoothed": reference_free(CPOTrainer, CPOConfig, data, beta=0.3, loss_type="sigmoid", label_smoothing=0.2),
        "simpo": reference_free(CPOTrainer, CPOConfig, data, beta=2.0, loss_type="simpo", simpo_gamma=0.7),
        "orpo": reference_free(ORPOTrainer, ORPOConfig, data, beta=0.2),
    }
    made = {"trl": trl.__version__, "torch": torch.__version__, "tensors": data, "cases": cases}
    options.out.write_text(json.dumps(made, indent=1) + "\n")
    print(f"{len(cases)} cases of TRL {trl.__version__} in {options.out}")


if __name__ == "__main__":
    main()
