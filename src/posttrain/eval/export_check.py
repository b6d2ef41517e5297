"""Compare a model with what was exported of it: the same prompts, the next token's distribution, greedy answers.

The exported model is opened from its files alone, by another program where there is one. Tokens of the prompts are
compared too: a wrong tokenizer or chat template changes answers more than rounding does.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from posttrain.config import ModelConfig
from posttrain.core.errors import ModelError
from posttrain.data.template_source import apply_template, template_args
from posttrain.models.language_model import LanguageModel
from posttrain.models.loading import load_model
from posttrain.models.saving import restore_attention
from posttrain.sampling.greedy import greedy
from posttrain.sampling.protocol import stop_tokens

CHECK_PROMPTS = (
    "What is the capital of France?", "Name three colours.", "What is 17 + 25?", "Write one sentence about the sea.",
    "Translate 'good morning' into Spanish.", "Why is the sky blue?", "List two animals that can fly.",
    "Is the number 91 prime?", "Summarise in one sentence: the bridge was closed for repairs, so buses took a detour.",
    "What comes after Wednesday?", "Give a synonym of 'happy'.", "How do I boil an egg?", "Who wrote Hamlet?",
    "Complete the sentence: The early bird", "What is the opposite of 'cold'?", "Explain gravity to a child.",
    "Write a Python function that returns the larger of two numbers.", "How many days has a leap year?",
    "Is this review positive or negative? The plot was dull and far too long.", "Tell me a joke.",
)  # fmt: skip
"""What a check asks: short questions of several kinds, in English."""
ANSWER_TOKENS = 24
"""Length of the greedy answers that are compared."""


@dataclass(frozen=True)
class ExportCheck:
    """Hold what a check found.

    Attributes:
        reader: The program that opened the exported model.
        prompts: How many prompts were compared.
        same_prompts: How many of them are the same tokens.
        same_answers: How many greedy answers are the same tokens.
        kl_mean: KL divergence of the exported model's next-token distribution, mean over prompts, in nats.
        kl_max: The largest.
    """

    reader: str
    prompts: int
    same_prompts: int
    same_answers: int
    kl_mean: float
    kl_max: float


class ExportReader(Protocol):
    """Answer what a check asks of an opened model."""

    name: str

    def tokens(self, prompt: str) -> list[int]:
        """Return the tokens of a prompt, as a turn of a user if there is a chat template."""

    def next_token(self, tokens: Sequence[int]) -> np.ndarray:
        """Return the log-probabilities of the token after these."""

    def answers(self, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        """Return greedy answers of at most `count` tokens, without the end token."""


class OwnReader:
    """Read by posttrain and transformers: the model that is exported, or what was written, opened from its files."""

    name = "transformers"

    def __init__(self, hf: Any, tokenizer: Any) -> None:
        self.hf, self.tokenizer = hf, tokenizer

    def tokens(self, prompt: str) -> list[int]:
        """Return the tokens of a prompt; see `ExportReader`."""
        if not self.tokenizer.chat_template:
            return list(self.tokenizer(prompt)["input_ids"])
        return list(self.tokenizer(rendered(self.tokenizer, prompt), add_special_tokens=False)["input_ids"])

    @torch.no_grad()
    def next_token(self, tokens: Sequence[int]) -> np.ndarray:
        """Return log-probabilities by transformers' own forward pass; see `ExportReader`."""
        given = torch.tensor([list(tokens)], device=self.hf.device)
        return self.hf(input_ids=given).logits[0, -1].double().log_softmax(-1).cpu().numpy()  # type: ignore[no-any-return]

    def answers(self, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        """Return greedy answers by the sampler; see `ExportReader`."""
        try:
            return greedy(LanguageModel(self.hf), self.tokenizer, prompts, count)
        finally:
            restore_attention(self.hf)


class LlamaCppReader:
    """Read by llama.cpp, through the package llama-cpp-python."""

    name = "llama.cpp"

    def __init__(self, file: Path, tokenizer: Any, ends: Sequence[int]) -> None:
        import llama_cpp

        self.llama = llama_cpp.Llama(str(file), n_ctx=1024, logits_all=True, verbose=False)
        self.tokenizer, self.ends = tokenizer, frozenset(ends)
        self.template = self.llama.metadata.get("tokenizer.chat_template")

    def tokens(self, prompt: str) -> list[int]:
        """Return the tokens of a prompt, by the template in the file; see `ExportReader`."""
        if self.template is None:
            return list(self.llama.tokenize(prompt.encode(), add_bos=True, special=True))
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], chat_template=self.template, add_generation_prompt=True,
            tokenize=False, **template_args(self.tokenizer),
        )  # fmt: skip
        return list(self.llama.tokenize(text.encode(), add_bos=False, special=True))

    def next_token(self, tokens: Sequence[int]) -> np.ndarray:
        """Return log-probabilities; see `ExportReader`."""
        self.llama.reset()
        return self._logits(tokens)

    def answers(self, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        """Return greedy answers; see `ExportReader`."""
        found = []
        for prompt in prompts:
            answer, logits = list[int](), self.next_token(prompt)
            while len(answer) < count and int(logits.argmax()) not in self.ends:
                answer.append(int(logits.argmax()))
                logits = self._logits(answer[-1:])
            found.append(answer)
        return found

    def _logits(self, tokens: Sequence[int]) -> np.ndarray:
        self.llama.eval(list(tokens))
        logits = np.array(self.llama.scores[self.llama.n_tokens - 1], dtype=np.float64)
        return logits - np.logaddexp.reduce(logits)  # type: ignore[no-any-return]


class MlxReader:
    """Read by mlx-lm: its model, its tokenizer, and the end tokens that it finds in the folder."""

    name = "mlx-lm"

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        import mlx_lm

        self.model, self.wrapper = mlx_lm.load(str(folder))
        self.arguments = template_args(tokenizer)

    def tokens(self, prompt: str) -> list[int]:
        """Return the tokens of a prompt; see `ExportReader`."""
        if not self.wrapper.chat_template:
            return list(self.wrapper.encode(prompt))
        turn = [{"role": "user", "content": prompt}]
        given: dict[str, Any] = {"add_generation_prompt": True, "tokenize": False, **self.arguments}
        return list(self.wrapper.encode(self.wrapper.apply_chat_template(turn, **given), add_special_tokens=False))

    def next_token(self, tokens: Sequence[int]) -> np.ndarray:
        """Return log-probabilities; see `ExportReader`."""
        import mlx.core as mx

        logits = np.array(self.model(mx.array([list(tokens)]))[0, -1].astype(mx.float32), dtype=np.float64)
        return logits - np.logaddexp.reduce(logits)  # type: ignore[no-any-return]

    def answers(self, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        """Return greedy answers; see `ExportReader`."""
        import mlx_lm

        found = []
        for prompt in prompts:
            steps = mlx_lm.stream_generate(self.model, self.wrapper, list(prompt), max_tokens=count)
            found.append([step.token for step in steps if step.finish_reason != "stop"])
        return found


def rendered(tokenizer: Any, prompt: str) -> str:
    """Return the chat template's text of a user's turn, with the generation prompt."""
    return apply_template(tokenizer, [{"role": "user", "content": prompt}], True, None, template_args(tokenizer))


FORMAT_READERS = {"gguf": LlamaCppReader.name, "ollama": LlamaCppReader.name, "mlx": MlxReader.name}
"""The program that a format is for, if it is used to read it; all others are read by transformers."""
READER_PACKAGES = {LlamaCppReader.name: "llama_cpp", MlxReader.name: "mlx_lm"}


def reader_of(to: str) -> str:
    """Return the name of the program that reads a format here: the one that it is for if it is installed."""
    name = FORMAT_READERS.get(to, OwnReader.name)
    package = READER_PACKAGES.get(name)
    return name if package is not None and importlib.util.find_spec(package) is not None else OwnReader.name


def open_exported(hf: Any, tokenizer: Any, written: Path, to: str = "") -> ExportReader:
    """Open what was written: by the program that it is for if that is installed, else by transformers.

    Args:
        hf: The model that was exported.
        tokenizer: Its tokenizer, which renders the template that llama.cpp reads.
        written: A GGUF file, or a folder in the Hugging Face layout.
        to: The format. If not given: gguf for such a file.

    Raises:
        ModelError: It can't be opened.
    """
    reader = reader_of(to or written.suffix.removeprefix("."))
    try:
        if reader == LlamaCppReader.name:
            return LlamaCppReader(written, tokenizer, stop_tokens(hf, tokenizer))
        if reader == MlxReader.name:
            return MlxReader(written, tokenizer)
        return OwnReader(*load_model(ModelConfig(source=str(written), device="cpu"), torch.float32))
    except Exception as error:  # whatever a reader does with a file that it does not understand
        raise ModelError(
            f"{written} was written, but {reader} can't open it ({type(error).__name__}: {error}): no answers were "
            "compared. A byte-pair tokenizer without merges is such a file. --check 0 leaves the check out"
        ) from error


def check_export(
    hf: Any,
    tokenizer: Any,
    written: Path,
    prompts: Sequence[str] = CHECK_PROMPTS,
    count: int = ANSWER_TOKENS,
    to: str = "",
) -> ExportCheck:
    """Ask a model, and what was written of it, the same prompts.

    KL = sum_v p_v (log p_v - log q_v) with p the model's distribution of the token after the prompt and q the exported
    model's, over the ids that both have; greedy answers are compared token by token.

    Args:
        hf: The model, in float32.
        tokenizer: Its tokenizer.
        written: What was written.
        prompts: Texts, each a turn of a user where there is a chat template.
        count: Length of an answer.
        to: The format; see `open_exported`.
    """
    own, other = OwnReader(hf, tokenizer), open_exported(hf, tokenizer, written, to)
    tokens = [own.tokens(prompt) for prompt in prompts]
    same_prompts = sum(other.tokens(prompt) == ids for prompt, ids in zip(prompts, tokens, strict=True))
    divergences = []
    for ids in tokens:
        p, q = own.next_token(ids), other.next_token(ids)
        size = min(len(p), len(q))
        divergences.append(float((np.exp(p[:size]) * (p[:size] - q[:size])).sum()))
    both = zip(own.answers(tokens, count), other.answers(tokens, count), strict=True)
    same_answers = sum(mine == theirs for mine, theirs in both)
    mean, largest = sum(divergences) / len(divergences), max(divergences)
    return ExportCheck(other.name, len(prompts), same_prompts, same_answers, mean, largest)
