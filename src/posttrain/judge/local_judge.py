"""A judge in this process: labels by the likelihood of their tokens, without sampling; rationales by the sampler."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from posttrain.config import ModelConfig, SamplingConfig
from posttrain.core.types import Sample
from posttrain.data.chat_template import render_chat
from posttrain.data.plain_text import plain_prompts
from posttrain.data.tokenizing import continuation, tokenize
from posttrain.judge.asker import JudgeAnswer, JudgeRequest, OnAnswer
from posttrain.models.language_model import LanguageModel
from posttrain.models.loading import context_length, load_model, resolve
from posttrain.models.verification import verify
from posttrain.sampling.engine import LocalSampler
from posttrain.sampling.protocol import Request

FORWARD_TOKENS = 8192
"""Tokens of one forward pass: also how much is asked again after a crash."""
RATIONALES_AT_ONCE = 32
"""Rationales sampled together."""


class LocalJudge:
    """A `Backend`. The model is opened when the first question comes that the store does not know."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.opened: tuple[LanguageModel, Any, int] | None = None
        self.seconds = 0.0

    def identity(self) -> dict[str, Any]:
        """Return the hash of its weights if they are on this disk, else name and revision."""
        sha = resolve(self.config.source).sha256()
        named = {"sha256": sha} if sha else {"source": self.config.source, "revision": self.config.revision}
        return {"kind": "local", **named, "dtype": self.config.dtype, "chat_template": self.config.chat_template}

    def account(self) -> dict[str, Any]:
        """Return what judging has cost."""
        return {"seconds": round(self.seconds, 2)}

    def answer(self, asks: Sequence[JudgeRequest], on_answer: OnAnswer) -> None:
        """Answer requests, calling `on_answer` with (index, answer) pairs as they are ready."""
        began = time.perf_counter()
        _, tokenizer, context = self._open()
        prompts = [self._tokens(a, tokenizer) for a in asks]
        room = [context - len(p) for p in prompts]
        long = [
            (i, JudgeAnswer(refused=f"too long: {len(p)} tokens, and the judge's context is {context}"))
            for i, p in enumerate(prompts)
            if room[i] < (asks[i].max_tokens if not asks[i].labels else 8)
        ]
        if long:
            on_answer(long)
        left = [i for i in range(len(asks)) if i not in {n for n, _ in long}]
        verdicts = [i for i in left if asks[i].labels]
        for chunk in _chunks(verdicts, [len(p) for p in prompts]):
            on_answer(self._verdicts(chunk, asks, prompts))
        free = [i for i in left if not asks[i].labels]
        for start in range(0, len(free), RATIONALES_AT_ONCE):
            on_answer(self._texts(free[start : start + RATIONALES_AT_ONCE], asks, prompts))
        self.seconds += time.perf_counter() - began

    def _open(self) -> tuple[LanguageModel, Any, int]:
        if self.opened is None:
            hf, tokenizer = load_model(self.config, inference=True)
            model = LanguageModel(hf).eval().requires_grad_(False)
            verify(model)
            self.opened = model, tokenizer, context_length(self.config) or 2**31
        return self.opened

    def _tokens(self, ask: JudgeRequest, tokenizer: Any) -> list[int]:
        """The question as the model sees it: by its chat template, or as plain text where it has none."""
        if getattr(tokenizer, "chat_template", None):
            text = render_chat(tokenizer, ask.messages, generation=True)
            return tokenize(tokenizer, [text + ask.opening])[0]
        text = "\n\n".join(m["content"] for m in ask.messages) + "\n" + (ask.opening or "Answer:")
        return plain_prompts([text], tokenizer)[0]

    @torch.inference_mode()
    def _verdicts(
        self, chunk: Sequence[int], asks: Sequence[JudgeRequest], prompts: Sequence[list[int]]
    ) -> list[tuple[int, JudgeAnswer]]:
        began = time.perf_counter()
        model, tokenizer, _ = self._open()
        samples: list[Sample] = []
        plan: list[tuple[int, list[tuple[str, tuple[int, ...]]]]] = []
        for i in chunk:
            ways = _ways(asks[i].labels, tokenizer)
            plan.append((i, ways))
            for _, tokens in ways:
                samples.append(Sample([*prompts[i], *tokens], [0.0] * len(prompts[i]) + [1.0] * len(tokens)))
        batch = model.pack(samples)
        targets = torch.cat(
            [row[-n:] for row, n in zip(batch.rows, (int(sum(s.weights)) for s in samples), strict=True)]
        )
        logprobs = model(batch, "logprobs", targets)[0].double().cpu()
        sizes = [int(sum(s.weights)) for s in samples]
        joint = iter(part.sum().exp().item() for part in logprobs.split(sizes))
        seconds = (time.perf_counter() - began) / len(chunk)
        out = []
        for i, ways in plan:
            joint_probabilities = {tokens: next(joint) for _, tokens in ways}
            probabilities = dict.fromkeys(asks[i].labels, 0.0)
            for label, tokens in ways:
                probabilities[label] += _alone(tokens, joint_probabilities)
            best = max(probabilities, key=lambda x: probabilities[x])
            out.append((i, JudgeAnswer(best, probabilities, "label", len(prompts[i]), 1, seconds)))
        return out

    def _texts(
        self, chunk: Sequence[int], asks: Sequence[JudgeRequest], prompts: Sequence[list[int]]
    ) -> list[tuple[int, JudgeAnswer]]:
        began = time.perf_counter()
        model, tokenizer, _ = self._open()
        longest = max(asks[i].max_tokens for i in chunk)
        params = SamplingConfig(temperature=0.0, max_tokens=longest)
        requests = [Request(prompts[i], max_tokens=asks[i].max_tokens) for i in chunk]
        groups = LocalSampler(model, tokenizer).sample(requests, params)
        seconds = (time.perf_counter() - began) / len(chunk)
        out = []
        for i, group in zip(chunk, groups, strict=True):
            r = group.rollouts[0]
            made = JudgeAnswer(r.text.strip(), None, r.finish, len(prompts[i]), len(r.tokens), seconds)
            out.append((i, made))
        return out


def _chunks(numbers: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    """Neighbours, up to CHUNK_TOKENS: the two orders of a pair lie together, and share what they begin with."""
    run: list[int] = []
    for i in numbers:
        if run and sum(lengths[j] for j in run) + lengths[i] > FORWARD_TOKENS:
            yield run
            run = []
        run.append(i)
    if run:
        yield run


def _ways(labels: Sequence[str], tokenizer: Any) -> list[tuple[str, tuple[int, ...]]]:
    """(label, tokens) of every way in which a reply may begin with a label.

    With a space before it and without; words (not letters, of which "a" is also a word) as they are and capitalised.
    """
    out: dict[tuple[int, ...], str] = {}
    for label in labels:
        forms = {label: None, label[:1].upper() + label[1:]: None} if len(label) > 1 else {label: None}
        for text in (space + form for form in forms for space in ("", " ")):
            out.setdefault(tuple(continuation(tokenizer, text)), label)
    return [(label, tokens) for tokens, label in out.items()]


def _alone(tokens: tuple[int, ...], joint_probabilities: dict[tuple[int, ...], float]) -> float:
    """The probability of these tokens and no longer label: that of "1" is without that of "10"."""
    longer = [t for t in joint_probabilities if len(t) > len(tokens) and t[: len(tokens)] == tokens]
    nearest = [t for t in longer if not any(u != t and t[: len(u)] == u for u in longer)]
    return max(0.0, joint_probabilities[tokens] - sum(joint_probabilities[t] for t in nearest))
