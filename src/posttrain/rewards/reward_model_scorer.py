"""Reward models and process reward models as rewards: prompts and completions in, numbers out.

A prompt is a list of turns, or a user's text; it is rendered with the completion exactly as in training. What that
takes (chat or plain text, a system message, the separator of steps) is kept beside the model in reward.json; a model of
other people's making has none: the whole text of its tokenizer's chat template is read, if it has one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from posttrain.config import DataConfig, ModelConfig
from posttrain.core.errors import DataError, ModelError
from posttrain.core.files import named_path
from posttrain.core.types import Message
from posttrain.data.bad_rows import BadRow
from posttrain.data.chat_template import render_chat
from posttrain.data.encoding import prompt_tokens, prompt_with_completion
from posttrain.data.process_rows import StepChain, chain_samples, split_steps
from posttrain.data.template_source import apply_template
from posttrain.data.tokenizing import end_of_turn_token, tokenize
from posttrain.losses.reward_loss import combine_members, combine_steps, step_logits
from posttrain.models.classification_head import Layout, open_head, padding, score_index, scores_at, verify_scores
from posttrain.models.language_model import LanguageModel
from posttrain.models.max_length import context

INDEX = "reward.json"
BUDGET = 4096
"""Tokens of a pass."""
StepScore = tuple[int, int, float]
"""A step of a completion: its first character, one past its last, how likely the chain is right up to there."""


@dataclass(frozen=True)
class Member:
    """Hold a model and how it is asked.

    Attributes:
        model: The model.
        tokenizer: Its tokenizer.
        chat: Conversations are rendered by the chat template. False: their texts are joined.
        system: System message of training.
        mean: Mean of its rewards on held-out answers. None: not known.
        std: Their standard deviation.
        separator: Between steps.
        template: Plain text with {question} in it, by which problems were asked in place of a chat template.
        first: Token ids put before a plain text, which the tokenizer does not add.
        whole: The score is read at the last token that the chat template writes: a model of other makers, which were
            trained on the whole text. False: at the end of the answer's turn.
    """

    model: LanguageModel
    tokenizer: Any
    chat: bool
    system: str | None = None
    mean: float | None = None
    std: float | None = None
    separator: str = "\n"
    template: str | None = None
    first: tuple[int, ...] = ()
    whole: bool = False

    @property
    def data(self) -> DataConfig:
        """Return the settings by which rows are rendered."""
        return DataConfig(source="-", chat=self.chat)

    def row(self, prompt: Any) -> dict[str, Any]:
        """Return a prompt (text, turns, or an object with turns as `messages`) as a row.

        The system message is the one that the model was trained with.
        """
        row = dict(prompt) if isinstance(prompt, Mapping) else {"messages": prompt}
        turns = row["messages"]
        turns = [{"role": "user", "content": turns}] if isinstance(turns, str) else [dict(m) for m in turns]
        if self.system is not None:
            own = [] if self._writes_system else [{"role": "system", "content": self.system}]
            turns = [*own, *(m for m in turns if m["role"] != "system")]
        return {**row, "messages": turns}

    @cached_property
    def _writes_system(self) -> bool:
        """Return True if the chat template writes the system message of training by itself."""
        if not self.chat:
            return False
        asked: list[Message] = [{"role": "user", "content": "?"}]
        try:
            given = apply_template(self.tokenizer, [{"role": "system", "content": self.system}, *asked])
            return apply_template(self.tokenizer, asked) == given
        except BadRow:
            return False

    def prompt(self, prompt: Any) -> list[int]:
        """Return the tokens of a prompt as the model saw it in training."""
        row = self.row(prompt)
        if self.template is not None:
            text = self.template.replace("{question}", "".join(m["content"] for m in row["messages"]))
            row["messages"] = [{"role": "user", "content": text}]
        return [*self.first, *prompt_tokens(row, self.tokenizer, self.data)]

    def answer(self, prompt: Any, completion: str) -> list[int]:
        """Prompt and completion as in training, the end of the turn included; an empty completion is the end alone."""
        if self.whole and self.chat:
            row = self.row(prompt)
            turns = [*row["messages"], {"role": "assistant", "content": completion}]
            try:
                text = render_chat(
                    self.tokenizer, turns, tools=row.get("tools") or (), arguments=row.get("template_args")
                )
            except BadRow as error:
                raise DataError(f"{row.get('source', 'a row')}: {error}") from error
            return tokenize(self.tokenizer, [text])[0]
        if completion.strip():
            sample = prompt_with_completion(self.row(prompt), completion, self.tokenizer, self.data, end=True)
            return [*self.first, *sample.tokens]
        end = end_of_turn_token(self.tokenizer) if self.chat else None
        end = self.tokenizer.eos_token_id if end is None else end
        return [*self.prompt(prompt), *([] if end is None else [end])]

    def fits(self, tokens: Sequence[int]) -> None:
        """Check that tokens are not empty and fit the model's context. Raises DataError."""
        longest = context(self.model.base.config)
        if not tokens or (longest and len(tokens) > longest):
            raise DataError(
                f"prompt and completion have {len(tokens)} tokens, and the reward model reads 1 to {longest}"
            )


