"""Train a model by direct preference optimisation, in one flat file with only torch and transformers.

    python examples/dpo_loop.py --tiny                        # a tiny random model, a few built-in pairs
    python examples/dpo_loop.py MODEL_FOLDER pairs.jsonl      # one {"prompt", "chosen", "rejected"} per line, all texts

For two answers y_w (the better one) and y_l to a prompt x, the loss of a batch is (arXiv 2305.18290, eq. 7)

    L = - mean_b log sigmoid(beta h_b)        h = log pi(y_w|x) / ref(y_w|x) - log pi(y_l|x) / ref(y_l|x)

with log pi(y|x) summed over the answer's tokens, its end-of-turn token included, and ref the model before the first
step. The log-probabilities of ref are computed once, before training, so only one model is in memory.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Pair = tuple[list[int], list[int], list[int]]  # token ids of the prompt, of the better answer, of the other

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BUILT_IN = [
    {"prompt": "What colour is the sky?", "chosen": "Blue.", "rejected": "That is a matter of taste."},
    {"prompt": "And grass?", "chosen": "Green, as a rule.", "rejected": "Grass!"},
    {"prompt": "Two and two?", "chosen": "Four.", "rejected": "Two and two is a sum of which much is made."},
]


def tiny() -> tuple[Any, Any]:
    """Make a random two-layer Llama and a tokenizer whose tokens are bytes, so that nothing is downloaded."""
    bos, eos = "<|im_start|>", "<|im_end|>"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_ = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([bos, eos, *alphabet])}, merges=[]))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_, bos_token=bos, eos_token=eos, chat_template=CHATML)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config), tokenizer


def encode(tokenizer: Any, row: dict[str, str]) -> Pair:
    """Tokenize the prompt as at inference, and both answers with their end-of-turn token.

    Prompt and answers are tokenized separately, as when the model answers: no token crosses the border. Raises
    ValueError for two equal answers, which have no preference, and for a template that does not render the answer after
    the generation prompt.
    """
    if row["chosen"].strip() == row["rejected"].strip():
        raise ValueError(f"both answers are {row['chosen']!r}")
    asked = [{"role": "user", "content": row["prompt"]}]
    before = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    parts = [before]
    for answer in (row["chosen"], row["rejected"]):
        whole = tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": answer}], tokenize=False)
        if not whole.startswith(before):
            raise ValueError("the chat template does not render the answer after the generation prompt")
        parts.append(whole[len(before) :].rstrip())
    prompt, chosen, rejected = (tokenizer(p, add_special_tokens=False)["input_ids"] for p in parts)
    return prompt, chosen, rejected


def log_probability(model: Any, prompt: list[int], answer: list[int]) -> Tensor:
    """Return log pi(answer | prompt), a scalar: the sum over the answer's tokens."""
    ids = torch.tensor(prompt + answer)
    logits = model(input_ids=ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1]  # t predicts token t + 1
    return -F.cross_entropy(logits.float(), ids[len(prompt) :], reduction="sum")


def rate(step: int, steps: int, warmup: int) -> float:
    """Return the share of the peak learning rate at a step (from 0): linear up to 1, then half a cosine towards 0."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train(
    model: Any,
    batches: list[list[Pair]],
    lr: float,
    *,
    beta: float = 0.1,
    warmup: int = 0,
    max_grad_norm: float = 1.0,
    verbose: bool = False,
) -> list[dict[str, float]]:
    """Train the model in place, one optimizer step per batch.

    Args:
        model: Causal language model, which is also the reference before the first step.
        batches: Pairs of each step.
        lr: Peak learning rate.
        beta: Factor of the log ratios.
        warmup: Steps of linear warm-up.
        max_grad_norm: Norm to which gradients are clipped. 0: no clipping.
        verbose: Print one line per step.

    Returns:
        For every step, before its update: `loss`; `margin`, the batch's mean of beta h, the difference of the implicit
        rewards; `accuracy`, the share of pairs with a margin above 0.
    """
    model.eval()  # no dropout: reference and policy may differ only by training
    reference = {}
    with torch.no_grad():
        for prompt, chosen, rejected in (pair for batch in batches for pair in batch):
            for answer in (chosen, rejected):
                key = (tuple(prompt), tuple(answer))
                if key not in reference:
                    reference[key] = log_probability(model, prompt, answer)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    records = []
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = lr * rate(step, len(batches), warmup)
        record = {"loss": 0.0, "margin": 0.0, "accuracy": 0.0}
        for prompt, chosen, rejected in batch:  # one pair at a time: no padding, and gradients add up
            better, worse = (
                log_probability(model, prompt, answer) - reference[tuple(prompt), tuple(answer)]
                for answer in (chosen, rejected)
            )
            margin = beta * (better - worse)
            loss = -F.logsigmoid(margin) / len(batch)
            loss.backward()
            record["loss"] += loss.item()
            record["margin"] += margin.item() / len(batch)
            record["accuracy"] += (margin.item() > 0) / len(batch)
        torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        records.append(record)
        if verbose:
            print(f"step {step + 1:4d}  " + "  ".join(f"{k} {v:.4f}" for k, v in record.items()), flush=True)
    return records


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", help="folder of a model with its tokenizer; leave out with --tiny")
    parser.add_argument("data", nargs="?", help="JSONL of pairs; default: a few built-in ones")
    parser.add_argument("--tiny", action="store_true", help="a tiny random Llama instead of a model")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=2, help="pairs per step")
    parser.add_argument("--beta", type=float, default=0.1, help="factor of the log ratios")
    parser.add_argument("--lr", type=float, default=None, help="peak learning rate (default 1e-6, or 1e-3 with --tiny)")
    args = parser.parse_args()
    if args.tiny == bool(args.model):
        parser.error("give a model's folder or --tiny")
    torch.manual_seed(0)
    if args.tiny:
        model, tokenizer = tiny()
    else:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    lines = Path(args.data).read_text(encoding="utf-8").splitlines() if args.data else []
    rows = [json.loads(line) for line in lines if line.strip()] if args.data else BUILT_IN
    pairs, shuffle = [encode(tokenizer, row) for row in rows], random.Random(0)
    passes = math.ceil(args.steps * args.batch / len(pairs))  # over the data, each in another order
    order = [pair for _ in range(passes) for pair in shuffle.sample(pairs, len(pairs))]
    batches = [order[i * args.batch : (i + 1) * args.batch] for i in range(args.steps)]
    lr = args.lr or (1e-3 if args.tiny else 1e-6)
    train(model, batches, lr, beta=args.beta, warmup=args.steps // 10, verbose=True)


if __name__ == "__main__":
    main()
