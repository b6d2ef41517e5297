"""Supervised fine-tuning in one flat file: nothing but torch and transformers, to read and to check against.

    python examples/sft_loop.py --tiny                        # a tiny random model, a few built-in conversations
    python examples/sft_loop.py MODEL_FOLDER chats.jsonl      # one {"messages": [{"role", "content"}, ...]} a line

The loss of a step is the cross-entropy of the assistant's tokens, summed over the whole batch and divided by their
number in the whole batch:

    L = - sum_b sum_t m[b,t] log p(x[b,t] | x[b,<t]) / sum_b sum_t m[b,t]        m = 1 on tokens to learn, else 0

so every token counts alike. (A mean of the conversations' means would let a token of a short answer count for more.)
"""

from __future__ import annotations

import argparse
import json
import math
import random
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Example = tuple[list[int], list[int]]  # token ids, and for each 1 if it is to be learnt

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUESTIONS = {
    "What colour is the sky?": "Blue.",
    "And grass?": "Green, as a rule; in a dry summer it turns yellow.",
}


def tiny() -> tuple[Any, Any]:
    """A random two-layer Llama, and a tokenizer whose tokens are bytes, so that nothing need be fetched."""
    bos, eos = "<|im_start|>", "<|im_end|>"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_ = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([bos, eos, *alphabet])}, merges=[]))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_, bos_token=bos, eos_token=eos, chat_template=CHATML)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config), tokenizer


def encode(tokenizer: Any, messages: list[dict[str, str]]) -> Example:
    """Render a conversation through the chat template, and find what the model itself will have to say.

    An assistant turn begins where the generation prompt ends and goes on through its end-of-turn token: a model that is
    never taught that token never stops. White space that the template puts after it is not learnt. Templates that
    rewrite earlier turns as the conversation grows (some drop old reasoning) can't be read this way, and are refused.
    """
    render = partial(tokenizer.apply_chat_template, tokenize=False)
    text = render(messages)
    spans = []  # [first, last) characters of each assistant turn
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = render(messages[:i], add_generation_prompt=True), render(messages[: i + 1])
            if not (text.startswith(after) and after.startswith(before)):
                raise ValueError(f"the chat template rewrites turn {i}, so where it begins can't be told from its text")
            spans.append((len(before), len(after.rstrip())))
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    mask = [int(any(first <= a < last for first, last in spans)) for a, _ in coded["offset_mapping"]]
    return coded["input_ids"], mask


def rate(step: int, steps: int, warmup: int) -> float:
    """Part of the peak learning rate at a step counted from 0: a line up to 1, then half a cosine down towards 0."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train(model: Any, batches: list[list[Example]], lr: float, *, warmup: int = 0, weight_decay: float = 0.0,
          max_grad_norm: float = 1.0, cosine: bool = True, verbose: bool = False) -> list[float]:  # fmt: skip
    """Train the model in place, one optimizer step a batch, and return the loss of every step (before its update).

    A mask's first entry is ignored: nothing comes before the first token to predict it from. `max_grad_norm` 0 clips
    nothing; `cosine` false stays at the peak after warm-up. Raises ValueError on a batch without any token to learn.
    """
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [  # decay pulls weights to 0, which suits matrices and not the scales of norms or biases
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), eps=1e-8)
    losses = []
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = lr * (rate(step, len(batches), warmup) if cosine or step < warmup else 1.0)
        count = sum(sum(mask[1:]) for _, mask in batch)
        if count == 0:
            raise ValueError(f"batch {step} has no token to learn")
        total = 0.0
        for tokens, mask in batch:  # one conversation at a time: no padding, and gradients add up
            ids, wanted = torch.tensor(tokens), torch.tensor(mask[1:], dtype=torch.bool)
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]  # position t predicts token t + 1
            loss = F.cross_entropy(logits[wanted].float(), ids[1:][wanted], reduction="sum") / count
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm or math.inf)  # the norm before clipping
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        if verbose:
            print(f"step {step + 1:4d}  loss {total:.4f}  grad norm {norm:.4f}  tokens {count}", flush=True)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", help="folder of a model with its tokenizer; leave out with --tiny")
    parser.add_argument("data", nargs="?", help="JSONL of conversations; default: a few built-in ones")
    parser.add_argument("--tiny", action="store_true", help="a tiny random Llama instead of a model")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=2, help="conversations a step")
    parser.add_argument("--lr", type=float, default=None, help="peak learning rate (default 2e-5, or 3e-3 with --tiny)")
    args = parser.parse_args()
    if args.tiny == bool(args.model):
        parser.error("give a model's folder or --tiny")
    torch.manual_seed(0)
    if args.tiny:
        model, tokenizer = tiny()
    else:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = Path(args.data).read_text(encoding="utf-8").splitlines() if args.data else []
    conversations = [json.loads(row)["messages"] for row in rows if row.strip()]
    for question, answer in ({} if args.data else QUESTIONS).items():
        conversations.append([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
    examples, shuffle = [encode(tokenizer, c) for c in conversations], random.Random(0)
    passes = math.ceil(args.steps * args.batch / len(examples))  # over the data, each in an order of its own
    order = [example for _ in range(passes) for example in shuffle.sample(examples, len(examples))]
    batches = [order[i * args.batch : (i + 1) * args.batch] for i in range(args.steps)]
    lr = args.lr or (3e-3 if args.tiny else 2e-5)
    train(model, batches, lr, warmup=args.steps // 10, weight_decay=0.01, verbose=True)


if __name__ == "__main__":
    main()
