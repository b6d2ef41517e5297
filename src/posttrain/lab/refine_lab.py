"""The laboratory of self-refine, whose model checks answers better than it answers: tokenizer, talks, measurement.

Its tokenizer has a chat template, so that a talk of answer, check and another answer is a conversation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.config import SamplingConfig
from posttrain.core.types import Message, Sample
from posttrain.data.chat_template import render_chat
from posttrain.data.synthetic import refine_talks as talks
from posttrain.data.synthetic import sums
from posttrain.data.tokenizing import tokenize
from posttrain.lab.lab_settings import END, LabSettings, byte_level_bpe
from posttrain.lab.sums_lab import write_problems
from posttrain.models.language_model import LanguageModel
from posttrain.sampling.engine import LocalSampler
from posttrain.sampling.protocol import Request

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<' + m.content + '" + END + "' }}"
    "{% else %}{{ '>' + m.content + '\\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<' }}{% endif %}"
)


def refine_tokenizer() -> Any:
    """Make a tokenizer with one token for every digit and every word of the talks, the same for every seed."""
    texts = (written_talk(talks.talk_at(0, i)) for i in range(8000))
    tokenizer = byte_level_bpe(texts, size=512, min_frequency=20, digits=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def written_talk(talk: Sequence[Message]) -> str:
    """Return a talk as the chat template writes it, which takes a tenth of the template's time."""
    return "".join(
        f"<{turn['content']}{END}" if turn["role"] == "assistant" else f">{turn['content']}\n" for turn in talk
    )


class RefineLab:
    """Hold what is specific to the laboratory of self-refine."""

    steps = 800
    batch_size = 48

    def __init__(self, settings: LabSettings, tokenizer: Any = None) -> None:
        self.settings, self.tokenizer = settings, tokenizer or refine_tokenizer()

    def batch(self, step: int) -> list[Sample]:
        """Return the talks of a pretraining step; none is repeated. Every token but the first carries loss."""
        size = self.settings.batch_size
        numbers = range(step * size, (step + 1) * size)
        encoded = self.tokenizer([written_talk(talks.talk_at(self.settings.seed, i)) for i in numbers])["input_ids"]
        return [Sample(ids, [0.0] + [1.0] * (len(ids) - 1)) for ids in encoded]

    def measure(self, policy: LanguageModel) -> dict[str, Any]:
        """Return shares on held-out sums; all but `sampled` by the likeliest answers.

        first, sampled: right first answers. check: checks whose verdict is true; check_of_right, check_of_wrong: of
        right and of wrong answers. refined: right answers after one check, and another answer where it found something.
        corrected: right ones among the answers after wrong ones that the check found. again: right answers to the
        request for another answer without a check.
        """
        rows = sums.sum_problems(self.settings.seed, self.settings.measured, held_out=True)
        asked: list[list[Message]] = [[{"role": "user", "content": row["prompt"]}] for row in rows]
        first = likeliest(policy, self.tokenizer, asked)
        sampled = likeliest(policy, self.tokenizer, asked, temperature=1.0)
        talk = [_then(before, text, talks.CHECK) for before, text in zip(asked, first, strict=True)]
        checks = likeliest(policy, self.tokenizer, talk)
        revised = likeliest(
            policy, self.tokenizer, [_then(before, c, talks.AGAIN) for before, c in zip(talk, checks, strict=True)]
        )
        again = likeliest(
            policy, self.tokenizer, [_then(before, c, talks.AGAIN) for before, c in zip(asked, first, strict=True)]
        )
        accepts = [last_line_of(c) == talks.RIGHT for c in checks]
        right, right_after = (
            [is_right(text, row) for text, row in zip(texts, rows, strict=True)] for texts in (first, revised)
        )
        cases = list(zip(right, accepts, right_after, strict=True))
        return {
            "first": _share(right),
            "sampled": _share([is_right(text, row) for text, row in zip(sampled, rows, strict=True)]),
            "check": _share([was == accepted for was, accepted, _ in cases]),
            "check_of_right": _share([accepted for was, accepted, _ in cases if was]),
            "check_of_wrong": _share([not accepted for was, accepted, _ in cases if not was]),
            "refined": _share([was if accepted else after for was, accepted, after in cases]),
            "corrected": _share([after for was, accepted, after in cases if not was and not accepted]),
            "again": _share([is_right(text, row) for text, row in zip(again, rows, strict=True)]),
            "measured": len(rows),
        }

    def write(self, folder: Path) -> None:
        """Write problems.jsonl to train on, and held_out.jsonl, which is in no talk."""
        write_problems(self.settings, folder)

    @staticmethod
    def describe(result: Mapping[str, Any]) -> str:
        """Return a sentence about the measurement."""
        return (
            f"Right on {result['measured']} held-out sums: {result['first']:.1%} at first, {result['refined']:.1%} "
            f"after a check and another answer, {result['again']:.1%} after another answer without a check; "
            f"{result['check']:.1%} of its checks are right. Problems are in the folder."
        )


def likeliest(
    policy: LanguageModel, tokenizer: Any, prompts: Sequence[Sequence[Message]], temperature: float = 0.0
) -> list[str]:
    """Return the model's next turn of each conversation; empty if it does not end.

    Args:
        policy: The model.
        tokenizer: Its tokenizer, with the chat template.
        prompts: Conversations that end with the user's turn.
        temperature: Sampling temperature; 0 for the likeliest turn.
    """
    tokens = tokenize(tokenizer, [render_chat(tokenizer, turns, generation=True) for turns in prompts])
    requests = [Request(ids, 1, seed) for seed, ids in enumerate(tokens)]
    groups = LocalSampler(policy, tokenizer).sample(requests, SamplingConfig(temperature=temperature, max_tokens=48))
    return [r.text if r.finish == "end" else "" for group in groups for r in group.rollouts]


def last_line_of(check: str) -> str:
    """Return the last line of a check."""
    return check.rsplit("\n", 1)[-1]


def is_right(text: str, row: Mapping[str, str]) -> bool:
    """Return True if the last line of an answer is the sum."""
    return text.rsplit("\n", 1)[-1] == row["answer"]


def _then(turns: Sequence[Message], written: str, asked: str) -> list[Message]:
    """Return a conversation with what the model wrote, and the user's next request.

    A turn that did not end is empty, which templates refuse: it counts as a question mark.
    """
    return [*turns, {"role": "assistant", "content": written or "?"}, {"role": "user", "content": asked}]


def _share(cases: Sequence[bool]) -> float | None:
    return round(sum(cases) / len(cases), 4) if cases else None
