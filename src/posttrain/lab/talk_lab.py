"""Base of the laboratories whose model checks answers better than it answers: talks, tokenizer's template, measurement.

The tokenizer has a chat template, so that a talk of answer, check and another answer is a conversation.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from posttrain.config import SamplingConfig
from posttrain.core.files import write_text
from posttrain.core.types import Message, Sample
from posttrain.data.chat_template import render_chat
from posttrain.data.synthetic.refine_talks import AGAIN, CHECK, RIGHT
from posttrain.data.tokenizing import tokenize
from posttrain.lab.lab_settings import END, LabSettings, byte_level_bpe
from posttrain.models.language_model import LanguageModel
from posttrain.sampling.engine import LocalSampler
from posttrain.sampling.protocol import Request

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<' + m.content + '" + END + "' }}"
    "{% else %}{{ '>' + m.content + '\\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<' }}{% endif %}"
)


def written_talk(talk: Sequence[Message]) -> str:
    """Return a talk as the chat template writes it, which takes a tenth of the template's time."""
    return "".join(
        f"<{turn['content']}{END}" if turn["role"] == "assistant" else f">{turn['content']}\n" for turn in talk
    )


class TalkLab:
    """Hold what laboratories of talks share; a subclass has the talks and the problems.

    Attributes:
        steps: Pretraining steps.
        batch_size: Talks of a step.
        longest: Most tokens of a turn when the model is measured.
        answers_alone: Loss on the tokens of the model's turns alone; else on every token but the first.
        talks_read: Talks that the tokenizer is made of.
        vocabulary: Most tokens that it has.
        digits: Every digit is a token.
        apart: Pattern of what stays apart from the text around it.
    """

    steps: ClassVar[int] = 800
    batch_size: ClassVar[int] = 48
    longest: ClassVar[int] = 48
    answers_alone: ClassVar[bool] = False
    talks_read: ClassVar[int] = 8000
    vocabulary: ClassVar[int] = 512
    digits: ClassVar[bool] = False
    apart: ClassVar[str | None] = None

    def __init__(self, settings: LabSettings, tokenizer: Any = None) -> None:
        self.settings, self.tokenizer = settings, tokenizer or self.make_tokenizer()

    @classmethod
    def make_tokenizer(cls) -> Any:
        """Make the tokenizer of the first talks of seed 0, the same for every seed."""
        texts = (written_talk(cls.talk_at(0, i)) for i in range(cls.talks_read))
        tokenizer = byte_level_bpe(texts, cls.vocabulary, min_frequency=20, digits=cls.digits, apart=cls.apart)
        tokenizer.chat_template = CHAT_TEMPLATE
        return tokenizer

    @staticmethod
    def talk_at(seed: int, index: int) -> list[Message]:
        """Return a talk of the corpus `seed`."""
        raise NotImplementedError

    @staticmethod
    def rows(seed: int, count: int, held_out: bool) -> list[dict[str, Any]]:
        """Return problems: prompt, and what `is_right` needs.

        Args:
            seed: Seed of the draw.
            count: Number of problems.
            held_out: Take those that are in no talk.
        """
        raise NotImplementedError

    @staticmethod
    def is_right(text: str, row: Mapping[str, Any]) -> bool:
        """Return True if an answer is right."""
        raise NotImplementedError

    def batch(self, step: int) -> list[Sample]:
        """Return the talks of a pretraining step; none is repeated."""
        size = self.settings.batch_size
        talks = [self.talk_at(self.settings.seed, i) for i in range(step * size, (step + 1) * size)]
        if not self.answers_alone:
            encoded = self.tokenizer([written_talk(talk) for talk in talks])["input_ids"]
            return [Sample(ids, [0.0] + [1.0] * (len(ids) - 1)) for ids in encoded]
        turns = self.tokenizer([written_talk([turn]) for talk in talks for turn in talk])["input_ids"]
        encoded_turns = iter(turns)
        out = []
        for talk in talks:
            tokens, weights = list[int](), list[float]()
            for turn, ids in zip(talk, encoded_turns, strict=False):
                tokens += ids
                weights += [0.0, *[float(turn["role"] == "assistant")] * (len(ids) - 1)]
            out.append(Sample(tokens, weights))
        return out

    def measure(self, policy: LanguageModel) -> dict[str, Any]:
        """Return shares on held-out problems; all but `sampled` by the likeliest answers.

        first, sampled: right first answers. check: checks whose verdict is true; check_of_right, check_of_wrong: of
        right and of wrong answers. refined: right answers after one check, and another answer where it found something.
        corrected: right ones among the answers after wrong ones that the check found. again: right answers to the
        request for another answer without a check.
        """
        rows = self.rows(self.settings.seed, self.settings.measured, True)

        def written(talk: Sequence[Sequence[Message]], temperature: float = 0.0) -> list[str]:
            return likeliest(policy, self.tokenizer, talk, temperature, self.longest)

        def right_of(texts: Sequence[str]) -> list[bool]:
            return [self.is_right(text, row) for text, row in zip(texts, rows, strict=True)]

        asked: list[list[Message]] = [[{"role": "user", "content": row["prompt"]}] for row in rows]
        first = written(asked)
        sampled = written(asked, 1.0)
        talk = [_then(before, text, CHECK) for before, text in zip(asked, first, strict=True)]
        checks = written(talk)
        revised = written([_then(before, c, AGAIN) for before, c in zip(talk, checks, strict=True)])
        again = written([_then(before, c, AGAIN) for before, c in zip(asked, first, strict=True)])
        accepts = [last_line_of(c) == RIGHT for c in checks]
        cases = list(zip(right_of(first), accepts, right_of(revised), strict=True))
        return {
            "first": _share(right_of(first)),
            "sampled": _share(right_of(sampled)),
            "check": _share([was == accepted for was, accepted, _ in cases]),
            "check_of_right": _share([accepted for was, accepted, _ in cases if was]),
            "check_of_wrong": _share([not accepted for was, accepted, _ in cases if not was]),
            "refined": _share([was if accepted else after for was, accepted, after in cases]),
            "corrected": _share([after for was, accepted, after in cases if not was and not accepted]),
            "again": _share(right_of(again)),
            **self.measure_more(asked, first, written, right_of),
            "measured": len(rows),
        }

    def measure_more(
        self,
        asked: Sequence[list[Message]],
        first: Sequence[str],
        written: Callable[[Sequence[Sequence[Message]]], list[str]],
        right_of: Callable[[Sequence[str]], list[bool]],
    ) -> dict[str, Any]:
        """Return what a laboratory measures besides.

        Args:
            asked: The held-out problems as conversations.
            first: The likeliest first answers.
            written: Returns the likeliest next turn of conversations.
            right_of: Returns which answers are right.
        """
        return {}

    def write(self, folder: Path) -> None:
        """Write problems.jsonl to train on, and held_out.jsonl, which is in no talk."""
        s = self.settings
        for name, count, held_out in (("problems", s.train_problems, False), ("held_out", s.held_out_problems, True)):
            rows = self.rows(s.seed, count, held_out)
            write_text(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    problems_name: ClassVar[str] = "problems"

    @classmethod
    def describe(cls, result: Mapping[str, Any]) -> str:
        """Return a sentence about the measurement."""
        return (
            f"Right on {result['measured']} held-out {cls.problems_name}: {result['first']:.1%} at first, "
            f"{result['refined']:.1%} after a check and another answer, {result['again']:.1%} after another answer "
            f"without a check; {result['check']:.1%} of its checks are right. Problems are in the folder."
        )


def likeliest(
    policy: LanguageModel,
    tokenizer: Any,
    prompts: Sequence[Sequence[Message]],
    temperature: float = 0.0,
    longest: int = 48,
) -> list[str]:
    """Return the model's next turn of each conversation; empty if it does not end.

    Args:
        policy: The model.
        tokenizer: Its tokenizer, with the chat template.
        prompts: Conversations that end with the user's turn.
        temperature: Sampling temperature; 0 for the likeliest turn.
        longest: Most tokens of a turn.
    """
    tokens = tokenize(tokenizer, [render_chat(tokenizer, turns, generation=True) for turns in prompts])
    requests = [Request(ids, 1, seed) for seed, ids in enumerate(tokens)]
    params = SamplingConfig(temperature=temperature, max_tokens=longest)
    groups = LocalSampler(policy, tokenizer).sample(requests, params)
    return [r.text if r.finish == "end" else "" for group in groups for r in group.rollouts]


def last_line_of(check: str) -> str:
    """Return the last line of a check."""
    return check.rsplit("\n", 1)[-1]


def _then(turns: Sequence[Message], written: str, asked: str) -> list[Message]:
    """Return a conversation with what the model wrote, and the user's next request.

    A turn that did not end is empty, which templates refuse: it counts as a question mark.
    """
    return [*turns, {"role": "assistant", "content": written or "?"}, {"role": "user", "content": asked}]


def _share(cases: Sequence[bool]) -> float | None:
    return round(sum(cases) / len(cases), 4) if cases else None
