"""The judge: pairs in both orders, or answers one by one, into soft labels."""

from __future__ import annotations

import logging
import math
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from posttrain.config import JudgeConfig
from posttrain.core.errors import RecipeError
from posttrain.core.files import cache_folder, named_path
from posttrain.data.comparisons import AnswerPair, Prompt
from posttrain.judge.answer_store import Store
from posttrain.judge.asker import Asker, JudgeAnswer, JudgeBackend, JudgeRequest
from posttrain.judge.judge_prompts import messages, question, read_label
from posttrain.judge.local_judge import LocalJudge
from posttrain.judge.principles import by_content, read_principles
from posttrain.judge.server_judge import RemoteJudge

log = logging.getLogger("posttrain")
EDGE = 1e-6
"""Probabilities are kept this far from 0 and 1 where their logits are taken."""
OPPOSED = "means and most scores drawn say the opposite"
"""Why a pair gets no label whose one answer has the higher expected score, and its other the likelier higher score."""
TIE = 1e-6
"""Nearer to one half than this is one half: float32 probabilities are no better."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One answer of the judge. probabilities: of its labels, summing to 1. mass: what they summed to before; None
    where they were read from its text."""

    probabilities: dict[str, float]
    mass: float | None
    rationale: str = ""


@dataclass(frozen=True, slots=True)
class AnswerScore:
    """expectation: of the score; None where there is no verdict, and why says why. tokens: read and written for it."""

    expectation: float | None
    verdict: Verdict | None = None
    why: str = ""
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class JudgedPair:
    """A pair with its label. p_a: the probability that a is better; margin: a over b, in points of the score, or
    2 p_a - 1. orders: p_a where a stood first, and where b did (pairwise). scores: of a and b. p_a is None where there
    is no label, and why says why."""

    pair: AnswerPair
    p_a: float | None
    margin: float = 0.0
    orders: tuple[float, float] | None = None
    scores: tuple[float, float] | None = None
    mass: float | None = None
    principles: tuple[int, ...] = ()
    rationales: tuple[str, ...] = ()
    why: str = ""


OnQuestions = Callable[[int, int], None]
"""Called with (questions answered, questions in this turn)."""


