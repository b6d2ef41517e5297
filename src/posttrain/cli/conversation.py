"""A conversation with a model, with answers streamed as they are generated."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from queue import Empty
from typing import TYPE_CHECKING, Any

from posttrain.core.errors import ModelError, PosttrainError
from posttrain.core.image_tokens import IMAGE_MARK, image_spans
from posttrain.core.visible_text import visible

if TYPE_CHECKING:
    from posttrain.config import ModelConfig
    from posttrain.core.types import Message

HELP = (
    "/reset starts over, /system TEXT sets the system message, /image PATH shows an image with your next message, "
    "/quit leaves; Ctrl-C stops an answer"
)


@dataclass
class Chat:
    """A model and a conversation with it; a model without a chat template continues plain text.

    Attributes:
        images: Pictures for the next message.
    """

    model: Any
    tokenizer: Any
    system: str | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0
    messages: list[Message] = field(default_factory=list)
    images: list[Any] = field(default_factory=list)
    _sampler: Any = None

    @classmethod
    def open(cls, config: ModelConfig, **settings: Any) -> Chat:
        """Load the model; `settings` are the fields after `tokenizer`."""
        from posttrain.models.loading import load_model, source_ensemble
        from posttrain.models.model_types import set_attention

        model, tokenizer = load_model(config, inference=source_ensemble(config) is not None)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model  # of a soft prompt
        if getattr(base, "_supports_sdpa", False):
            set_attention(base, "sdpa")
        return cls(model.eval(), tokenizer, **settings)

    def close(self) -> None:
        """Release what was opened besides the model."""

    def prompt_ids(self, further: Sequence[Message] = ()) -> list[int]:
        """Return the conversation so far as token ids, up to where the answer begins.

        further: Turns after it that are not kept. Without a chat template they follow it directly.
        """
        from posttrain.data.chat_template import render_prompt
        from posttrain.data.encoding import with_pictures
        from posttrain.data.special_text import guard
        from posttrain.data.tokenizing import continuation, text_tokens, tokenize

        system: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        if self.tokenizer.chat_template is None:
            ids = list(self.tokenizer("\n".join(m["content"] for m in [*system, *self.messages]))["input_ids"])
            behind = guard("".join(m["content"] for m in further), text_tokens(self.tokenizer))
            return ids + (continuation(self.tokenizer, behind) if behind else [])
        text, pictures = render_prompt(self.tokenizer, [*system, *self.messages, *further])
        return with_pictures(tokenize(self.tokenizer, [text])[0], pictures, self.tokenizer)

    def show(self, path: str) -> None:
        """Show an image with the next message. Raises ModelError if it is none, or if the model reads text alone."""
        from posttrain.data.bad_rows import BadRow
        from posttrain.data.image_reader import image_reader
        from posttrain.data.pictures import read_picture

        if self.tokenizer.chat_template is None:
            raise ModelError("images need a chat template, which says where they stand, and this model has none")
        try:
            picture = read_picture(path)
            image_reader(self.tokenizer).read(picture)
        except BadRow as error:
            raise ModelError(str(error)) from error
        self.images.append(picture)

    def ask(self, text: str) -> Iterator[str]:
        """Send `text`, yield the answer in pieces, and keep both in the conversation.

        Closing the iterator stops the model and keeps the answer so far.

        Raises:
            ModelError: The conversation is longer than the model's context; `text` is then not kept.
        """
        message: Message = {"role": "user", "content": IMAGE_MARK * len(self.images) + text}
        if self.images:
            message["images"] = self.images
        self.messages.append(message)
        try:
            pieces = self.write()
        except ModelError:
            self.messages.pop()
            raise
        self.images = []
        answer: list[str] = []
        try:
            for piece in pieces:
                answer.append(piece)
                yield piece
        finally:
            self.messages.append({"role": "assistant", "content": "".join(answer)})

    def write(self, further: Sequence[Message] = ()) -> Iterator[str]:
        """Return the model's next turn in pieces; see `prompt_ids`.

        Raises:
            ModelError: The conversation is longer than the model's context.
        """
        from posttrain.models.max_length import context

        ids = self.prompt_ids(further)
        longest = context(self.model.config)
        if longest:  # a soft prompt takes a part of it
            longest -= getattr(getattr(self.model, "active_peft_config", None), "num_virtual_tokens", 0)
        if longest and len(ids) >= longest:
            raise ModelError(
                f"the conversation is {len(ids)} tokens and the model's context {longest}: /reset starts over"
            )
        room = min(self.max_new_tokens, longest - len(ids)) if longest else self.max_new_tokens
        return self._whole(ids, room) if image_spans(ids) or self._sampler else self._stream(ids, room)

    def _whole(self, ids: list[int], room: int) -> Iterator[str]:
        """Yield an answer to images as one piece, by the sampler, which reads them for every type of model."""
        from posttrain.config import SamplingConfig
        from posttrain.models.language_model import LanguageModel
        from posttrain.sampling.engine import LocalSampler
        from posttrain.sampling.protocol import Request

        if self._sampler is None:  # from here on the model's attention is the sampler's
            self._sampler = LocalSampler(LanguageModel(self.model), self.tokenizer)
        params = SamplingConfig(temperature=self.temperature, max_tokens=room)
        yield self._sampler.sample([Request(ids, 1, len(self.messages))], params)[0].rollouts[0].text

    def _stream(self, ids: list[int], room: int) -> Iterator[str]:
        """Run `generate` in a thread, with its text in a queue; an error there is raised here."""
        import torch
        from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

        from posttrain.models.soft_prompt import SoftPrompt, soft_prompt_inputs
        from posttrain.models.vocabulary import output_rows, textless_ids
        from posttrain.sampling.protocol import stop_tokens

        stop, failed = threading.Event(), list[BaseException]()

        class Stop(StoppingCriteria):
            def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
                return torch.full((input_ids.shape[0],), stop.is_set(), device=input_ids.device)

        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=0.2)
        soft = SoftPrompt.of(self.model)
        model = self.model if soft is None else self.model.get_base_model()
        ends = stop_tokens(model, self.tokenizer)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else (ends or [0])[0]
        sample = self.temperature > 0
        tokens = torch.tensor([ids], device=model.device)

        def work() -> None:
            try:
                inputs = {"input_ids": tokens} if soft is None else soft_prompt_inputs(self.model, tokens)
                seen = next(iter(inputs.values()))
                model.generate(
                    **inputs,
                    attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device),
                    max_new_tokens=room,
                    do_sample=sample,
                    temperature=self.temperature if sample else None,
                    top_p=None,
                    top_k=None,
                    eos_token_id=ends or None,
                    pad_token_id=pad,
                    streamer=streamer,
                    suppress_tokens=textless_ids(self.tokenizer, output_rows(model)) or None,
                    stopping_criteria=StoppingCriteriaList([Stop()]),
                )
            except BaseException as error:  # the thread must end the stream, whatever happened
                failed.append(error)
                streamer.end()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            while True:
                try:
                    yield next(streamer)
                except StopIteration:
                    break
                except Empty:  # nothing yet: gives Ctrl-C a chance
                    continue
        finally:
            stop.set()
            thread.join()
        if failed:
            raise failed[0]

    def command(self, line: str) -> str | None:
        """Execute a line that begins with a slash; return what to print, or None to leave."""
        name, _, rest = line.partition(" ")
        if name in ("/quit", "/exit"):
            return None
        if name == "/reset":
            self.messages.clear()
            self.images.clear()
            return "a new conversation"
        if name == "/image":
            try:
                self.show(rest.strip())
            except PosttrainError as error:
                return f"error: {error}"
            return "the image is shown with your next message"
        if name == "/system":
            self.system = rest.strip() or None
            self.messages.clear()
            return "system message set; a new conversation" if self.system else "no system message; a new conversation"
        return HELP

    def loop(self) -> None:
        """Read prompts from the terminal (or a pipe) until it ends."""
        interactive = sys.stdin.isatty()
        if interactive:
            print(HELP)
            if self.tokenizer.chat_template is None:
                print("this model has no chat template: it continues your text")
        while True:
            try:
                line = input("\nyou> " if interactive else "").strip()
            except (EOFError, KeyboardInterrupt):
                break
            if not line:
                continue
            if line.startswith("/"):
                reply = self.command(line)
                if reply is None:
                    break
                print(reply)
                continue
            self._answer(line)
        if interactive:
            print()

    def _answer(self, line: str) -> None:
        pieces = self.ask(line)
        try:
            for piece in pieces:
                print(visible(piece), end="", flush=True)
        except KeyboardInterrupt:
            pieces.close()  # type: ignore[attr-defined]
            print(" [stopped]", end="")
        except PosttrainError as error:  # no room, or a source of feedback failed: the conversation goes on
            print(visible(f"error: {error}"), end="")
        print()
