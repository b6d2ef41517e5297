"""Completions in turns: the model writes, an environment answers, the model continues; itself a sampler.

All completions of a call are taken a turn at a time: those that continue are the next call's prompts, with what was
written and answered so far as part of them. What the model wrote is never tokenized again; a reply is tokenized by
itself and put behind it. Everything is a function of the request's seed, the completion's number and the turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from posttrain.config import SamplingConfig
from posttrain.config.environment import EnvironmentConfig
from posttrain.core.errors import DataError, PosttrainError, RecipeError
from posttrain.core.image_tokens import extended
from posttrain.core.types import Message, PartialRollout, Rollout, RolloutGroup
from posttrain.data.chat_template import TextSearch, render_chat
from posttrain.data.formats import BadRow
from posttrain.data.special_text import guard, restore
from posttrain.data.tokenizing import continuation, text_tokens
from posttrain.sampling.environments import Environment, QuotingReply
from posttrain.sampling.protocol import OnDone, Request, Sampler

REPLY_CUT = " [cut]"
"""Behind a reply that was longer than it may be."""
LONGEST_TOKEN = 64
"""Characters of a reply that are read for each token that it may have."""
MARK = "Qz7f0Xw"
"""Stands for an assistant's text, to find what a template writes behind it."""


@dataclass
class _Dialogue:
    """A completion in the making. limit: tokens that the model may write. finish: why it ended ("": it continues)."""

    index: int
    number: int
    request: Request
    state: Any
    limit: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    pieces: list[PartialRollout] = field(default_factory=list)
    written: int = 0
    turns: int = 0
    finish: str = ""
    text: str | None = None

    def wrote(self, rollout: Rollout) -> None:
        self.tokens += rollout.tokens
        self.logprobs += rollout.logprobs
        self.mask += [True] * len(rollout.tokens)
        self.written += len(rollout.tokens)
        for piece in rollout.pieces:
            last = self.pieces[-1] if self.pieces else None
            if last is not None and (last.step, last.temperature) == (piece.step, piece.temperature):
                self.pieces[-1] = replace(last, tokens=last.tokens + piece.tokens)
            else:
                self.pieces.append(piece)

    def answered(self, tokens: Sequence[int]) -> None:
        self.tokens += tokens
        self.logprobs += [0.0] * len(tokens)
        self.mask += [False] * len(tokens)
        if self.pieces:
            self.pieces[-1] = replace(self.pieces[-1], tokens=self.pieces[-1].tokens + len(tokens))

    def next_request(self) -> Request:
        seed = np.random.SeedSequence([self.request.seed % 2**64, self.number, self.turns]).generate_state(1, np.uint64)
        tokens = extended(self.request.tokens, self.tokens)
        return Request(tokens, 1, int(seed[0]), self.request.example, self.limit - self.written)

    def rollout(self) -> Rollout:
        mask, pieces = tuple(self.mask), tuple(self.pieces)
        return Rollout(tuple(self.tokens), tuple(self.logprobs), self.finish, self.text or "", mask=mask, pieces=pieces)


