"""Train a model by GRPO, in one flat file with only torch and transformers: to read, and as a check.

    python examples/grpo_loop.py --tiny                          # a tiny random model learns to write even digits
    python examples/grpo_loop.py MODEL_FOLDER problems.jsonl     # {"prompt", "answer"} per line; judges the last line

A step of GRPO (Shao et al. 2024, arXiv 2402.03300):

1. Take P prompts and sample G completions of each from the current policy.
2. Give every completion a reward r. Its advantage is relative to its group,

       A = (r - mean of the group) / (standard deviation of the group + 1e-4)

   so no model of the difficulty of a prompt is needed. A group with equal rewards gives no gradient.
3. Make better completions more likely and worse ones less likely, token by token, with the clipped ratio of PPO:

       L = - mean over completions of mean over tokens of min(rho A, clip(rho, 0.8, 1.2) A)
       rho = p_now(token) / p_when_sampled(token)

   With one optimizer step per batch rho is 1, and its gradient is that of the log-probability: the clip has an effect
   only from the second step on the same completions.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EPSILON = 1e-4
CLIP = 0.2


@dataclass
class Completion:
    """Hold one sampled completion.

    Attributes:
        prompt: Token ids of the prompt.
        tokens: Token ids of the completion.
        logprobs: Log-probability of each token when it was sampled.
        reward: Its reward.
        advantage: Its advantage within the group.
    """

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    reward: float = 0.0
    advantage: float = 0.0


def tiny() -> tuple[Any, Any]:
    """Make a random two-layer Llama over ten digits and an end token."""
    vocabulary = {"<end>": 0, **{str(d): d + 1 for d in range(10)}}
    digits = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    digits.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=digits, eos_token="<end>")
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config), tokenizer


@torch.no_grad()
def sample(
    model: Any, prompt: list[int], group: int, longest: int, temperature: float, end: int | None
) -> list[Completion]:
    """Sample completions of one prompt, token by token with a cache of keys and values, all rows together.

    A finished row is computed until the last row has finished, and its further tokens are discarded. (This, and
    computing the prompt once per row, makes simple loops like this one slow.)

    Args:
        model: Causal language model.
        prompt: Token ids of the prompt.
        group: Number of completions.
        longest: Most tokens of a completion.
        temperature: Sampling temperature.
        end: Token that ends a completion. None: only `longest` ends it.

    Returns:
        `group` completions, without rewards.
    """
    ids = torch.tensor([prompt] * group)
    rows = [Completion(prompt, [], []) for _ in range(group)]
    running = [True] * group
    cache = None
    for _ in range(longest):
        # The cache by its place: `past_key_values` is `cache` from transformers 5.24 on.
        logits, cache = model(ids, None, None, cache, use_cache=True).to_tuple()[:2]
        logprobs = (logits[:, -1].float() / temperature).log_softmax(-1)
        drawn = torch.multinomial(logprobs.exp(), 1)
        for i, token in enumerate(drawn[:, 0].tolist()):
            if running[i]:
                rows[i].tokens.append(token)
                rows[i].logprobs.append(float(logprobs[i, token]))
                running[i] = token != end
        if not any(running):
            break
        ids = drawn
    return rows


def compute_advantages(group: list[Completion]) -> None:
    """Set each advantage to (r - mean) / (standard deviation + 1e-4) over one prompt's completions."""
    rewards = torch.tensor([c.reward for c in group], dtype=torch.float64)
    centred = rewards - rewards.mean()
    for c, a in zip(group, (centred / (rewards.std() + EPSILON)).tolist(), strict=True):
        c.advantage = a


def loss_of(model: Any, c: Completion, temperature: float) -> torch.Tensor:
    """Return the mean over the completion's tokens of -min(rho A, clip(rho) A).

    Args:
        model: Causal language model.
        c: Completion with its advantage.
        temperature: Sampling temperature, at which the log-probabilities are computed.
    """
    ids = torch.tensor([[*c.prompt, *c.tokens]])
    logits = model(input_ids=ids, use_cache=False).logits[0, len(c.prompt) - 1 : -1]  # position t predicts token t + 1
    logprobs = (logits.float() / temperature).log_softmax(-1).gather(1, ids[0, len(c.prompt) :, None])[:, 0]
    ratio = (logprobs - torch.tensor(c.logprobs)).exp()
    return -torch.minimum(ratio * c.advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * c.advantage).mean()


