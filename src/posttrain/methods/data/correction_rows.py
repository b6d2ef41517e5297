"""Chains of answers and revisions as rows to train on: what became of each, and the turns that carry loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from posttrain.data.prompts import RenderedPrompt
    from posttrain.sampling.model_feedback import ModelFeedback
    from posttrain.sampling.refine_turns import RefineTurn

Outcome = Literal["corrected", "kept right"]
OUTCOMES: tuple[Outcome, ...] = ("corrected", "kept right")
"""What becomes of a chain that gives a row: a right answer after a wrong one; a right answer that stays right."""

NO_REWARD = "no reward"
FIRST_CUT = "cut in the first answer"
REVISION_CUT = "cut before the end of the revision"
NO_REVISION = "ended before a revision"
LOST = "right answer lost"
STILL_WRONG = "still wrong"
WRONG_KEPT = "wrong answer kept by the model's verdict"
EMPTY_TURN = "an empty turn"
REPEATED = "repeated"
BEYOND_KEEP = "beyond keep"
BEYOND_BALANCE = "beyond kept_right"
NO_LOSS = "no turn of train_on"
"""Reasons for which a chain gives no row."""
EXAMPLES_OF_REASON = 3
"""Examples that are kept of each reason."""


@dataclass(frozen=True)
class AnswerChain:
    """Hold a sampled chain.

    Attributes:
        problem: Number of the prompt.
        turns: Its turns.
        texts: Text of each turn with special tokens, as it stands between its neighbours.
        rewards: Reward of each answer; empty if one of them failed.
        cut: True if a limit ended it in the middle of a turn.
        tokens: Tokens that the model wrote.
    """

    problem: int
    turns: Sequence[RefineTurn]
    texts: Sequence[str]
    rewards: Sequence[float]
    cut: bool
    tokens: int = 0

    @property
    def answers(self) -> list[int]:
        """Return the places of the answers among the turns, without one that was cut."""
        complete = self.turns[:-1] if self.cut and self.turns and self.turns[-1].kind != "request" else self.turns
        return [i for i, turn in enumerate(complete) if turn.kind == "answer"]

    def key(self, last: int) -> tuple[str, ...]:
        """Return a value that is equal for chains that say the same up to a turn, except for spaces."""
        return tuple(" ".join(t.text.split()) for t in self.turns[: last + 1] if t.kind != "request")


KeptChain = tuple[AnswerChain, str, dict[str, Any]]
"""A chain that is kept, what became of it, and its row."""


def outcome_of(chain: AnswerChain, threshold: float) -> tuple[str, int]:
    """Return what became of a chain, one of `OUTCOMES` or the reason why it gives no row, and its last turn that counts.

    A chain counts up to the first right answer after a wrong one; or up to the revision of a right first answer, or the
    model's own verdict that keeps it.

    Args:
        chain: The chain.
        threshold: Reward from which an answer is right.
    """
    answers = chain.answers
    if not answers:
        return FIRST_CUT, -1
    if not chain.rewards:
        return NO_REWARD, -1
    right = [chain.rewards[k] >= threshold for k in range(len(answers))]
    verdict = len(answers) == 1 and not chain.cut and chain.turns[-1].kind == "feedback"
    if right[0]:
        if len(answers) > 1:
            return ("kept right", answers[1]) if right[1] else (LOST, answers[1])
        return ("kept right", len(chain.turns) - 1) if verdict else (REVISION_CUT if chain.cut else NO_REVISION, -1)
    if True in right:
        return "corrected", answers[right.index(True)]
    if len(answers) > 1:
        return STILL_WRONG, answers[-1]
    return WRONG_KEPT if verdict else REVISION_CUT if chain.cut else NO_REVISION, -1


def correction_row(
    prompt: RenderedPrompt, chain: AnswerChain, outcome: str, last: int, environment: Any, train_on: Sequence[str]
) -> dict[str, Any]:
    """Return a row for supervised fine-tuning: the prompt, and the turns of a chain.

    Only what led to the last turn carries loss; of earlier turns the first answer may, if it is right: no wrong answer
    is trained on.

    Args:
        prompt: The prompt.
        chain: The chain.
        outcome: What became of it.
        last: Its last turn in the row.
        environment: Settings of the environment. In plain text (answers: inline) the prompt is one turn as it was
            written, and turns keep their special tokens, so that their texts side by side are what was sampled.
        train_on: Kinds of turns that carry loss.
    """
    from posttrain.data.prompts import template_columns

    inline = environment.answers == "inline"
    messages: list[dict[str, Any]] = (
        [{"role": "user", "content": prompt.text}] if inline else [dict(m) for m in prompt.problem["messages"]]
    )
    before = max((i for i in chain.answers if i < last), default=-1)
    for i, turn in enumerate(chain.turns[: last + 1]):
        content = chain.texts[i] if inline else turn.text
        if turn.kind == "request":
            messages.append({"role": environment.role, "content": content})
            continue
        kind = "revision" if turn.kind == "answer" and i == last else turn.kind
        first = i == 0 and outcome == "kept right"
        trained = kind in train_on and (i > before or first)
        messages.append({"role": "assistant", "content": content, **({} if trained else {"train": False})})
    answers = [chain.turns[i].text for i in chain.answers if i <= last]
    numbers = {"rewards": list(chain.rewards[: len(answers)]), "outcome": outcome, "tokens": chain.tokens}
    columns = {} if inline else template_columns(prompt.problem)
    label = {"answer": prompt.problem.get("answer"), "problem": chain.problem, "source": prompt.source}
    return {"messages": messages, **columns, "first": answers[0], "last": answers[-1], **numbers, **label}


def critic_row(prompt: RenderedPrompt, written: str, request: str, reward: float, environment: Any) -> dict[str, Any]:
    """Return a row of a critic's problems: the request, the question and answer for the corrector, and the label.

    Args:
        prompt: The prompt.
        written: The answer to criticise.
        request: What the critic is asked.
        reward: Reward of the answer.
        environment: Settings of the environment.
    """
    from posttrain.data.prompts import OWN_FIELDS

    asked = (
        [{"role": "user", "content": prompt.text}] if environment.answers == "inline" else prompt.problem["messages"]
    )
    columns = {k: v for k, v in prompt.problem.items() if k not in OWN_FIELDS and v is not None}
    label = {"answer": prompt.problem["answer"], "reward": reward, "question_source": prompt.source}
    return {**columns, "prompt": request, "asked": [dict(m) for m in asked], "written": written, **label}


def critique_rows(
    kept: Sequence[KeptChain], prompts: Sequence[RenderedPrompt], source: ModelFeedback.Config
) -> list[dict[str, Any]]:
    """Return rows that teach a critic: what it is asked about a first answer, and the feedback that did its work.

    That is feedback whose revision is right after a wrong answer, or which left a right one right.

    Args:
        kept: The chains that are kept, with own feedback.
        prompts: The prompts, by number.
        source: Settings of the source of feedback that the critic becomes.
    """
    out, seen = [], set[tuple[str, str]]()
    for chain, outcome, row in kept:
        second = chain.answers[1] if len(chain.answers) > 1 else len(chain.turns)
        found = [t.text for t in chain.turns[:second] if t.kind == "feedback"]
        worked = outcome == "kept right" or len(row["rewards"]) == 2
        if len(found) != 1 or not found[0] or not worked:
            continue
        prompt = prompts[chain.problem]
        request = source.request(str(prompt.problem["prompt"]), chain.turns[0].text)
        if (request, found[0]) not in seen:
            seen.add((request, found[0]))
            out.append(
                {"prompt": request, "completion": found[0], "outcome": outcome, "question_source": prompt.source}
            )
    return out


def carries_loss(row: Mapping[str, Any]) -> bool:
    """Return True if a turn of a row is trained on."""
    return any(m["role"] == "assistant" and m.get("train", True) for m in row["messages"])


@dataclass
class CorrectionCounts:
    """Count what became of chains, with a few examples of each reason.

    Attributes:
        kept: Rows by outcome.
        dropped: Chains without a row by reason.
        examples: Of each reason: problem, source, first and last answer.
    """

    kept: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def drop(self, why: str, chain: AnswerChain, source: str) -> None:
        """Count a chain that gives no row.

        Args:
            why: The reason.
            chain: The chain.
            source: Place of the prompt's row.
        """
        self.dropped[why] += 1
        shown = self.examples.setdefault(why, [])
        if len(shown) < EXAMPLES_OF_REASON:
            answers = [t.text for t in chain.turns if t.kind == "answer"] or [""]
            told = {"first": answers[0], "last": answers[-1], "rewards": list(chain.rewards)}
            shown.append({"problem": chain.problem, "source": source, **told})


def chain_figures(chains: Sequence[AnswerChain], threshold: float) -> dict[str, float]:
    """Return what revisions did over all scored chains, as shares.

    Args:
        chains: The chains; the first and the last complete answer of each count.
        threshold: Reward from which an answer is right.
    """
    scored = [c for c in chains if c.rewards and c.answers]
    pairs = [(c.rewards[0] >= threshold, c.rewards[len(c.answers) - 1] >= threshold) for c in scored]
    changed = [c.turns[c.answers[0]].text.split() != c.turns[c.answers[-1]].text.split() for c in scored]
    counts = {
        "right_before": sum(a for a, _ in pairs),
        "right_after": sum(b for _, b in pairs),
        "wrong_to_right": sum(b and not a for a, b in pairs),
        "right_to_wrong": sum(a and not b for a, b in pairs),
        "changed": sum(changed),
    }
    return {name: count / max(1, len(pairs)) for name, count in counts.items()}