class TurnSampler:
    """A `Sampler` whose completions an environment answers. sampler: what samples each turn.

    context: the model's length in tokens. max_tokens, of the settings or a request, bounds what the model writes in all
    turns together. Besides `end`, `stop` and `length` (also: no room for the reply and a token more) a rollout may end
    as `turns`: it asked once more than max_turns; and as `stop` where the environment is done. Raises DataError where
    the chat template can't hold a reply. lock: held while the environment is called, if other threads call it too.
    """

    def __init__(
        self,
        sampler: Sampler,
        environment: Environment,
        config: EnvironmentConfig,
        tokenizer: Any,
        context: int,
        lock: AbstractContextManager[Any] | None = None,
    ) -> None:
        self.sampler, self.environment, self.config = sampler, environment, config
        self.lock = nullcontext() if lock is None else lock
        self.tokenizer, self.context = tokenizer, context
        self.stops = config.stop_strings
        check(config, tokenizer)

    def sample(
        self, requests: Sequence[Request], params: SamplingConfig, on_done: OnDone | None = None
    ) -> list[RolloutGroup]:
        """Complete every request, `n` times each; order is kept.

        Args:
            requests: The prompts.
            params: How tokens are drawn.
            on_done: Called as each completion ends.
        """
        if params.min_tokens:
            raise RecipeError("sampler.min_tokens would hold in every turn anew: leave it out with an environment")
        turn_params = params.model_copy(update={"stop": [*params.stop, *self.stops]})
        out: list[list[_Dialogue]] = [[] for _ in requests]
        live: list[_Dialogue] = []
        for i, request in enumerate(requests):
            limit = min(params.max_tokens, request.max_tokens or params.max_tokens)
            for j in range(request.n):
                state = self._ask(request, "start", request.example)
                out[i].append(_Dialogue(i, j, request, state, limit))
            live += out[i]
        todo, members = list(requests), out
        while live:
            self._round(todo, members, params, turn_params, on_done)
            live = [d for d in live if not d.finish]
            todo, members = [d.next_request() for d in live], [[d] for d in live]
        return [
            RolloutGroup(request.tokens, request.example, [d.rollout() for d in dialogues])
            for request, dialogues in zip(requests, out, strict=True)
        ]

    def _round(
        self,
        todo: Sequence[Request],
        members: Sequence[Sequence[_Dialogue]],
        params: SamplingConfig,
        turn_params: SamplingConfig,
        on_done: OnDone | None,
    ) -> None:
        """One turn of every completion in `members` (by request), and its answer."""

        def tell(dialogue: _Dialogue) -> None:
            if dialogue.finish and on_done is not None:
                on_done(dialogue.index, dialogue.number, dialogue.rollout())

        taken: set[tuple[int, int]] = set()

        def ended(i: int, j: int, rollout: Rollout) -> None:
            """Report a completion that needs no answer as it ends, so that progress shows."""
            taken.add((i, j))
            self._turn(members[i][j], rollout, params)
            tell(members[i][j])

        asking: list[tuple[_Dialogue, Rollout]] = []
        for i, group in enumerate(self.sampler.sample(todo, turn_params, ended)):
            for j, (rollout, dialogue) in enumerate(zip(group.rollouts, members[i], strict=True)):
                if (i, j) not in taken:
                    ended(i, j, rollout)
                if not dialogue.finish:
                    asking.append((dialogue, rollout))
        for dialogue, rollout, reply, done in self._replies(asking):
            self._answer(dialogue, rollout, reply, done)
            tell(dialogue)

    def _turn(self, dialogue: _Dialogue, rollout: Rollout, params: SamplingConfig) -> None:
        """Take a turn in. Unless the environment is to be asked, the completion has ended with it."""
        before = list(dialogue.tokens)
        dialogue.wrote(rollout)
        if rollout.finish == "error":
            dialogue.finish, dialogue.text = "error", rollout.text
            return
        text = self._decode(rollout.tokens)
        first = min(((at, s) for s in [*self.stops, *params.stop] if (at := text.find(s)) >= 0), default=(0, ""))[1]
        if rollout.finish == "stop" and first in self.stops:
            return
        if rollout.finish == "end" and self.config.end_closes_turn:
            return
        dialogue.finish = rollout.finish
        if rollout.finish == "stop" and first:  # a stop string of the recipe's own, which the text is cut at
            dialogue.text = self._decode(before, skip=True) + rollout.text
        else:
            kept = dialogue.tokens[:-1] if rollout.finish in ("end", "stop") else dialogue.tokens
            dialogue.text = self._decode(kept, skip=True)

    def _replies(
        self, asking: Sequence[tuple[_Dialogue, Rollout]]
    ) -> Iterator[tuple[_Dialogue, Rollout, str | None, bool | None]]:
        """Yield each completion that calls the environment with the reply; done is None for one that may call no more.

        An environment that has a method `step_many` is called once, and others once for each completion.
        """
        allowed = [(d, turn) for d, turn in asking if d.turns < self.config.most_calls]
        skip = not self.config.reads_special_tokens
        texts = [self._decode(t.tokens[:-1] if t.finish == "end" else t.tokens, skip) for _, t in allowed]
        if hasattr(self.environment, "step_many") and allowed:
            first, states = allowed[0][0].request, [d.state for d, _ in allowed]
            answers = iter(self._ask(first, "step_many", states, texts))
        else:
            answers = (self._ask(d.request, "step", d.state, s) for (d, _), s in zip(allowed, texts, strict=True))
        for dialogue, turn in asking:
            if dialogue.turns >= self.config.most_calls:
                yield dialogue, turn, None, None
            else:
                yield dialogue, turn, *next(answers)

    def _answer(self, dialogue: _Dialogue, turn: Rollout, reply: str | None, done: bool | None) -> None:
        """Put the environment's reply behind the turn, or end the completion. done: None if no call was left."""
        if done is None:
            self._close(dialogue, "turns", turn)
            return
        dialogue.turns += 1
        tokens = [] if reply is None else self._tokens(reply, turn)
        room = self.context - len(dialogue.request.tokens) - len(dialogue.tokens) - len(tokens)
        if done:
            if room >= 0 and tokens:
                dialogue.answered(tokens)
            self._close(dialogue, "stop", None if tokens else turn)
        elif reply is None and turn.finish == "end":
            self._close(dialogue, "end", turn)
        elif room < 1 or dialogue.written >= dialogue.limit:
            self._close(dialogue, "length", turn)
        else:
            dialogue.answered(tokens)

    def _close(self, dialogue: _Dialogue, finish: str, turn: Rollout | None) -> None:
        """turn: the last, where nothing was put behind it: its end token is no text."""
        ended = turn is not None and turn.finish == "end"
        dialogue.finish = finish
        dialogue.text = self._decode(dialogue.tokens[:-1] if ended else dialogue.tokens, skip=True)

    def _ask(self, request: Request, method: str, *args: Any) -> Any:
        """Call the environment; what it raises says where."""
        try:
            with self.lock:
                returned = getattr(self.environment, method)(*args)
            if method == "start":
                return returned
            for reply, done in [returned] if method == "step" else returned:
                if not (reply is None or isinstance(reply, str)) or not isinstance(done, bool):
                    raise TypeError(f"expected (text or None, True or False), and got {(reply, done)!r}")
            if method == "step_many" and len(returned) != len(args[0]):
                raise TypeError(f"expected {len(args[0])} replies, one for each text, and got {len(returned)}")
            return returned
        except PosttrainError:  # says what is wrong itself
            raise
        except Exception as error:
            name = getattr(self.config, "function", self.config.kind)
            source = request.example.get("source", "an example")
            count = len(args[0]) if method == "step_many" else 1
            where = f"one of {count} completions, the first for {source}" if count > 1 else str(source)
            raise PosttrainError(
                f"environment {name}: {method} failed for {where}: {type(error).__name__}: {error}. A model's "
                "text can be anything: reply with an error in words instead"
            ) from error

    def _tokens(self, reply: str, turn: Rollout) -> list[int]:
        """Tokens of a reply, and of what the template has around it; cut where it is too long."""
        reply = shortened_reply(reply, self.tokenizer, self.config.max_reply)
        if self.config.answers == "inline":
            return self._as_text(reply)
        behind = reply_turn(self.config, self.tokenizer, reply)
        if turn.finish == "end":  # the model has closed its turn itself
            behind = behind.removeprefix(self._decode(turn.tokens[-1:]))
        return continuation(self.tokenizer, behind)

    def _as_text(self, reply: str) -> list[int]:
        """Return the tokens of a reply; special tokens that it spells are ordinary text."""
        return continuation(self.tokenizer, guard(reply, text_tokens(self.tokenizer)))

    def _decode(self, tokens: Sequence[int], skip: bool = False) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=skip))


