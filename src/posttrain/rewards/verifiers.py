r"""The rewards themselves: each setting becomes a function of text and example, of a group, or of a batch of pairs.

Sources: answers right or wrong as the reward, arXiv 2501.12948 section 2.2.2; format, the same; length, DAPO,
arXiv 2503.14476 eq. 13; agreement without labels, arXiv 2504.16084 (majority).
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal

from posttrain import sandbox
from posttrain.config import rewards as c
from posttrain.core.errors import MissingExtraError, RewardError
from posttrain.core.imports import load_object
from posttrain.rewards import programs
from posttrain.rewards import step_rewards as by_step
from posttrain.rewards.answer_extraction import Answer, find, letter_of, normal, number_of, numbers_in, plain
from posttrain.rewards.outcome import Example, LabelError, labels

Form = Literal["each", "group", "batch"]
LONGEST = 1000
"""Characters of an expression that are read as mathematics; deep brackets would only time out."""


@dataclass(frozen=True, slots=True)
class Component:
    """One reward, ready to be called. isolated: in a worker process, since it may hang (``function`` is None here)."""

    name: str
    weight: float
    form: Form
    isolated: bool
    function: Callable[..., Any] | None
    config: c.RewardConfig

    @property
    def stepwise(self) -> bool:
        """Whether it returns steps in place of a number."""
        return c.judges_steps(self.config)


# --- right or wrong ---------------------------------------------------------------------------------------------------


def exact(text: str, example: Example, config: c.ExactConfig) -> float:
    """1 where the answer, but for spaces and typesetting, is one of the labels. No answer: 0. No label: LabelError."""
    right = [normal(label, config.ignore_case) for label in labels(example, config.label)]
    answer = find(text, config.extract)
    return float(answer is not None and normal(answer.text, config.ignore_case) in right)


def numeric(text: str, example: Example, config: c.NumericConfig) -> float:
    """1 where |answer - label| <= tolerance + relative * |label|, in exact arithmetic; `partial` for another number.

    No number: 0.

    Raises LabelError where a label is not one number (after #### where it has that).
    """
    right = []
    for label in labels(example, config.label):
        found = numbers_in(_gold(label))
        if len(found) != 1:
            raise LabelError(f"label {config.label!r} is {label[:80]!r}: expected one number in it, found {len(found)}")
        right.append(found[0])
    answer = find(text, config.extract)
    value = None if answer is None else number_of(answer)
    if value is None:
        return 0.0
    close = any(abs(value - r) <= config.tolerance + config.relative * abs(r) for r in right)
    return 1.0 if close else config.partial


def choice(text: str, example: Example, config: c.ChoiceConfig) -> float:
    """1 where the answer names the right option by letter or text. None or several named: 0.

    The label is a letter, an option's text, or (a number, where no option reads so) its index from 0. Raises
    LabelError where it is none of these.
    """
    listed = example.get(config.options)
    options = [str(o) for o in listed] if isinstance(listed, list | tuple) else []
    count = len(options) or config.letters
    right = set()
    for label in labels(example, config.label):
        index = letter_of(label, options, count)
        if index is None and re.fullmatch(r"[0-9]{1,2}", label) and int(label) < count:
            index = int(label)
        if index is None:
            raise LabelError(
                f"label {config.label!r} is {label[:80]!r}: expected one of {options or f'A to {chr(64 + count)}'}"
            )
        right.add(index)
    answer = find(text, config.extract)
    return float(answer is not None and letter_of(answer.text, options, count) in right)


def _gold(label: str) -> str:
    """What a label says that carries its solution with it."""
    answer = find(label, "auto")
    return answer.text if answer is not None and answer.marked else label


def math(text: str, example: Example, config: c.MathConfig) -> float:
    r"""1 where math-verify holds the answer for equal to a label: 1/2 and 0.5, (x+1)^2 and x^2+2x+1, 50% and 0.5.

    A marked answer is read whole: "3 or 4" in a box is the set {3, 4}, and not 4. Of an unmarked last line the last
    expression is read. Units go, decimals compare to 6 places. What can't be read as mathematics is wrong: 0. An
    expression that only says the question again (2+3 for 5) is equal too: use `numeric` where that pays. An answer of
    over 1,000 characters is wrong. Raises LabelError where a label can't be read.
    """
    answer = find(text, config.extract)
    golds = [_gold(label) for label in labels(example, config.label)]
    for gold in golds:
        if not _parsed(_tidy(gold), True):
            raise LabelError(f"label {config.label!r} is {gold[:80]!r}: math-verify reads no expression in it")
    return float(answer is not None and any(_equal(gold, answer) for gold in golds))


def _equal(gold: str, answer: Answer) -> bool:
    if normal(gold, ignore_case=False) == normal(answer.text, ignore_case=False):
        return True
    if len(answer.text) > LONGEST:
        return False
    from math_verify import verify

    right = _parsed(_tidy(gold), True)
    said = _parsed(_tidy(answer.text) if answer.marked else answer.text, answer.marked)
    return bool(verify(list(right), list(said), timeout_seconds=None))


def _tidy(text: str) -> str:
    """Thousands parted by spaces become one number (math-verify reads 1 234 as 1 + 234); mixed numbers become sums."""
    text = re.sub(r"(?<=[0-9])\\[,;:! ](?=[0-9]{3})", "", plain(text))  # thin spaces of typesetting
    text = re.sub(
        r"(?<![0-9.])([0-9]{1,3})((?:[ ~][0-9]{3})+)(?![0-9])", lambda m: m[1] + re.sub("[ ~]", "", m[2]), text
    )
    return re.sub(r"(?<![0-9.])([0-9]+) +([0-9]+) ?/ ?([0-9]+)(?![0-9])", r"\1\\frac{\2}{\3}", text)


@lru_cache(maxsize=256)
def _parsed(text: str, whole: bool) -> tuple[Any, ...]:
    # No time limit of its own: it would use signals, and swallow what it cuts off. The worker process has one.
    from math_verify import parse

    return tuple(parse(f"\\boxed{{{text}}}" if whole else text, parsing_timeout=None))


def reasoning_gym(text: str, example: Example, config: c.ReasoningGymRewardConfig) -> float:
    """The item's own score_answer of the extracted answer, in [0, 1]. No answer: 0. No item: LabelError."""
    entry = example.get("entry")
    if not isinstance(entry, Mapping) or "answer" not in entry or not example.get("task"):
        raise LabelError(f"expected an example of a reasoning-gym task (with task and entry), got {sorted(example)}")
    answer = find(text, config.extract)
    if answer is None:
        return 0.0
    score = float(_scorer(str(example["task"]))(answer.text, dict(entry)))
    return float(score >= 1.0) if config.full_only else score


@lru_cache(maxsize=64)
def _scorer(name: str) -> Callable[..., float]:
    try:
        from reasoning_gym.factory import get_score_answer_fn
    except ImportError as error:
        raise MissingExtraError("reasoning-gym is not installed: pip install 'posttrain[reasoning]'") from error
    return get_score_answer_fn(name)  # type: ignore[no-any-return]


# --- without a label --------------------------------------------------------------------------------------------------


def self_consistency(texts: Sequence[str], example: Example, config: c.SelfConsistencyConfig) -> list[float]:
    """share: (others with the same answer) / (G - 1). majority: 1 for the most frequent answer, all of those that tie.

    A completion without an answer agrees with none and gets 0, and counts among the G. No two alike: 0 for all, in
    majority too. Raises ValueError for a group of one, where nothing can agree.
    """
    if len(texts) < 2:
        raise ValueError("self_consistency compares the completions of a prompt: expected two or more, got one")
    answers = [find(text, config.extract) for text in texts]
    keys = [None if a is None else _key(a, config.compare) for a in answers]
    counts = Counter(k for k in keys if k is not None)
    alike = counts.copy()
    if config.compare == "math":
        first = {k: a for k, a in zip(keys, answers, strict=True) if a is not None}
        different = sorted(counts, key=str)
        for i, one in enumerate(different):  # every pair, since math-verify is not transitive
            for two in different[i + 1 :]:
                a, b = first[one], first[two]
                if _equal(plain(a.text), b) or _equal(plain(b.text), a):
                    alike[one] += counts[two]
                    alike[two] += counts[one]
    if config.mode == "share":
        return [0.0 if k is None else (alike[k] - 1) / (len(texts) - 1) for k in keys]
    top = max(alike.values(), default=0)
    return [float(k is not None and top > 1 and alike[k] == top) for k in keys]


def _key(answer: Answer, compare: str) -> Any:
    number = number_of(answer) if compare == "auto" else None
    return normal(answer.text) if number is None else number


def preference(
    prompts: Sequence[Any], texts: Sequence[str], scorer: Callable[..., Sequence[float]] | None = None
) -> Sequence[float]:
    """The scorer's numbers, as they are: no scaling, any range."""
    assert scorer is not None
    return scorer(prompts, texts)


# --- shape ------------------------------------------------------------------------------------------------------------


def format_tags(text: str, example: Example, tags: Sequence[str], opened: bool) -> float:
    """1 where every tag opens and closes once, in order, holds something, and only spaces stand outside; else 0."""
    marks = [m for tag in tags for m in (f"<{tag}>", f"</{tag}>")]
    text = marks[0] + text if opened else text
    if any(text.count(mark) != 1 for mark in marks):
        return 0.0
    at = [text.index(mark) for mark in marks]
    ends = [a + len(mark) for a, mark in zip(at, marks, strict=True)]
    outside = [text[: at[0]], *(text[e:a] for e, a in zip(ends[1:-1:2], at[2::2], strict=True)), text[ends[-1] :]]
    inside = [text[e:a] for e, a in zip(ends[::2], at[1::2], strict=True)]
    ordered = at == sorted(at)
    return float(ordered and not any(o.strip() for o in outside) and all(i.strip() for i in inside))


def format_pattern(text: str, example: Example, pattern: re.Pattern[str]) -> float:
    """1 where the whole text matches, else 0."""
    return float(pattern.fullmatch(text) is not None)


def length(text: str, example: Example, config: c.LengthConfig) -> float:
    """0 where the length L suits, down to -1.

    max and cache (DAPO): 0 for L <= max - cache; (max - cache - L) / cache up to max; -1 beyond. min and cache, the
    mirror image: 0 for L >= min + cache; (L - min - cache) / cache; -1 for L < min. target and width:
    -min(1, |L - target| / width). An empty completion has L = 0 (1 token where its end was sampled). Raises
    LabelError without a token count.
    """
    if config.unit == "tokens" and "completion_tokens" not in example:
        raise LabelError("length in tokens needs completion_tokens in the example, which a RewardStack puts there")
    size = int(example["completion_tokens"]) if config.unit == "tokens" else len(text)
    if config.target is not None:
        return -min(1.0, abs(size - config.target) / config.width)
    over = 0 if config.max is None else size - (config.max - config.cache)
    under = 0 if config.min is None else config.min + config.cache - size
    by = max(over, under, 0)
    return -min(1.0, by / config.cache if config.cache else float(by > 0))


def ended(text: str, example: Example, config: c.EndedConfig) -> float:
    """0 for an end of its own (an end token, a stop string, a finished environment), -1 where a limit cut it off.

    Models that judge a text don't see that it is unfinished: a policy that learns from one alone finds out that it need
    not end. Source: a fixed low reward without an end, arXiv 1909.08593 section 3.1, 2403.17031 section 7. Raises
    LabelError where the example does not say how the completion ended.
    """
    if "finish" not in example:
        raise LabelError("ended needs finish in the example, which a RewardStack puts there")
    return 0.0 if example["finish"] in ("end", "stop") else -1.0


# --- settings into functions ------------------------------------------------------------------------------------------

FORMS: dict[str, Form] = {
    "self_consistency": "group",
    "preference": "batch",
    "agreement": "group",
    "judge": "batch",
    "reward_model": "batch",
    "process_reward": "batch",
}
MODELS = {
    "judge": "posttrain.judge.judge_reward:judge",
    "reward_model": "posttrain.rewards.reward_model_scorer:RewardModel.of",
    "process_reward": "posttrain.rewards.reward_model_scorer:ProcessReward.of",
}
"""Where the rewards that are models are made, of their settings. Models lie above rewards and are not imported here:
named like a function of the user's, they are loaded when a stack is built that has such a part."""
LABELLED: dict[str, Callable[..., Any]] = {
    "math": math,
    "exact": exact,
    "numeric": numeric,
    "choice": choice,
    "reasoning_gym": reasoning_gym,
    "self_consistency": self_consistency,
    "program": programs.program,
    "unit_tests": programs.unit_tests,
    "valid_steps": by_step.valid_steps,
    "agreement": by_step.agreement,
    "length": length,
    "ended": ended,
}


def is_isolated(config: c.RewardConfig, given: Mapping[str, Any]) -> bool:
    """Whether it may hang and can be called in another process: mathematics, patterns, generated tasks, user code."""
    if isinstance(config, c.FunctionConfig):
        return config.isolated and config.function not in given
    if isinstance(config, c.SelfConsistencyConfig):
        return config.compare == "math"
    return config.kind in ("math", "reasoning_gym", "program", "unit_tests") or (
        config.kind == "format" and config.pattern is not None
    )


def build(config: c.RewardConfig, given: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """The function of a setting, with what it needs imported. Raises RewardError and MissingExtraError."""
    if isinstance(config, c.FunctionConfig):
        return partial(load_object(config.function, given, RewardError), **config.options)
    if isinstance(config, c.PreferenceConfig):
        return partial(preference, scorer=load_object(config.scorer, given, RewardError))
    if isinstance(config, c.ProcessConfig):
        return partial(by_step.process, config=config, scorer=load_object(config.scorer, given, RewardError))
    if config.kind in MODELS:
        return load_object(MODELS[config.kind], None, RewardError)(config)  # type: ignore[no-any-return]
    if isinstance(config, c.FormatConfig):
        if config.pattern is not None:
            return partial(format_pattern, pattern=re.compile(config.pattern, re.DOTALL))
        return partial(format_tags, tags=tuple(config.tags), opened=config.opened)
    if config.kind == "math" or (isinstance(config, c.SelfConsistencyConfig) and config.compare == "math"):
        try:
            import math_verify  # noqa: F401
        except ImportError as error:
            raise RewardError("rewards of kind math need math-verify: pip install math-verify") from error
        logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own limit is off
        _parsed("1", True)  # its grammar loads now, and not within the first call's time limit
    if isinstance(config, c.Running):
        sandbox.require()
    if isinstance(config, c.ReasoningGymRewardConfig):
        try:
            import reasoning_gym  # noqa: F401
        except ImportError as error:
            raise MissingExtraError("reasoning-gym is not installed: pip install 'posttrain[reasoning]'") from error
    return partial(LABELLED[config.kind], config=config)


def component(config: c.RewardConfig, given: Mapping[str, Callable[..., Any]]) -> Component:
    """A setting made ready; one that runs in a worker is built there."""
    isolated = is_isolated(config, given)
    form: Form = FORMS.get(config.kind, "each")
    if isinstance(config, c.FunctionConfig) and config.group:
        form = "group"
    return Component(config.title, config.weight, form, isolated, None if isolated else build(config, given), config)
