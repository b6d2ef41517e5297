"""Write the rows of a task: wording, label words, reasoning, the inverted task, and demonstrations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from posttrain.data.instruction_examples import Dropped, Example, ExampleStore
from posttrain.data.instruction_mixing import Draws, ranks, task_seed
from posttrain.data.instruction_settings import InstructionSettings, ShotsConfig
from posttrain.data.instruction_wordings import INVERTED_TARGET, LABELLED, Wording, language_name, shipped_wordings
from posttrain.data.text_copies import is_copy

ANSWER_MARK = "Answer:"
"""What begins the last line of an answer with reasoning; the prompt asks for it."""
FEWER_SHOTS = "rows with fewer demonstrations than drawn: no more that are free of leaks"
CUT_SHOTS = "rows with fewer demonstrations than drawn: the prompt would be too long"
TOO_LONG = "longer than max_tokens"
TRIES = 16
"""Examples that are drawn at most for each demonstration."""
VARIANT_STEP = 7919
Fits = Callable[[Any, str], bool]
"""(prompt, completion) -> True if both fit into the context."""


@dataclass(frozen=True)
class RowKind:
    """Say which rows are written.

    Attributes:
        shots: Demonstrations.
        rationale_share: Share of the rows with reasoning, of those that have some.
        inverted_share: Share of inverted rows.
        wordings: Most wordings that are used of a task. None: all.
    """

    shots: ShotsConfig
    rationale_share: float
    inverted_share: float
    wordings: int | None = None

    @classmethod
    def trained(cls, settings: InstructionSettings) -> RowKind:
        """Return the kind of the rows that are trained on."""
        return cls(settings.shots, settings.rationale_share, settings.inverted_share, settings.wordings)

    @classmethod
    def held_out(cls, settings: InstructionSettings) -> RowKind:
        """Return the kind of held-out rows: no inverted ones, any wording."""
        shots = settings.shots.model_copy(
            update={"counts": [settings.held_out_shots], "share": float(settings.held_out_shots > 0)}
        )
        return cls(shots, float(settings.held_out_rationale), 0.0)


@dataclass(frozen=True)
class _Form:
    """Hold how a row and its demonstrations are written."""

    wording: Wording
    inverted: bool
    request: str
    """What asks for reasoning; empty for none."""
    words: dict[str, str]
    """Value of the output -> label word."""


@dataclass
class RowWriter:
    """Write rows of one task.

    Attributes:
        store: Its examples.
        pool: Numbers of those that may be demonstrations.
        kind: Which rows.
        seed: The seed of the build.
        similarity: ROUGE-L from which an example is too near to be a demonstration.
        fits: Tells if a prompt and a completion fit into the context.
        counts: What happened, so far.
        dropped: Rows that did not fit.
    """

    store: ExampleStore
    pool: np.ndarray
    kind: RowKind
    seed: int
    similarity: float
    fits: Fits = lambda prompt, completion: True
    counts: Counter[str] = field(default_factory=Counter)
    dropped: Dropped = field(default_factory=Dropped)

    def __post_init__(self) -> None:
        task = self.store.task
        self._keys = ranks(self.store.column("pair_keys"), task_seed(self.seed, task.name, "rows"))
        self._sets = task.label_sets(self.store.labels)
        self._constant = {"language": language_name(task.language), "description": task.description or ""}
        if task.output_language is not None:
            self._constant["output_language"] = language_name(task.output_language)
        self._usable = {
            (inverted, context): self._chosen(inverted, context)
            for inverted in (False, True)
            for context in (False, True)
        }
        self._shown = self.store.demonstrations
        self._columns = [self.store.column(name) for name in ("input_keys", "answer_keys", "groups", "with_rationale")]

    def _chosen(self, inverted: bool, context: bool) -> list[Wording]:
        """Return the wordings for rows with or without a context; of `kind.wordings` of them, a random choice."""
        task = self.store.task
        fitting = [w for w in (task.all_inverted if inverted else task.all_wordings) if w.has_context == context]
        if self.kind.wordings is None:
            return fitting
        order = Draws(task_seed(self.seed, task.name, "wordings")).several(len(fitting), self.kind.wordings)
        return [fitting[i] for i in sorted(order)]

    def row(self, number: int, variant: int = 0) -> dict[str, Any] | None:
        """Return the row of an example; None if it does not fit into the context, which is counted.

        Args:
            number: Number of the example.
            variant: Which of several rows of the example: each has another wording, as long as there are some.
        """
        example = self.store[number]
        draws = Draws(int(self._keys[number]) + VARIANT_STEP * (variant + 1))
        form = self._form(number, example, draws, variant)
        count = self._shot_count(draws)
        shown = self._demonstrations(number, example, count, bool(form.request), draws)
        if len(shown) < count:
            self.counts[FEWER_SHOTS] += 1
        prompt, completion = self._prompt(example, shown, form)
        short = False
        while not self.fits(prompt, completion):
            if not shown:
                self.dropped.add(TOO_LONG, example.place, example.input_text(self.store.task.type))
                return None
            shown, short = shown[:-1], True
            prompt, completion = self._prompt(example, shown, form)
        self.counts[CUT_SHOTS] += short
        return self._as_row(example, form, prompt, completion, len(shown))

    def _as_row(self, example: Example, form: _Form, prompt: Any, completion: str, shots: int) -> dict[str, Any]:
        task = self.store.task
        labelled = task.type in LABELLED
        row: dict[str, Any] = {"prompt": prompt, "completion": completion}
        if labelled and not form.inverted and not form.request:
            row["choices"] = list(form.words.values())
        self.counts.update(
            {"rows": 1, "inverted": form.inverted, "with reasoning": bool(form.request), f"{shots} demonstrations": 1}
        )
        return row | {
            "task": task.name,
            "type": task.type,
            "cluster": task.cluster_name,
            "language": task.language,
            "domain": task.domain,
            "wording": form.wording.number,
            "inverted": form.inverted,
            "shots": shots,
            "rationale": bool(form.request),
            "label": example.output if labelled else None,
            "input": example.input_text(task.type),
            "place": example.place,
        }

    def _form(self, number: int, example: Example, draws: Draws, variant: int) -> _Form:
        """Draw how a row is written; every choice takes its draw, so that one setting changes no other choice."""
        invert, explain, request = draws.uniform(), draws.uniform(), draws.below(1 << 32)
        context = bool(example.fields.get("context"))
        inverted = invert < self.kind.inverted_share and bool(self._usable[True, context])
        usable = self._usable[inverted, context]
        first = Draws(int(self._keys[number])).below(len(usable))
        wording = usable[(first + variant) % len(usable)]  # each variant of an example has another one
        requests = shipped_wordings()["rationale"]
        reasoned = not inverted and bool(example.rationale) and explain < self.kind.rationale_share
        asked = requests[request % len(requests)] if reasoned else ""
        return _Form(wording, inverted, asked, self._sets[wording.number % len(self._sets)])

    def _shot_count(self, draws: Draws) -> int:
        shots = self.kind.shots
        shown, count = draws.uniform() < shots.share, shots.counts[draws.below(len(shots.counts))]
        return count if shown else 0

    def _demonstrations(self, number: int, example: Example, count: int, reasoned: bool, draws: Draws) -> list[Example]:
        """Draw examples that are not the row itself, nor of its group, nor near it or one another by their words."""
        if not count:
            return []
        words = [self.store.words(example)]
        found: list[Example] = []
        drawn = draws.several(len(self._shown) or len(self.pool), TRIES * count)
        for candidate in self._candidates(number, example, reasoned, drawn):
            new = self.store.words(candidate)
            if any(is_copy(new, other, self.similarity) for other in words):
                continue
            found.append(candidate)
            words.append(new)
            if len(found) == count:
                break
        return found

    def _candidates(self, number: int, example: Example, reasoned: bool, drawn: Iterable[int]) -> Iterator[Example]:
        """Yield drawn examples without those that hashes rule out, which costs no reading."""
        context = bool(example.fields.get("context"))
        inputs, answers, groups, rationales = self._columns
        for place in drawn:
            if self._shown:
                shown = self._shown[place]
            else:
                i = int(self.pool[place])
                if i == number or inputs[i] == inputs[number] or (reasoned and not rationales[i]):
                    continue
                if groups[number] and groups[i] == groups[number]:
                    continue
                if inputs[i] == answers[number] and answers[i] == inputs[number]:  # a pair of paraphrases, exchanged
                    continue
                shown = self.store[i]
            if bool(shown.fields.get("context")) == context and (shown.rationale or not reasoned):
                yield shown

    def _prompt(self, example: Example, shown: Sequence[Example], form: _Form) -> tuple[Any, str]:
        """Return the prompt, with the demonstrations as text or as turns before it, and the completion."""
        prompt, completion = self._filled(example, form)
        pairs = [self._filled(one, form) for one in shown]
        if self.kind.shots.style == "text" or not pairs:
            return "\n\n".join([*(f"{asked}\n{answer}" for asked, answer in pairs), prompt]), completion
        turns = [
            {"role": role, "content": text}
            for pair in pairs
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        return [*turns, {"role": "user", "content": prompt}], completion

    def _filled(self, example: Example, form: _Form) -> tuple[str, str]:
        task = self.store.task
        output = form.words.get(example.output, example.output)
        values = {**example.fields, **self._constant, "output": output}
        if task.type in LABELLED:
            values["labels"] = ", ".join(form.words.values())
            values["options"] = "\n".join(f"- {word}" for word in form.words.values())
        prompt = form.wording.template.fill(values)
        if form.inverted:
            return prompt, example.fields[INVERTED_TARGET[task.type]]
        if form.request:
            return f"{prompt}\n\n{form.request}", f"{example.rationale}\n{ANSWER_MARK} {output}"
        return prompt, output