def shortened_reply(reply: str, tokenizer: Any, longest: int) -> str:
    """Return a reply of at most this many tokens, or with quotations of at most as many; what is cut ends in a mark.

    Args:
        reply: The reply; of a `QuotingReply` each quotation is shortened, and nothing else.
        tokenizer: The tokenizer.
        longest: Number of tokens.
    """
    if isinstance(reply, QuotingReply):
        parts = (shortened_reply(text, tokenizer, longest) if quoted else text for text, quoted in reply.pieces)
        return "".join(parts)
    head = reply[: longest * LONGEST_TOKEN]  # the rest of a huge text is not tokenized
    ids = continuation(tokenizer, guard(head, text_tokens(tokenizer)))
    if len(ids) <= longest and len(head) == len(reply):
        return reply
    return str(tokenizer.decode(ids[:longest], skip_special_tokens=False)).rstrip("\ufffd") + REPLY_CUT


def in_turns(rollout: Rollout, tokenizer: Any) -> list[tuple[bool, str]]:
    """Return (True if the model wrote it, text) of the turns and replies that make up the rollout's text, in order.

    Empty if no environment answered, or if a tokenizer writes the parts differently from the whole.
    """
    if not rollout.replies or rollout.mask is None:
        return []
    out, at, start = [], 0, 0
    for end in range(1, len(rollout.tokens) + 1):
        if end < len(rollout.tokens) and rollout.mask[end] == rollout.mask[start]:
            continue
        piece = str(tokenizer.decode(list(rollout.tokens[start:end]), skip_special_tokens=True))
        left = rollout.text[at:]
        piece = left if end == len(rollout.tokens) and piece.startswith(left) else piece  # a stop string was cut off
        if not left.startswith(piece):
            return []
        if piece:
            out.append((rollout.mask[start], piece))
        at, start = at + len(piece), end
    return out if at == len(rollout.text) else []


def check(config: EnvironmentConfig, tokenizer: Any) -> None:
    """Check that the chat template supports replies as set. Raises DataError."""
    if config.answers == "turn":
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                "environment.answers is turn, and the tokenizer has no chat template: give model.chat_template, or "
                "answers: inline"
            )
        reply_turn(config, tokenizer, "7")


def reply_turn(config: EnvironmentConfig, tokenizer: Any, reply: str) -> str:
    """Return what the chat template writes after an assistant's text and before the next one, with a reply between.

    Args:
        config: Settings of the environment.
        tokenizer: The tokenizer with the template.
        reply: The reply.

    Raises:
        DataError: The template can't write it.
    """
    turns: list[Message] = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": MARK},
        {"role": config.role, "content": reply},
    ]
    try:
        parts = render_chat(tokenizer, turns, generation=True).split(MARK)
    except BadRow as error:
        raise DataError(f"environment.answers: turn, role: {config.role}: {error}") from error
    if len(parts) != 2 or not TextSearch(restore(parts[1])).has(reply):
        raise DataError(
            f"environment.answers is turn, and the chat template leaves out a {config.role} turn behind an "
            "assistant's: try another role, or answers: inline"
        )
    return parts[1]
