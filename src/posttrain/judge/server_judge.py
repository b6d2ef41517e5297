"""A judge behind a server: labels from its answer tokens' probabilities where it gives them, else from its text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.config import ServerConfig
from posttrain.judge.asker import JudgeAnswer, JudgeRequest, OnAnswer
from posttrain.sampling.openai_client import Reply, Server

TOP = 20
"""Alternatives requested for each token: the most that the protocol allows."""


class RemoteJudge:
    """A `Backend`. Rationales and verdicts are drawn at temperature 0; a verdict that can't be read, again at 1."""

    def __init__(self, config: ServerConfig) -> None:
        self.config, self.server = config, Server(config)

    def identity(self) -> dict[str, Any]:
        """Return what decides the answers, for the store of answers."""
        return {
            "kind": "server",
            "base_url": self.server.address,
            "model": self.config.model,
            "logprobs": self.config.logprobs,
            "options": self.config.options,
        }

    def account(self) -> dict[str, Any]:
        """Return what judging has cost: requests, retries and seconds."""
        counts = self.server.counts
        retries = {k.removeprefix("retries: "): n for k, n in sorted(counts.items()) if k.startswith("retries: ") and n}
        return {
            "seconds": round(self.server.seconds, 2),
            "requests": counts["requests"],
            "retries": retries,
            "waited_seconds": round(counts["waited ms"] / 1000, 2),
        }

    def answer(self, asks: Sequence[JudgeRequest], on_answer: OnAnswer) -> None:
        """Answer requests, calling `on_answer` with (index, answer) pairs as they are ready."""
        bodies = [self._body(a) for a in asks]
        self.server.ask(bodies, lambda i, reply: on_answer([(i, _answer(asks[i], reply))]))

    def _body(self, ask: JudgeRequest) -> dict[str, Any]:
        body: dict[str, Any] = {
            "messages": [dict(m) for m in ask.messages],
            "max_tokens": ask.max_tokens,
            "temperature": 1.0 if ask.attempt else 0.0,
        }
        if ask.attempt:
            body["seed"] = ask.seed + ask.attempt
        if ask.labels and self.config.logprobs:
            body |= {"logprobs": True, "top_logprobs": TOP}
        return body


def _answer(ask: JudgeRequest, reply: Reply) -> JudgeAnswer:
    if reply.refused:
        return JudgeAnswer(refused=reply.refused, seconds=reply.seconds)
    probabilities = label_probabilities(reply.tops, ask.labels) if ask.labels and reply.tops else None
    return JudgeAnswer(
        reply.text.strip(), probabilities, reply.finish, reply.prompt_tokens, reply.completion_tokens, reply.seconds
    )


def label_probabilities(
    tops: Sequence[tuple[str, Mapping[str, float]]], labels: Sequence[str]
) -> dict[str, float] | None:
    """Return the probability of each label, at the reply's first token that is a label or begins one.

    A token that is the beginning of one label alone ("neg") counts for it. "1", which is a label and begins another, is
    distinguished from "10" by the next token if the reply continues that way; else "1" gets the probability of both.
    None if no label begins there, or several do and none is complete: then the text has to be read.
    """
    at = next((i for i, (token, _) in enumerate(tops) if token.strip()), None)
    if at is None:
        return None
    token, alternatives = tops[at]
    spelt = _spelt(token.strip(), labels)
    if not _owner(spelt, labels):
        return None
    out = dict.fromkeys(labels, 0.0)
    for text, logprob in alternatives.items():
        owner = _owner(_spelt(text.strip(), labels), labels)
        if owner:
            out[owner] += math.exp(logprob)
    longer = [x for x in labels if x != spelt and x.startswith(spelt)]
    if spelt in out and longer and at + 1 < len(tops):
        shared = math.exp(alternatives[token])
        for x in longer:
            share = shared * sum(math.exp(p) for t, p in tops[at + 1][1].items() if t and spelt + t == x)
            out[x] += share
            out[spelt] = max(0.0, out[spelt] - share)
    return out if any(out.values()) else None


def _owner(text: str, labels: Sequence[str]) -> str:
    """The label that a token stands for: itself, or the only one that it begins (two characters at least)."""
    if text in labels:
        return text
    owners = [x for x in labels if len(text) > 1 and x.startswith(text)]
    return owners[0] if len(owners) == 1 else ""


def _spelt(text: str, labels: Sequence[str]) -> str:
    """The text as the labels spell it: "Positive" is positive; letters are as they are, since "a" is also a word."""
    small = text[:1].lower() + text[1:]
    same = any(len(x) > 1 and x.startswith(small) for x in labels) and not any(x.startswith(text) for x in labels)
    return small if len(text) > 1 and same else text