@dataclass
class Judge:
    """A judge with its store open. counts: answers that could not be read, questions refused."""

    config: JudgeConfig
    asker: Asker
    principles: Sequence[str] = ()
    counts: Counter[str] = field(default_factory=Counter)

    @classmethod
    def open(cls, config: JudgeConfig, name: str = "judge") -> Judge:
        """Open a judge with its store; `name` is that of its stage or reward, in messages.

        Raises:
            RecipeError, DataError, ServerError, CheckpointError: The principles, the key or the store can't be used.
        """
        principles = read_principles(config.principles) if config.principles is not None else []
        if config.principles_per_question > len(principles):
            raise RecipeError(
                f"principles_per_question is {config.principles_per_question}, and {config.principles} holds "
                f"{len(principles)}"
            )
        if config.template is not None:
            _warn_without_mark(name, config.template)
        backend: JudgeBackend
        if config.server is not None:
            backend = RemoteJudge(config.server)
        else:
            assert config.model is not None
            backend = LocalJudge(config.model)
        path = named_path(config.store) if config.store else cache_folder() / "judge.sqlite3"
        return cls(config, Asker(backend, Store(path)), principles)

    def close(self) -> None:
        """Close the store."""
        self.asker.store.close()

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def compare(self, pairs: Sequence[AnswerPair], on_done: OnQuestions | None = None) -> list[JudgedPair]:
        """Label every pair, in order; a pair without a label has p_a None, and the reason in `why`.

        pairwise: P(a) is the mean of both orders (or of their logits, `combine`). score: the probability that a score
        drawn for a is higher than one drawn for b; half of the ties count for each side.
        """
        if self.config.mode == "score":
            return self._by_score(pairs, on_done)
        questions, drawn = [], []
        for p in pairs:
            chosen = self._draw(p.prompt, sorted((p.a, p.b)))
            drawn.append(chosen)
            listed = [self.principles[i] for i in chosen]
            questions += [question(self.config, p.prompt, order, listed) for order in ((p.a, p.b), (p.b, p.a))]
        verdicts = self._verdicts(questions, self.config.labels, on_done)
        out = []
        for i, pair in enumerate(pairs):
            (one, why, _), (two, also, _) = verdicts[2 * i], verdicts[2 * i + 1]
            if one is None or two is None:
                out.append(JudgedPair(pair, None, why=why or also))
                continue
            first, second = self.config.labels
            orders = one.probabilities[first], two.probabilities[second]
            p_a = combined(orders, self.config.combine)
            masses = [v.mass for v in (one, two) if v.mass is not None]
            mass = sum(masses) / len(masses) if masses else None
            explained = tuple(v.rationale for v in (one, two) if v.rationale)
            out.append(JudgedPair(pair, p_a, 2 * p_a - 1, orders, None, mass, drawn[i], explained))
        return out

    def score(
        self, prompts: Sequence[Prompt], answers: Sequence[str], on_done: OnQuestions | None = None
    ) -> list[AnswerScore]:
        """Return the expected score of each answer over the probabilities of the scale (or the score in its text).

        Args:
            prompts: The prompts.
            answers: An answer to each.
            on_done: Called as questions are answered.

        Raises:
            RecipeError: The judge is pairwise.
        """
        if self.config.mode != "score":
            raise RecipeError("this judge compares pairs; to score single answers it needs judge.mode=score")
        drawn = [self._draw(prompt, [answer]) for prompt, answer in zip(prompts, answers, strict=True)]
        return self._scores(prompts, answers, drawn, on_done)

    def _scores(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[str],
        drawn: Sequence[Sequence[int]],
        on_done: OnQuestions | None,
    ) -> list[AnswerScore]:
        """`score` by the principles with these numbers."""
        questions = [
            question(self.config, prompt, [answer], [self.principles[i] for i in numbers])
            for prompt, answer, numbers in zip(prompts, answers, drawn, strict=True)
        ]
        out = []
        for verdict, why, tokens in self._verdicts(questions, tuple(self.config.scale), on_done):
            if verdict is None:
                out.append(AnswerScore(None, None, why, tokens))
            else:
                mean = sum(self.config.scale[s] * p for s, p in verdict.probabilities.items())
                out.append(AnswerScore(mean, verdict, "", tokens))
        return out

    def _by_score(self, pairs: Sequence[AnswerPair], on_done: OnQuestions | None) -> list[JudgedPair]:
        both = [(p.prompt, t) for p in pairs for t in (p.a, p.b)]
        drawn = [self._draw(p.prompt, sorted((p.a, p.b))) for p in pairs]  # both answers by the same principles
        twice = [numbers for numbers in drawn for _ in range(2)]
        scores = self._scores([x for x, _ in both], [t for _, t in both], twice, on_done)
        out = []
        for i, pair in enumerate(pairs):
            a, b = scores[2 * i], scores[2 * i + 1]
            if a.verdict is None or b.verdict is None or a.expectation is None or b.expectation is None:
                out.append(JudgedPair(pair, None, why=a.why or b.why))
                continue
            p_a = above(a.verdict.probabilities, b.verdict.probabilities, self.config.scale)
            masses = [v.mass for v in (a.verdict, b.verdict) if v.mass is not None]
            mass = sum(masses) / len(masses) if masses else None
            margin, explained = a.expectation - b.expectation, (a.verdict.rationale, b.verdict.rationale)
            rationales, means = explained if any(explained) else (), (a.expectation, b.expectation)
            if (p_a - 0.5) * margin < 0:  # as where people's means say one thing and most pairs of ratings the other
                out.append(JudgedPair(pair, None, margin, None, means, mass, drawn[i], rationales, OPPOSED))
                continue
            out.append(JudgedPair(pair, p_a, margin, None, means, mass, drawn[i], rationales))
        return out

    def _draw(self, prompt: Prompt, answers: Sequence[str]) -> tuple[int, ...]:
        """Numbers of the principles of a question: by its content and the seed, whatever else is asked."""
        wanted = self.config.principles_per_question
        if not wanted:
            return tuple(range(len(self.principles)))
        rng = by_content(self.config.seed, prompt, list(answers))
        return tuple(sorted(int(i) for i in rng.choice(len(self.principles), wanted, replace=False)))

    def _verdicts(
        self, questions: Sequence[str], labels: Sequence[str], on_done: OnQuestions | None
    ) -> list[tuple[Verdict | None, str, int]]:
        """(verdict, "", tokens) of each question, or (None, why not, tokens): all that were read and written for it."""
        config = self.config
        rationales: list[JudgeAnswer | None] = [None] * len(questions)
        if config.rationale:
            first = [JudgeRequest(messages(config, q, "")[:1], (), config.rationale) for q in questions]
            rationales = list(self.asker(first, _counter(on_done, len(first))))
        out: list[tuple[Verdict | None, str]] = [(None, "")] * len(questions)
        tokens = [0 if r is None else r.prompt_tokens + r.completion_tokens for r in rationales]
        left = []
        asks: dict[int, JudgeRequest] = {}
        for i, q in enumerate(questions):
            r = rationales[i]
            if r is not None and r.refused:
                self.counts["refused"] += 1
                out[i] = (None, f"refused: {r.refused}")
                continue
            turns = messages(config, q, None if r is None else r.text)
            asks[i] = JudgeRequest(turns, tuple(labels), config.answer_tokens, 0, config.opening, config.seed)
            left.append(i)
        for attempt in range(config.attempts):
            if not left:
                break
            answers = self.asker([replace(asks[i], attempt=attempt) for i in left], _counter(on_done, len(left)))
            unread = []
            for i, answer in zip(left, answers, strict=True):
                tokens[i] += answer.prompt_tokens + answer.completion_tokens
                explained = rationales[i]
                verdict = _verdict(answer, labels, "" if explained is None else explained.text)
                if answer.refused:
                    self.counts["refused"] += 1
                    out[i] = (None, f"refused: {answer.refused}")
                elif verdict is None:
                    self.counts["unreadable"] += 1
                    out[i] = (None, f"no verdict in {config.attempts} answers; the last: {answer.text[:200]!r}")
                    unread.append(i)
                else:
                    out[i] = (verdict, "")
            left = unread
        return [(verdict, why, count) for (verdict, why), count in zip(out, tokens, strict=True)]


