r"""Rewards that compare the answer in a completion with a label, or with the other completions of the prompt.

Sources: answers right or wrong as the reward, arXiv 2501.12948 section 2.2.2; agreement without labels, arXiv
2504.16084 (majority).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar, Literal

from pydantic import Field

from posttrain.config.rewards import EXTRACT, Extract, Form, RewardTermConfig
from posttrain.core.errors import MissingExtraError
from posttrain.rewards.answer_extraction import ExtractedAnswer, bare_text, find, normal
from posttrain.rewards.math_equality import equal_expressions, import_math_verify, is_mathematics
from posttrain.rewards.number_reading import answer_number, number_of
from posttrain.rewards.option_reading import option_of
from posttrain.rewards.outcome import ExampleRow, LabelError, labels
from posttrain.rewards.reward import Reward, RewardFunctions


class LabelledConfig(RewardTermConfig):
    """Settings of rewards that compare the answer with a label."""

    extract: Extract = Field("auto", description=EXTRACT)
    label: str = Field("answer", description="Column of the example with the right answer, or a list of right answers.")


class Exact(Reward):
    """Return 1 if the answer is one of the labels, apart from spaces, quotes and a final full stop, else 0."""

    class Config(LabelledConfig):
        """1 if the answer is the label, else 0; spaces, quotes and a final full stop do not count."""

        kind: Literal["exact"] = "exact"
        ignore_case: bool = Field(True, description="Upper and lower case are the same.")

    config: Config

    def __call__(self, text: str, example: ExampleRow) -> float:
        """Compare the answer. Raises LabelError without a label."""
        config = self.config
        right = [normal(label, config.ignore_case) for label in labels(example, config.label)]
        answer = find(text, config.extract)
        return float(answer is not None and normal(answer.text, config.ignore_case) in right)


class Numeric(Reward):
    """Return 1 if |answer - label| <= tolerance + relative * |label|, in exact arithmetic.

    Another number gets `partial`, an answer without a number 0.
    """

    class Config(LabelledConfig):
        """1 if the number of the answer is that of the label, else 0."""

        kind: Literal["numeric"] = "numeric"
        tolerance: float = Field(0.0, ge=0, description="Largest absolute difference that counts as right.")
        relative: float = Field(
            0.0, ge=0, description="Largest difference as a share of the label; added to tolerance."
        )
        partial: float = Field(0.0, description="For an answer that is a number, but not the right one (ReFT: 0.1).")

    config: Config

    def __call__(self, text: str, example: ExampleRow) -> float:
        """Compare the number. Raises LabelError if a label is not one number (after ####, if it has that)."""
        config, right = self.config, []
        for label in labels(example, config.label):
            number = answer_number(label_answer(label), True)
            if number is None:
                raise LabelError(f"label {config.label!r} is {label[:80]!r}: expected one number, and nothing else")
            right.append(number)
        answer = find(text, config.extract)
        value = None if answer is None else answer_number(answer.text, answer.marked)
        if value is None:
            return 0.0
        close = any(value.equals(r, config.tolerance, config.relative) for r in right)
        return 1.0 if close else config.partial


class Choice(Reward):
    """Return 1 if the answer names the right option by letter or text; 0 if it names none or several."""

    class Config(LabelledConfig):
        """1 if the answer names the right option, by its letter or its text, else 0."""

        kind: Literal["choice"] = "choice"
        options: str = Field("choices", description="Column with the texts of the options, if the examples have one.")
        letters: int = Field(26, ge=2, le=26, description="Number of options if the example lists none.")

    config: Config

    def __call__(self, text: str, example: ExampleRow) -> float:
        """Compare the option.

        The label is a letter, the text of an option, or (a number that is no option's text) its index from 0. Raises
        LabelError for another label.
        """
        config = self.config
        listed = example.get(config.options)
        options = [str(o) for o in listed] if isinstance(listed, list | tuple) else []
        count = len(options) or config.letters
        right = set()
        for label in labels(example, config.label):
            index = option_of(label, options, count)
            if index is None and re.fullmatch(r"[0-9]{1,2}", label) and int(label) < count:
                index = int(label)
            if index is None:
                expected = options or f"A to {chr(64 + count)}"
                raise LabelError(f"label {config.label!r} is {label[:80]!r}: expected one of {expected}")
            right.add(index)
        answer = find(text, config.extract)
        return float(answer is not None and option_of(answer.text, options, count) in right)


def label_answer(label: str) -> str:
    """Return the answer of a label that contains its worked solution."""
    answer = find(label, "auto")
    return answer.text if answer is not None and answer.marked else label


class Math(Reward):
    r"""Return 1 if math-verify finds the answer equal to a label: 1/2 and 0.5, (x+1)^2 and x^2+2x+1, 50% and 0.5.

    A marked answer is read whole: "3 or 4" in a box is the set {3, 4}, and not 4. Of an unmarked last line the last
    expression is read. Units are dropped, decimals compare to 6 places. An answer that can't be read as mathematics, or
    has over 1,000 characters, is wrong. An expression that only repeats the question (2+3 for 5) is equal too: use
    `numeric` if that must not pay.
    """

    class Config(LabelledConfig):
        """1 if math-verify finds the answer mathematically equal to the label, else 0."""

        in_worker: ClassVar[bool] = True
        cut_off_is_wrong: ClassVar[bool] = True
        kind: Literal["math"] = "math"

    config: Config

    def open(self, functions: RewardFunctions) -> None:
        """Import math-verify."""
        import_math_verify()

    def __call__(self, text: str, example: ExampleRow) -> float:
        """Compare the expressions. Raises LabelError if a label can't be read."""
        answer = find(text, self.config.extract)
        golds = [label_answer(label) for label in labels(example, self.config.label)]
        for gold in golds:
            if not is_mathematics(gold):
                raise LabelError(f"label {self.config.label!r} is {gold[:80]!r}: neither a number nor an expression")
        return float(answer is not None and any(equal_expressions(gold, answer) for gold in golds))


class ReasoningGym(Reward):
    """Return the item's own score_answer of the extracted answer, in [0, 1]; 0 without an answer."""

    class Config(RewardTermConfig):
        """The item's own score, by reasoning-gym (examples from a reasoning-gym task)."""

        in_worker: ClassVar[bool] = True
        cut_off_is_wrong: ClassVar[bool] = True
        kind: Literal["reasoning_gym"] = "reasoning_gym"
        extract: Extract = Field("auto", description=EXTRACT)
        full_only: bool = Field(
            False,
            description="Count a score below 1 as 0: many tasks give some credit to any text with the answer in it.",
        )

    config: Config

    def open(self, functions: RewardFunctions) -> None:
        """Import reasoning-gym."""
        try:
            import reasoning_gym  # noqa: F401
        except ImportError as error:
            raise MissingExtraError("reasoning-gym is not installed: pip install 'posttrain[reasoning]'") from error

    def __call__(self, text: str, example: ExampleRow) -> float:
        """Score the answer. Raises LabelError if the example is not a reasoning-gym item."""
        entry = example.get("entry")
        if not isinstance(entry, Mapping) or "answer" not in entry or not example.get("task"):
            raise LabelError(
                f"expected an example of a reasoning-gym task (with task and entry), got {sorted(example)}"
            )
        answer = find(text, self.config.extract)
        if answer is None:
            return 0.0
        score = float(_gym_scorer(str(example["task"]))(answer.text, dict(entry)))
        return float(score >= 1.0) if self.config.full_only else score


@lru_cache(maxsize=64)
def _gym_scorer(name: str) -> Callable[..., float]:
    from reasoning_gym.factory import get_score_answer_fn

    return get_score_answer_fn(name)  # type: ignore[no-any-return]


class SelfConsistency(Reward):
    """Return the agreement of each completion with the others of the prompt.

    share: (others with the same answer) / (G - 1). majority: 1 for the most frequent answer, or all that tie for it. A
    completion without an answer agrees with none and gets 0, and counts among the G. No two alike: 0 for all, in
    majority too.
    """

    class Config(RewardTermConfig):
        """Agreement with the other completions of the same prompt; needs no label."""

        form: ClassVar[Form] = "group"
        compares_completions: ClassVar[bool] = True
        needs_several: ClassVar[bool] = True
        kind: Literal["self_consistency"] = "self_consistency"
        extract: Extract = Field("auto", description=EXTRACT)
        compare: Literal["auto", "math"] = Field(
            "auto", description="auto: as numbers if both are numbers, else as text; math: by math-verify."
        )
        mode: Literal["share", "majority"] = Field(
            "share",
            description="share: of the others with the same answer; majority: 1 for the most frequent answer.",
        )

        @property
        def in_worker(self) -> bool:
            """Return True if math-verify compares."""
            return self.compare == "math"

    config: Config

    def open(self, functions: RewardFunctions) -> None:
        """Import math-verify if it compares."""
        if self.config.compare == "math":
            import_math_verify()

    def __call__(self, texts: Sequence[str], example: ExampleRow) -> list[float]:
        """Compare all completions. Raises ValueError for a group of one."""
        if len(texts) < 2:
            raise ValueError("self_consistency compares the completions of a prompt: expected two or more, got one")
        answers = [find(text, self.config.extract) for text in texts]
        keys = [None if a is None else self._key(a) for a in answers]
        counts = Counter(k for k in keys if k is not None)
        alike = counts.copy()
        if self.config.compare == "math":
            first = {k: a for k, a in zip(keys, answers, strict=True) if a is not None}
            different = sorted(counts, key=str)
            for i, one in enumerate(different):  # every pair, since math-verify is not transitive
                for two in different[i + 1 :]:
                    a, b = first[one], first[two]
                    if equal_expressions(bare_text(a.text), b) or equal_expressions(bare_text(b.text), a):
                        alike[one] += counts[two]
                        alike[two] += counts[one]
        if self.config.mode == "share":
            return [0.0 if k is None else (alike[k] - 1) / (len(texts) - 1) for k in keys]
        top = max(alike.values(), default=0)
        return [float(k is not None and top > 1 and alike[k] == top) for k in keys]

    def _key(self, answer: ExtractedAnswer) -> Any:
        return answer_key(answer) if self.config.compare == "auto" else normal(answer.text)


def answer_key(answer: ExtractedAnswer) -> Any:
    """Return what answers that count as the same have in common: the number, or the text without case and spacing."""
    number = number_of(answer)
    return normal(answer.text) if number is None else number


def same_answer(one: str, two: str, extract: Extract = "auto") -> bool:
    """Return True if two completions have the same final answer; False if one of them has none.

    Args:
        one: A completion.
        two: Another one.
        extract: Where the answer is.
    """
    answers = [find(text, extract) for text in (one, two)]
    keys = [None if a is None else answer_key(a) for a in answers]
    return keys[0] is not None and keys[0] == keys[1]
