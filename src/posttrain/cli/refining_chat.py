"""Chat in which the model revises each answer: the first answer, the feedback and the revisions are shown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from posttrain.cli.conversation import Chat
from posttrain.core.errors import ModelError, RecipeError

if TYPE_CHECKING:
    from posttrain.core.types import Message
    from posttrain.sampling.refine_environment import RefineEnvironment

PLAIN_STOP = "\n\n"
"""Ends a turn of a model without a chat template, which seldom writes an end token."""


def refine_settings(options: Mapping[str, Any], in_chat: bool) -> RefineEnvironment.Config:
    """Return the settings of the loop.

    Args:
        options: rounds, feedback and task, as far as they were given.
        in_chat: True if the model has a chat template.

    Raises:
        RecipeError: An option is wrong.
    """
    from pydantic import ValidationError

    from posttrain.sampling.refine_environment import RefineEnvironment

    values: dict[str, Any] = {"kind": "refine", "answers": "turn" if in_chat else "inline"}
    values |= {} if in_chat else {"stop": [PLAIN_STOP]}
    values |= {{"task": "prompts"}.get(name, name): value for name, value in options.items()}
    if options.get("feedback"):
        values["own"] = False
    try:
        return RefineEnvironment.Config.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        names = {"prompts": "task"}
        option = next((names.get(str(p), str(p)) for p in first["loc"] if isinstance(p, str)), "refine")
        place = ".".join(str(p) for p in first["loc"][2:])
        hint = ""
        if option == "feedback" and first["type"] == "missing":
            hint = f" ({place} is needed: in a recipe, environment: {{kind: refine, feedback: [...]}} has room for it)"
        raise RecipeError(f"--{option}: {first['msg'].removeprefix('Value error, ')}{hint}") from error


def check_refine_options(options: Mapping[str, Any]) -> None:
    """Raise an error if an option is wrong or a source of feedback can't be opened here."""
    from posttrain.sampling.refine_environment import RefineEnvironment

    RefineEnvironment(refine_settings(options, True)).close()


@dataclass
class RefiningChat(Chat):
    """A chat with the self-refine loop. Of each loop the last answer alone stays in the conversation.

    Attributes:
        options: rounds, feedback and task, as far as they were given.
    """

    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from posttrain.sampling.refine_environment import RefineEnvironment

        self.config = refine_settings(self.options, self.tokenizer.chat_template is not None)
        self.environment = RefineEnvironment(self.config)

    def close(self) -> None:
        """Release what the sources of feedback have opened."""
        self.environment.close()

    def show(self, path: str) -> None:
        """Refuse images: feedback and revisions are written as text."""
        raise ModelError("images are not read with --refine: its turns are text")

    def ask(self, text: str) -> Iterator[str]:
        """Send `text`; yield the first answer, feedback and revisions in pieces, with headings between them.

        Closing the iterator stops the loop, and keeps the last answer that was begun.

        Raises:
            ModelError: The conversation is longer than the model's context; `text` is then not kept.
        """
        from posttrain.sampling.multi_turn import shortened_reply

        self.messages.append({"role": "user", "content": text})
        state = self.environment.start({"prompt": text, "messages": list(self.messages), "source": "your prompt"})
        further: list[Message] = []
        answers: list[list[str]] = []
        try:
            while True:
                written: list[str] = []
                if not state.writes_feedback:
                    answers.append(written)
                try:
                    pieces = self.write(further)
                except ModelError:
                    if not further:
                        raise
                    yield "\n[no room in the model's context for another round]"
                    return
                yield from self._until_stop(pieces, written)
                turn = "".join(written).strip()
                reply, done = self.environment.step(state, turn)
                if done:
                    yield self._ending(state)
                    return
                assert reply is not None
                request = shortened_reply(reply, self.tokenizer, self.config.max_reply)
                further += [{"role": "assistant", "content": turn}, {"role": "user", "content": request}]
                yield self._heading(state)
        finally:
            kept = next((a for a in reversed(answers) if a), [])
            if kept:
                self.messages.append({"role": "assistant", "content": "".join(kept)})
            else:
                self.messages.pop()

    def _until_stop(self, pieces: Iterator[str], written: list[str]) -> Iterator[str]:
        """Yield the pieces up to the string that ends a turn in plain text, and add them to `written`."""
        whole, shown = "", 0
        for piece in pieces:
            whole += piece
            start = len(whole) - len(whole.lstrip())  # lines that are empty before the first word end nothing
            end = whole.find(PLAIN_STOP, start) if self.config.stop else -1
            # Line ends may turn out to be the beginning of the string: they are shown with what follows them.
            sure = end if end >= 0 else len(whole.rstrip("\n")) if self.config.stop else len(whole)
            written[:] = [whole[:sure]]
            yield whole[shown:sure]
            shown = sure
            if end >= 0:
                pieces.close()  # type: ignore[attr-defined]
                return

    def _heading(self, state: Any) -> str:
        """Return what the sources said, if they were asked just now, and the name of the turn that comes next."""
        checked = f"\n\n-- checked --\n{self._said(state) or 'nothing to report'}" if self._asked(state) else ""
        return f"{checked}\n\n-- {'feedback' if state.writes_feedback else f'revision {len(state.answers)}'} --\n"

    def _asked(self, state: Any) -> bool:
        return bool(self.environment.sources) and (state.writes_feedback or not self.config.own)

    def _said(self, state: Any) -> str:
        return "\n".join(note.text.strip() for note in state.notes[-1])

    def _ending(self, state: Any) -> str:
        """Return why the loop ended before its last round."""
        if state.stopped == "sources":
            return f"\n\n-- checked: nothing is wrong --\n{self._said(state)}"
        return {"agreement": "\n\n-- the same answer again --", "verdict": "\n\n-- no change --"}.get(state.stopped, "")