def learn(
    model: Any, optimizer: torch.optim.Optimizer, batch: list[Completion], temperature: float, max_norm: float = 1.0
) -> float:
    """Make one optimizer step on a batch of completions and return the loss.

    Completions with advantage 0 are not computed, and count in the mean.

    Args:
        model: Causal language model.
        optimizer: Its optimizer.
        batch: Completions with their advantages.
        temperature: Sampling temperature.
        max_norm: Norm to which gradients are clipped.
    """
    total = 0.0
    for c in batch:
        if c.advantage == 0 or not c.tokens:
            continue
        loss = loss_of(model, c, temperature) / len(batch)  # skipped completions count in the mean
        loss.backward()
        total += float(loss.detach())
    torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    optimizer.zero_grad()
    return total


def train(
    model: Any,
    tokenizer: Any,
    problems: list[dict[str, str]],
    reward: Callable[[str, str], float],
    *,
    steps: int,
    prompts: int,
    group: int,
    longest: int,
    lr: float,
    temperature: float = 1.0,
) -> list[float]:
    """Train the model and print one line per step.

    Args:
        model: Causal language model.
        tokenizer: Its tokenizer; a chat template is used if it has one.
        problems: Records with `prompt` and `answer`.
        reward: Function of a completion's text and the answer.
        steps: Optimizer steps.
        prompts: Prompts per step.
        group: Completions of each prompt.
        longest: Most tokens of a completion.
        lr: Learning rate.
        temperature: Sampling temperature.

    Returns:
        The mean reward of every step.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    draw, rewards = random.Random(0), []
    for step in range(steps):
        batch: list[Completion] = []
        flat = 0
        for problem in draw.sample(problems, prompts):
            if tokenizer.chat_template:
                asked = [{"role": "user", "content": problem["prompt"]}]
                ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
            else:
                ids = tokenizer(problem["prompt"])["input_ids"]
            completions = sample(model, ids, group, longest, temperature, tokenizer.eos_token_id)
            for c in completions:
                c.reward = reward(tokenizer.decode(c.tokens, skip_special_tokens=True), problem["answer"])
            compute_advantages(completions)
            flat += all(c.advantage == 0 for c in completions)
            batch += completions
        mean = sum(c.reward for c in batch) / len(batch)
        learn(model, optimizer, batch, temperature)
        rewards.append(mean)
        shown = max(batch, key=lambda c: c.reward)
        length = sum(len(c.tokens) for c in batch) / len(batch)
        print(
            f"step {step + 1:3d}  reward {mean:.3f}  length {length:.1f}  groups without signal {flat}/{prompts}  "
            f"best {tokenizer.decode(shown.tokens)[:40]!r}",
            flush=True,
        )
    return rewards


def last_line(text: str, answer: str) -> float:
    """Return 1 if the last line of the text is the answer, else 0."""
    lines = text.strip().splitlines()
    return float(bool(lines) and lines[-1].strip() == answer.strip())


def even_digits(text: str, answer: str) -> float:
    """Return the share of even digits, or 0 if the text has no digits."""
    digits = [int(d) for d in text if d.isdigit()]
    return sum(d % 2 == 0 for d in digits) / len(digits) if digits else 0.0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", help="folder of a model with its tokenizer; leave out with --tiny")
    parser.add_argument("problems", nargs="?", help="JSONL with prompt and answer")
    parser.add_argument("--tiny", action="store_true", help="a tiny random Llama that learns to write even digits")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--prompts", type=int, default=4, help="prompts per step")
    parser.add_argument("--group", type=int, default=8, help="completions of each prompt")
    parser.add_argument("--longest", type=int, default=None, help="tokens of a completion (default 64; 12 with --tiny)")
    parser.add_argument("--lr", type=float, default=None, help="learning rate (default 1e-6; 3e-3 with --tiny)")
    args = parser.parse_args()
    if args.tiny == bool(args.model and args.problems):
        parser.error("give a model's folder and a file of problems, or --tiny")
    torch.manual_seed(0)
    if args.tiny:
        model, tokenizer = tiny()
        problems = [{"prompt": str(n), "answer": ""} for n in range(10, 100)]
        reward, longest, lr = even_digits, args.longest or 12, args.lr or 3e-3
    else:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        problems = [json.loads(line) for line in Path(args.problems).read_text(encoding="utf-8").splitlines() if line]
        reward, longest, lr = last_line, args.longest or 64, args.lr or 1e-6
    model.eval()  # no dropout: training must see the policy that sampled
    train(
        model, tokenizer, problems, reward,
        steps=args.steps, prompts=args.prompts, group=args.group, longest=longest, lr=lr,
    )  # fmt: skip


if __name__ == "__main__":
    main()
