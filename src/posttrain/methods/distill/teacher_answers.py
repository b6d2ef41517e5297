"""Answers that a teacher writes, in this process or behind a server, kept by content.

Each answer is a row for the student: the student's own prompt, then the answer in the student's tokens, then the token
that ends a turn. So the tokenizers of the two may differ. Answers that were cut at the longest length, refused or empty
are left out and counted.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.config.settings import ModelConfig, SamplerConfig
from posttrain.core import distributed
from posttrain.core.errors import DataError, ModelError
from posttrain.core.files import cache_folder, write_lines, write_text
from posttrain.core.image_tokens import extended
from posttrain.core.progress import Track
from posttrain.core.types import Sample
from posttrain.data.tokenizing import continuation
from posttrain.models.loading import pick_device, resolve
from posttrain.sampling.openai_client import NOT_IN_PROTOCOL, Reply, Server
from posttrain.sampling.protocol import Request

PROMPTS_PER_FILE = 64
ANSWER_LAYOUT = "1"
"""Part of the hash: raised when what is kept changes."""
Answer = dict[str, Any]
"""text, finish, tokens (of a teacher in this process), tops (of a server: [token, {text: log-probability}] a place)."""
AskTeacher = Callable[[Sequence["TeacherPrompt"], Sequence[int]], list[list[Answer]]]
"""(prompts, a seed of each) -> the answers to each."""


@dataclass(frozen=True)
class TeacherPrompt:
    """A prompt as both models read it.

    Attributes:
        student: Token ids, generation prompt included.
        teacher: The teacher's token ids; empty for a server.
        example: The row, with its `messages`.
        source: Place of the row.
    """

    student: Sequence[int]
    teacher: Sequence[int]
    example: Mapping[str, Any]
    source: str = ""


@dataclass
class WrittenRows:
    """Rows that a teacher wrote.

    Attributes:
        samples: Rows to train on.
        tops: For each row the likeliest tokens at its places that carry loss, by id (rows of a server), else None.
        counts: How many answers were left out, by reason.
    """

    samples: list[Sample] = field(default_factory=list)
    tops: list[list[dict[int, float]] | None] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


def model_identity(config: ModelConfig) -> dict[str, Any]:
    """Return what decides a model's answers: the hash of its weights if they are on this disk, else its name."""
    sha = resolve(config.source).sha256()
    named = {"sha256": sha} if sha else {"source": config.source, "revision": config.revision}
    quantization = None if config.quantization is None else config.quantization.model_dump()
    device = pick_device(config.device).type
    return {"kind": "local", **named, "dtype": config.dtype, "quantization": quantization, "device": device}


def written_answers(
    prompts: Sequence[TeacherPrompt],
    sampler: SamplerConfig,
    n: int,
    seed: int,
    identity: Mapping[str, Any],
    ask: AskTeacher,
) -> list[list[Answer]]:
    """Return `n` answers to each prompt, from the cache where they are there; each rank asks for a part of the others.

    Args:
        prompts: The prompts.
        sampler: How answers are drawn.
        n: Answers to each prompt.
        seed: A prompt's answers depend on it and on the prompt's number alone.
        identity: What decides the teacher's answers.
        ask: Makes answers.
    """
    drawn = {k: v for k, v in sampler.model_dump(mode="json").items() if k not in ("max_running", "cache_mb")}
    settings = json.dumps([ANSWER_LAYOUT, identity, drawn, n, seed], sort_keys=True, default=str)
    folder = cache_folder() / "teacher" / hashlib.sha256(settings.encode()).hexdigest()[:32]
    seeds = [int(s) for s in np.random.SeedSequence([seed, 6]).generate_state(len(prompts), np.uint64)]
    chunks = [range(i, min(i + PROMPTS_PER_FILE, len(prompts))) for i in range(0, len(prompts), PROMPTS_PER_FILE)]
    paths = [folder / f"{_key([prompts[i] for i in chunk], chunk)}.json" for chunk in chunks]
    found = [_read(path, len(chunk), n) for path, chunk in zip(paths, chunks, strict=True)]
    mine = [c for c, f in enumerate(found) if f is None][distributed.rank() :: distributed.world()]
    if mine:
        folder.mkdir(parents=True, exist_ok=True)
        with Track("teacher's answers", len(mine), shown=distributed.is_main()) as track:
            for done, c in enumerate(mine, 1):
                made = ask([prompts[i] for i in chunks[c]], [seeds[i] for i in chunks[c]])
                write_text(paths[c], json.dumps(made))
                track.update(done)
    distributed.barrier()
    out: list[list[Answer]] = []
    for path, chunk in zip(paths, chunks, strict=True):
        answers = _read(path, len(chunk), n)
        if answers is None:
            raise DataError(
                f"{path} can't be read: it was deleted or damaged since it was written. Run again to resume"
            )
        out += answers
    return out