def open_members(path: str | Sequence[str], layout: Layout, device: str = "auto", dtype: str = "auto") -> list[Member]:
    """Open the models of a folder that a stage made, of any other source, or of several.

    Args:
        path: The source, or a list of sources.
        layout: Head of the models: one number for a sequence, or one for each token.
        device: Where they are.
        dtype: Their dtype.

    Raises:
        ModelError: A model can't be opened.
    """
    if not isinstance(path, str):
        return [m for one in path for m in open_members(one, layout, device, dtype)]
    index: dict[str, Any] = {"members": [{"folder": "."}]}
    file = named_path(path) / INDEX
    if file.exists():
        index = json.loads(file.read_text())
    out = []
    for entry in index["members"]:
        source = str(named_path(path) / entry["folder"]) if file.exists() else path
        hf, tokenizer = open_head(ModelConfig(source=source, device=device, dtype=dtype), layout)  # type: ignore[arg-type]
        model = LanguageModel(hf).eval().requires_grad_(False)
        verify_scores(model, layout)
        templated = bool(getattr(tokenizer, "chat_template", None))
        rest: dict[str, Any] = {k: index[k] for k in ("system", "separator", "template") if k in index}
        rest |= {"first": tuple(index.get("first", ())), "whole": not file.exists()}
        out.append(
            Member(model, tokenizer, index.get("chat", templated), mean=entry.get("mean"), std=entry.get("std"), **rest)
        )
    return out


class RewardModel:
    """A reward model, or an ensemble. Call it with prompts and completions, pair by pair: a number for each.

    An ensemble's members are each centred on their own mean before they are combined, since the level of a reward that
    was trained on pairs means nothing. combine, spread: see `combine_members`. normalise: rewards
    get mean 0 and standard deviation 1 on the held-out answers. Raises ModelError for a model that can't be opened, or
    whose mean is needed and not known.
    """

    def __init__(
        self,
        path: str | Sequence[str],
        combine: str = "mean",
        spread: float = 1.0,
        normalise: bool = False,
        device: str = "auto",
        dtype: str = "auto",
    ) -> None:
        self.combine, self.spread, self.normalise = combine, spread, normalise
        self.members = open_members(path, "sequence", device, dtype)
        several = len(self.members) > 1
        if (several or normalise) and any(m.mean is None or not m.std for m in self.members):
            subject = "an ensemble's members" if several else "normalise"
            raise ModelError(
                f"reward model {path}: {subject} needs the mean and standard deviation of its rewards, which posttrain "
                f"keeps in {INDEX} and other makers' models don't have. Use one such model at a time, normalise: false"
            )

    def scores(self, prompts: Sequence[Any], completions: Sequence[str]) -> torch.Tensor:
        """Return the rewards of each member as its head gives them, (members, pairs)."""
        rows = []
        for m in self.members:
            tokens = [m.answer(p, c) for p, c in zip(prompts, completions, strict=True)]
            for ids in tokens:
                m.fits(ids)
            pad = padding(m.model)
            outputs = scores_at(m.model, tokens, [[score_index(ids, pad)] for ids in tokens], BUDGET)
            rows.append(torch.stack([f[0, 0] for f in outputs]) if outputs else torch.zeros(0))
        return torch.stack(rows)

    def tokens_read(self, prompts: Sequence[Any], completions: Sequence[str]) -> list[int]:
        """Return the number of tokens that the members read for each pair."""
        pairs = list(zip(prompts, completions, strict=True))
        return [sum(len(m.answer(p, c)) for m in self.members) for p, c in pairs]

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
        scores = self.scores(prompts, completions).double()
        if self.normalise or len(self.members) > 1:
            scores = scores - torch.tensor([[m.mean] for m in self.members], dtype=torch.float64)
        if self.normalise:
            scores = scores / torch.tensor([[m.std] for m in self.members], dtype=torch.float64)
        return combine_members(scores, self.combine, self.spread).tolist()  # type: ignore[no-any-return]


class ProcessReward:
    """A process reward model. Call it with prompts and completions: a number for each, made of its steps' scores.

    combine: see `functional.reward.combine_steps`; steps: the steps themselves in place of the number. A completion
    without a step (nothing but white space) gets 0, the lowest that a score can be.
    """

    def __init__(
        self,
        path: str,
        combine: str = "min",
        separator: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
    ) -> None:
        (self.member,) = open_members(path, "token", device, dtype)
        self.combine = combine
        self.separator = separator or self.member.separator

    def steps(self, prompts: Sequence[Any], completions: Sequence[str]) -> list[list[StepScore]]:
        """Return the steps of each completion in order, with their scores."""
        spans = [split_steps(c, self.separator) for c in completions]
        with_steps = [i for i, s in enumerate(spans) if s]
        chains = [
            StepChain(
                self.member.prompt(prompts[i]), [completions[i][a:b] for a, b in spans[i]], [0.0] * len(spans[i]), 0
            )
            for i in with_steps
        ]
        samples = chain_samples(chains, self.member.tokenizer)
        for s in samples:
            self.member.fits(s.tokens)
        outputs = scores_at(self.member.model, [s.tokens for s in samples], [s.meta["ends"] for s in samples], BUDGET)
        out: list[list[StepScore]] = [[] for _ in completions]
        for i, numbers in zip(with_steps, outputs, strict=True):
            likely = step_logits(numbers).sigmoid().tolist()
            out[i] = [(a, b, p) for (a, b), p in zip(spans[i], likely, strict=True)]
        return out

    def tokens_read(self, prompts: Sequence[Any], completions: Sequence[str]) -> list[int]:
        """Return the number of tokens that the model reads for each pair."""
        return [len(self.member.answer(p, c)) for p, c in zip(prompts, completions, strict=True)]

    def step_scores(self, prompt: Any, completion: str) -> list[StepScore]:
        """Return (first character, one past the last, score in [0, 1]) of each step of a completion."""
        return self.steps([prompt], [completion])[0]

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str]) -> list[float] | list[list[StepScore]]:
        steps = self.steps(prompts, completions)
        return steps if self.combine == "steps" else [combine_steps([p for _, _, p in s], self.combine) for s in steps]
