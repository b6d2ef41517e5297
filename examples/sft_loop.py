"""Fine-tune a model on conversations, in one flat file with only torch and transformers: to read, and as a check.

    python examples/sft_loop.py --tiny                        # a tiny random model, a few built-in conversations
    python examples/sft_loop.py MODEL_FOLDER chats.jsonl      # one {"messages": [{"role", "content"}, ...]} per line

The loss of a step is the cross-entropy of the assistant's tokens, summed over the whole batch and divided by their
number in the whole batch:

    L = - sum_b sum_t m[b,t] log p(x[b,t] | x[b,<t]) / sum_b sum_t m[b,t]        m = 1 on tokens to train on, else 0

so every token has the same weight. (A mean of the conversations' means would give tokens of short answers a larger
weight.)
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

Example = tuple[list[int], list[int]]  # token ids, and for each 1 if it carries loss

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUESTIONS = {
    "What colour is the sky?": "Blue.",
    "And grass?": "Green, as a rule; in a dry summer it turns yellow.",
}


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


def encode(tokenizer: Any, messages: list[dict[str, str]]) -> Example:
    """Render a conversation with the chat template, and find the tokens that the model has to write.

    An assistant turn begins where the generation prompt ends and includes its end-of-turn token: a model that is not
    trained on that token does not stop. White space after it carries no loss. Templates that rewrite earlier turns as
    the conversation grows (some remove old reasoning) cannot be read in this way and are rejected.

    Args:
        tokenizer: Tokenizer with a chat template.
        messages: Turns with `role` and `content`.

    Returns:
        Token ids, and a mask with 1 on the tokens that carry loss.

    Raises:
        ValueError: The template rewrites an earlier turn.
    """
    render = partial(tokenizer.apply_chat_template, tokenize=False)
    text = render(messages)
    spans = []  # [first, last) characters of each assistant turn
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = render(messages[:i], add_generation_prompt=True), render(messages[: i + 1])
            if not (text.startswith(after) and after.startswith(before)):
                raise ValueError(f"the chat template rewrites turn {i}, so its position in the text is unknown")
            spans.append((len(before), len(after.rstrip())))
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    mask = [int(any(first <= a < last for first, last in spans)) for a, _ in coded["offset_mapping"]]
    return coded["input_ids"], mask


def rate(step: int, steps: int, warmup: int) -> float:
    """Return the share of the peak learning rate at a step (from 0): linear up to 1, then half a cosine towards 0."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train(model: Any, batches: list[list[Example]], lr: float, *, warmup: int = 0, weight_decay: float = 0.0,
          max_grad_norm: float = 1.0, cosine: bool = True, verbose: bool = False) -> list[float]:  # fmt: skip
    """Train the model in place, one optimizer step per batch.

    The first entry of a mask is ignored: no token precedes the first token, so nothing can predict it.

    Args:
        model: Causal language model.
        batches: Examples of each step.
        lr: Peak learning rate.
        warmup: Steps of linear warm-up.
        weight_decay: Decay of matrices.
        max_grad_norm: Norm to which gradients are clipped. 0: no clipping.
        cosine: Decrease to 0 along half a cosine; false: stay at the peak after warm-up.
        verbose: Print one line per step.

    Returns:
        The loss of every step, before its update.

    Raises:
        ValueError: A batch has no token that carries loss.
    """
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [  # decay moves weights to 0: right for matrices, wrong for the scales of norms and for biases
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
            raise ValueError(f"batch {step} has no token that carries loss")
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
    parser.add_argument("--batch", type=int, default=2, help="conversations per step")
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
    passes = math.ceil(args.steps * args.batch / len(examples))  # over the data, each in another order
    order = [example for _ in range(passes) for example in shuffle.sample(examples, len(examples))]
    batches = [order[i * args.batch : (i + 1) * args.batch] for i in range(args.steps)]
    lr = args.lr or (3e-3 if args.tiny else 2e-5)
    train(model, batches, lr, warmup=args.steps // 10, weight_decay=0.01, verbose=True)


if __name__ == "__main__":
    main()