def _key(prompts: Sequence[TeacherPrompt], numbers: Sequence[int]) -> str:
    asked = [[list(p.teacher), p.example.get("messages"), i] for p, i in zip(prompts, numbers, strict=True)]
    return hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()


def _read(path: Path, count: int, n: int) -> list[list[Answer]] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = isinstance(found, list) and len(found) == count and all(len(answers) == n for answers in found)
    return found if whole else None


def local_ask(sampler: Any, settings: SamplerConfig, n: int) -> AskTeacher:
    """Return what lets a model in this process answer.

    Args:
        sampler: A local sampler.
        settings: How answers are drawn.
        n: Answers to each prompt.
    """

    def ask(prompts: Sequence[TeacherPrompt], seeds: Sequence[int]) -> list[list[Answer]]:
        requests = [Request(p.teacher, n, seed) for p, seed in zip(prompts, seeds, strict=True)]
        groups = sampler.sample(requests, settings)
        return [[{"text": r.text, "finish": r.finish, "tokens": list(r.tokens)} for r in g.rollouts] for g in groups]

    return ask


def server_ask(server: Server, settings: SamplerConfig, n: int, top_k: int | None) -> AskTeacher:
    """Return what lets a server answer.

    Args:
        server: The server.
        settings: How answers are drawn.
        n: Answers to each prompt.
        top_k: Likeliest tokens that are asked for at each place. None: none.

    Raises:
        ModelError: A setting is missing in the protocol.
    """
    for name, off in NOT_IN_PROTOCOL.items():
        if getattr(settings, name) != off:
            raise ModelError(
                f"teacher_sampler.{name} is not in OpenAI's protocol: leave it out, or give the server's own in "
                "teacher.server.options"
            )

    def ask(prompts: Sequence[TeacherPrompt], seeds: Sequence[int]) -> list[list[Answer]]:
        bodies: list[dict[str, Any]] = []
        out: list[list[Answer]] = [[{} for _ in range(n)] for _ in prompts]
        for prompt, seed in zip(prompts, seeds, strict=True):
            if prompt.example.get("tools") or prompt.example.get("template_args"):
                raise DataError(f"{prompt.source} has tools or template arguments, which a server is not given")
            for own in np.random.SeedSequence(seed).generate_state(n):
                body: dict[str, Any] = {"messages": [dict(m) for m in prompt.example["messages"]]}
                body |= {"temperature": settings.temperature, "top_p": settings.top_p, "seed": int(own >> 1)}
                body |= {"max_tokens": settings.max_tokens, "stop": settings.stop or None}
                bodies.append(body | ({} if top_k is None else {"logprobs": True, "top_logprobs": top_k}))

        def keep(number: int, reply: Reply) -> None:
            finish = "refused" if reply.refused else {"stop": "end"}.get(reply.finish, reply.finish or "no reason")
            tops = None if reply.tops is None else [[token, dict(others)] for token, others in reply.tops]
            out[number // n][number % n] = {"text": reply.text, "finish": finish, "tops": tops}

        server.ask(bodies, keep)
        return out

    return ask


def student_rows(
    prompts: Sequence[TeacherPrompt],
    answers: Sequence[Sequence[Answer]],
    tokenizer: Any,
    end: int | None,
    context: int | None,
    same_tokens: bool,
    spelling: Spelling | None = None,
) -> WrittenRows:
    """Make rows of a teacher's answers.

    Args:
        prompts: The prompts.
        answers: The answers to each.
        tokenizer: The student's tokenizer.
        end: Token that ends an answer. None: none.
        context: The student's length in tokens. None: unknown.
        same_tokens: The teacher's token ids are the student's.
        spelling: Reads the likeliest tokens of a server. None: they are not needed.

    Raises:
        DataError: No answer can be used, or the places of most do not fit the student's tokens.
    """
    rows = WrittenRows()
    for prompt, several in zip(prompts, answers, strict=True):
        for answer in several:
            if answer["finish"] not in ("end", "stop"):
                reason = "cut at the longest length" if answer["finish"] == "length" else answer["finish"]
                rows.counts[reason] += 1
                continue
            if not answer["text"].strip():
                rows.counts["empty"] += 1
                continue
            tops = None
            if same_tokens and answer["finish"] == "end" and answer.get("tokens"):
                tokens = list(answer["tokens"])
            else:
                tokens = continuation(tokenizer, answer["text"])
                if spelling is not None:
                    tops = spelling.read(tokens, answer["tops"])
                    if tops is None:
                        rows.counts["tokens that are not the student's"] += 1
                        continue
                if end is not None:
                    tokens = [*tokens, end]
                    tops = None if tops is None else [*tops, {end: 0.0}]
            if context is not None and len(prompt.student) + len(tokens) > context:
                rows.counts["longer than the student's context"] += 1
                continue
            weights = [0.0] * len(prompt.student) + [1.0] * len(tokens)
            rows.samples.append(Sample(extended(prompt.student, tokens), weights, prompt.source))
            rows.tops.append(tops)
    _check(rows, sum(map(len, answers)))
    return rows


def _check(rows: WrittenRows, count: int) -> None:
    strange = rows.counts["tokens that are not the student's"]
    if strange and strange >= len(rows.samples):
        raise DataError(
            f"the server's tokens are not the student's in {strange:,} of {count:,} answers: its model has another "
            "tokenizer, or it tells no log-probabilities, so distributions can't be compared. Train on its text alone "
            "(divergence: null)"
        )
    if not rows.samples:
        why = ", ".join(f"{number:,} {reason}" for reason, number in rows.counts.most_common())
        raise DataError(
            f"none of the teacher's {count:,} answers can be trained on ({why}). Raise teacher_sampler.max_tokens, or "
            "choose a teacher that ends its answers"
        )


def keep_for_people(folder: Path, prompts: Sequence[TeacherPrompt], answers: Sequence[Sequence[Answer]]) -> None:
    """Write every answer into `folder`/teacher.jsonl.

    Args:
        folder: The stage's folder.
        prompts: The prompts.
        answers: The answers to each.
    """
    if distributed.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        both = ((p, a) for p, several in zip(prompts, answers, strict=True) for a in several)
        shown = ({"messages": p.example.get("messages"), "answer": a["text"], "finish": a["finish"]} for p, a in both)
        write_lines(folder / "teacher.jsonl", shown)
    distributed.barrier()


class Spelling:
    """Find the student's token of a text that a server gives for one."""

    def __init__(self, tokenizer: Any) -> None:
        anchor = continuation(tokenizer, "\n")[-1:]
        before = tokenizer.decode(anchor)
        self.texts: dict[int, str] = {}
        ids: dict[str, int] = {}
        twice: set[str] = set()
        special = set(tokenizer.all_special_ids)
        for i in tokenizer.get_vocab().values():
            text = tokenizer.decode([i]) if i in special else tokenizer.decode([*anchor, i])[len(before) :]
            self.texts[i] = text
            if ids.setdefault(text, i) != i:
                twice.add(text)  # parts of a character, above all
        self.ids = {text: i for text, i in ids.items() if text not in twice and text}

    def token(self, text: str) -> int | None:
        """Return a token's id; None: several tokens, or none, have this text. vLLM's "token_id:N" is id N."""
        name, _, number = text.partition(":")
        return int(number) if name == "token_id" and number.isdecimal() else self.ids.get(text)

    def read(self, tokens: Sequence[int], tops: Sequence[Any] | None) -> list[dict[int, float]] | None:
        """Return the likeliest tokens at each place, by id; None if the places are not those of `tokens`.

        Likely tokens that the student lacks are left in the tail.
        """
        if tops is None or len(tops) not in (len(tokens), len(tokens) + 1):  # some servers tell the end's too
            return None
        out = []
        for token, (written, likely) in zip(tokens, tops, strict=False):
            own = self.token(written)
            if own != token and (own is not None or self.texts.get(token) != written):
                return None
            found = {token: float(likely[written])} if written in likely else {}
            for text, logprob in likely.items():
                i = token if text == written else self.token(text)
                if i is not None:
                    found[i] = float(logprob)
            if not found:
                return None
            out.append(found)
        return out
