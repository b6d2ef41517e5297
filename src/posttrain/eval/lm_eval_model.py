"""lm-eval's model interface on the engine: ragged batches that compute a shared prefix once, and the local sampler.

Tokenization, truncation and windows are those of lm-eval's own Hugging Face backend (`lm_eval.models.huggingface`), so
that a task's figures are too. This module imports lm-eval; `posttrain.eval.lm_eval_tasks` checks first that it is
there.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from torch import Tensor

from posttrain.config import SamplingConfig
from posttrain.core.errors import DataError, ModelError
from posttrain.core.types import Sample
from posttrain.data.bad_rows import BadRow
from posttrain.data.template_source import apply_template, template_args
from posttrain.eval.likelihood_tasks import CHUNK_TOKENS
from posttrain.losses.linear_logprobs import chunk_rows
from posttrain.models.language_model import LanguageModel
from posttrain.models.max_length import context
from posttrain.models.vocabulary import output_rows
from posttrain.sampling.engine import LocalSampler
from posttrain.sampling.greedy import greedy
from posttrain.sampling.protocol import Request

CallCounter = Callable[[str, int], Callable[..., None]]
"""(what is done, number of calls) -> a function that counts its calls, and shows them."""
TokenRequest = tuple[Any, list[int], list[int]]
"""A request of a log-likelihood: (its texts, tokens of the context, tokens of the continuation)."""
DEFAULT_ANSWER = 256
"""Longest answer in tokens if a task names none, as in lm-eval."""
SAMPLED_BY = {"temperature", "top_k", "top_p", "min_p"}
CHANGES_NOTHING = {"num_beams": 1, "repetition_penalty": 1.0, "use_cache": True, "num_return_sequences": 1}
"""Generation settings that the sampler has none of, with the value that changes nothing."""
log = logging.getLogger("posttrain")


class EngineLM(TemplateLM):  # type: ignore[misc]
    """Answer lm-eval's requests with a `LanguageModel`."""

    def __init__(self, model: LanguageModel, tokenizer: Any, seed: int = 0, counter: CallCounter | None = None) -> None:
        super().__init__()
        self.model, self.tokenizer, self.seed = model, tokenizer, seed
        self.counter: CallCounter = counter or (lambda what, total: lambda *_: None)
        limits = (context(model.base.config), resolve_max_length(model.base.config, tokenizer))
        self.max_length = min(n for n in limits if n) - (0 if model.virtual is None else model.virtual.count)
        self._device = model.device

    @property
    def eot_token_id(self) -> int:
        """Return the end-of-text token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """Return the token before a text without a context: the beginning of text, or else its end."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        """Return a name of the tokenizer, for lm-eval's keys of caches."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the tokens of a text; special ones are added unless it begins with the beginning of text already."""
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            special = {"add_special_tokens": False}
        return list(self.tokenizer.encode(string, **special))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as text; without its system message if the template refuses such a turn."""
        arguments = template_args(self.tokenizer)
        if not add_generation_prompt:
            arguments["continue_final_message"] = True
        try:
            return apply_template(self.tokenizer, chat_history, add_generation_prompt, None, arguments)
        except BadRow:
            others = [turn for turn in chat_history if turn["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            return apply_template(self.tokenizer, others, add_generation_prompt, None, arguments)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Compute, for each (context, continuation), log p(continuation | context) and if greedy decoding gives it."""
        return super().loglikelihood(requests, disable_tqdm=True)  # type: ignore[no-any-return]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Compute the log-likelihood of each text, of windows of the model's context if it is longer."""
        windows, counts = [], []
        for (text,) in (request.args for request in requests):
            found = list(
                map(
                    utils.make_disjoint_window,
                    utils.get_rolling_token_windows(
                        self.tok_encode(text), self.prefix_token_id, max_seq_len=self.max_length, context_len=1
                    ),
                )
            )
            windows += [(None, *window) for window in found]
            counts.append(len(found))
        scores = iter(self._loglikelihood_tokens(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def _loglikelihood_tokens(self, requests: list[TokenRequest], **_: Any) -> list[tuple[float, bool]]:
        """Score continuations. A request is cut on the left to `max_length` + 1 tokens: the last one is never read."""
        samples: list[Sample] = []
        targets, rows, cut = [], [], 0
        for texts, before, after in requests:
            if not after or len(after) > self.max_length:
                raise DataError(
                    f"a continuation has {len(after)} tokens, expected 1 to {self.max_length} (the model's context): "
                    f"{str(texts)[:200]}"
                )
            whole = (before + after)[-(self.max_length + 1) :]
            cut += len(before) + len(after) > len(whole)
            own = len(after) - 1
            samples.append(Sample(whole[:-1], [0.0] * (len(whole) - 1 - own) + [1.0] * own))
            rows.append(whole[:-1])
            targets.append(after)
        if cut:
            log.warning(
                "%d of %d requests are longer than the model's context of %d tokens, and were cut at their beginning",
                cut, len(requests), self.max_length,
            )  # fmt: skip
        scores: list[tuple[float, bool]] = [(0.0, False)] * len(samples)
        done = self.counter("log-likelihoods", len(samples))
        for numbers in prefix_batches(rows):
            found = self._scores([samples[i] for i in numbers], [targets[i] for i in numbers])
            for i, score in zip(numbers, found, strict=True):
                scores[i] = score
                done()
        return scores

    @torch.inference_mode()
    def _scores(self, samples: list[Sample], targets: list[list[int]]) -> list[tuple[float, bool]]:
        """Return (log-likelihood, is greedy) of the targets that follow the last positions of each sample."""
        batch = self.model.pack(samples)
        hidden_T_H = self.model.hidden_T_H(batch)
        counts = [len(tokens) for tokens in targets]
        predictors = torch.cat([row[-n:] for row, n in zip(batch.whole_rows, counts, strict=True)])
        tokens = torch.tensor([t for tokens in targets for t in tokens], device=predictors.device)
        # Choices of one token ask the same position for several tokens: its logits are computed once.
        positions, inverse = predictors.unique(return_inverse=True)
        order = inverse.argsort(stable=True)
        logprobs, hits = self._logprobs(hidden_T_H[positions], inverse[order], tokens[order])
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        sums = [float(part.sum()) for part in logprobs[back].double().cpu().split(counts)]
        greedy_ones = [bool(part.all()) for part in hits[back].cpu().split(counts)]
        return list(zip(sums, greedy_ones, strict=True))

    def _logprobs(self, hidden_P_H: Tensor, rows_N: Tensor, tokens_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return log p of each token after its position, and if it is the likeliest one.

        Args:
            hidden_P_H: Hidden states.
            rows_N: Number of each token's hidden state, in ascending order.
            tokens_N: The tokens.
        """
        head = self.model.logits_head(packed=True)
        step = min(len(hidden_P_H), chunk_rows(output_rows(self.model.base), hidden_P_H.device))
        product = self.model.backend.linear(step)
        logprobs = torch.empty(len(tokens_N), device=hidden_P_H.device)
        hits = torch.empty(len(tokens_N), dtype=torch.bool, device=hidden_P_H.device)
        for start in range(0, len(hidden_P_H), step):
            logits = head.logits(hidden_P_H[start : start + step], 1.0, product)
            low, high = torch.searchsorted(rows_N, torch.tensor([start, start + step], device=rows_N.device)).tolist()
            rows, tokens = rows_N[low:high] - start, tokens_N[low:high]
            logprobs[low:high] = logits[rows, tokens] - logits.logsumexp(-1)[rows]
            hits[low:high] = logits.argmax(-1)[rows] == tokens
        return logprobs, hits

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Answer each (prompt, settings of generation) until a stop string, the end of text or the longest answer."""
        answers = [""] * len(requests)
        alike: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        for numbers in alike.values():
            prompts = [requests[i].args[0] for i in numbers]
            for i, answer in zip(numbers, self._answers(prompts, requests[numbers[0]].args[1]), strict=True):
                answers[i] = answer
        return answers

    def _answers(self, prompts: Sequence[str], settings: dict[str, Any]) -> list[str]:
        """Answer prompts that have the same settings; a prompt that leaves no room is cut at its beginning."""
        stops, params = self._sampling(settings)
        room = self.max_length - params.max_tokens
        if room < 1:
            raise ModelError(
                f"the task asks for answers of {params.max_tokens} tokens, and the model's context has "
                f"{self.max_length}: lower max_gen_toks in the task's generation_kwargs"
            )
        encoded = [self.tok_encode(prompt) for prompt in prompts]
        if cut := sum(len(tokens) > room for tokens in encoded):
            log.warning(
                "%d of %d prompts leave no room for an answer, and were cut at their beginning", cut, len(encoded)
            )
        encoded = [tokens[-room:] for tokens in encoded]
        if self.model.ragged:
            seeds = np.random.SeedSequence([self.seed, 11]).generate_state(len(encoded), np.uint64)
            asked = [Request(tokens, 1, int(seed)) for tokens, seed in zip(encoded, seeds, strict=True)]
            groups = LocalSampler(self.model, self.tokenizer).sample(asked, params, self.counter("answers", len(asked)))
            texts = [group.rollouts[0].text for group in groups]
        elif params.temperature:
            raise ModelError(
                f"{self.model.base.config.model_type}: the task samples, and this model type's attention gives greedy "
                "answers alone. Set do_sample: false in the task's generation_kwargs"
            )
        else:
            found = greedy(self.model, self.tokenizer, encoded, params.max_tokens)
            texts = [self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in found]
        return [postprocess_generated_text(text, stops, None) for text in texts]

    def _sampling(self, settings: dict[str, Any]) -> tuple[list[str], SamplingConfig]:
        """Return the stop strings of a task's generation settings, and how tokens are drawn.

        Raises:
            ModelError: A setting has no counterpart.
        """
        given = dict(normalize_gen_kwargs(settings, DEFAULT_ANSWER))
        end = self.tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
        stops = [stop for stop in handle_stop_sequences(given.pop("until", None), end) if stop]
        longest, sampled = given.pop("max_gen_toks"), given.pop("do_sample")
        drawn = {name: given.pop(name) for name in SAMPLED_BY & given.keys()}
        unknown = [f"{name}: {value}" for name, value in given.items() if CHANGES_NOTHING.get(name, ...) != value]
        if unknown:
            raise ModelError(
                f"the task's generation_kwargs have {', '.join(unknown)}, which the sampler does not know: expected "
                f"until, max_gen_toks, do_sample, {', '.join(sorted(SAMPLED_BY))}"
            )
        how = drawn if sampled else {"temperature": 0.0}
        return stops, SamplingConfig(**how, max_tokens=longest, stop=stops)


def prefix_batches(rows: Sequence[list[int]]) -> Iterator[list[int]]:
    """Yield the numbers of rows in batches of about CHUNK_TOKENS computed tokens, rows with a common prefix together.

    Args:
        rows: Token ids.
    """
    order = sorted(range(len(rows)), key=rows.__getitem__)
    numbers: list[int] = []
    load = 0
    for i in order:
        shared = shared_length(rows[numbers[-1]], rows[i]) if numbers else 0
        if numbers and load + len(rows[i]) - shared > CHUNK_TOKENS:
            yield numbers
            numbers, load, shared = [], 0, 0
        numbers.append(i)
        load += len(rows[i]) - shared
    if numbers:
        yield numbers


def shared_length(one: Sequence[int], two: Sequence[int]) -> int:
    """Return the length of the longest common prefix of two rows."""
    return next((k for k, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