@cache
def _warn_without_mark(name: str, template: str) -> None:
    """Warn of a template by which an answer can pretend that it ends; once for each name."""
    if "mark" not in {field for _, field, _, _ in string.Formatter().parse(template)}:
        log.warning(
            "%s: the judge's template does not mark where a text ends, so an answer can pretend that it ends and that "
            "the judge begins to speak: write <{mark}> before each text and </{mark}> after it (docs/feedback.md)",
            name,
        )


def _counter(on_done: OnQuestions | None, total: int) -> Callable[[int], None] | None:
    return None if on_done is None else lambda done: on_done(done, total)


def _verdict(answer: JudgeAnswer, labels: Sequence[str], rationale: str) -> Verdict | None:
    if answer.probabilities is not None:
        mass = sum(answer.probabilities.values())
        if mass > 0:
            return Verdict({x: answer.probabilities[x] / mass for x in labels}, mass, rationale)
    label = read_label(answer.text, labels)
    return None if label is None else Verdict({x: float(x == label) for x in labels}, None, rationale)


def combined(orders: tuple[float, float], how: str) -> float:
    """Combine the probabilities of both orders. probabilities: (p + q) / 2. logits: sigma((logit p + logit q) / 2).

    A judge whose logit is its opinion of the answers plus a constant for the first place loses the constant by the
    second; by the first only its sign is right. Probabilities of 0 and 1 count as 1e-6 and 1 - 1e-6 for their logits.
    """
    if how == "probabilities":
        return _tied(sum(orders) / 2)
    p, q = (min(max(x, EDGE), 1 - EDGE) for x in orders)
    return _tied(1 / (1 + math.exp(-(math.log(p / (1 - p)) + math.log(q / (1 - q))) / 2)))


def _tied(p: float) -> float:
    """One half where p is that but for rounding: a judge that says the same of both prefers neither."""
    return 0.5 if abs(p - 0.5) < TIE else p


def above(a: Mapping[str, float], b: Mapping[str, float], worth: Mapping[str, float]) -> float:
    """Compute P(score of a > score of b) + P(equal) / 2 for two independent distributions over a scale.

    Hand-worked: a all on 7, b half on 6 and half on 7: 1/2 + 1/4 = 0.75.

    Args:
        a: Probability of each label for a.
        b: The same for b.
        worth: Number of each label.
    """
    pairs = ((p * q, worth[x], worth[y]) for x, p in a.items() for y, q in b.items())
    return _tied(sum(w if x > y else w / 2 if x == y else 0.0 for w, x, y in pairs))


def describe(config: JudgeConfig) -> dict[str, Any]:
    """Return the description of a judge for the report."""
    if config.server is not None:
        named = {"kind": "server", "model": config.server.model, "base_url": config.server.base_url}
    else:
        assert config.model is not None
        named = {"kind": "local", "model": config.model.source}
    return {**named, "mode": config.mode, "rationale": bool(config.rationale), "combine": config.combine}
