"""Where the program waits for the GPU: synchronisations of a training step and of sampling, by line of the source."""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import posttrain
from gpu.base import DRY, SMALL, Account, Where, build, byte_tokenizer, random_samples
from gpu.sampler import asked, drawn
from posttrain.config import OptimizerConfig, SystemsConfig
from posttrain.models.language_model import LanguageModel
from posttrain.sampling.engine import LocalSampler
from posttrain.trainer.train_step import Learner

SOURCE = Path(posttrain.__file__).parent


def place() -> str:
    """The innermost line of the package on the stack, or of whoever else is innermost."""
    stack = [f for f in traceback.extract_stack() if Path(f.filename) != Path(__file__)]
    own = [f for f in stack if Path(f.filename).is_relative_to(SOURCE)]
    frame = own[-1] if own else stack[-1]
    name = Path(frame.filename)
    return f"{name.relative_to(SOURCE) if own else name}:{frame.lineno} {frame.name}"


@contextmanager
def counted(where: Where) -> Iterator[Counter[str]]:
    """Counts synchronisations by place; none on a CPU, which has none."""
    found: Counter[str] = Counter()
    if not where.cuda:
        yield found
        return

    def show(message: Any, category: Any, *rest: Any, **named: Any) -> None:
        if "synchroniz" in str(message):
            found[place()] += 1

    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")


def report(account: Account, name: str, found: Counter[str], per: int = 1) -> None:
    account.numbers[name] = {"in all": found.total(), "per step": round(found.total() / per, 2)}
    account.numbers[f"{name}, where"] = dict(found.most_common(10))


def check(where: Where) -> Account:
    """One step of SFT in two micro-batches, and sampling of a few dozen tokens, after each was done once unwatched."""
    account, shape = Account(), where.pick(SMALL, DRY)
    dtype = torch.bfloat16 if where.cuda else torch.float32
    model = LanguageModel(build(shape, dtype, where.device, head_dim=64))
    samples = random_samples(8, 20, where.pick(200, 40), shape["vocab_size"])
    total = sum(map(len, samples))
    learner = Learner(model, OptimizerConfig(), SystemsConfig(tokens_per_micro_batch=total // 2 + 100), 4)
    sampler = LocalSampler(model, byte_tokenizer(shape["vocab_size"]))
    requests, longest = asked(where, 4, shape["vocab_size"]), where.pick(40, 8)
    works: dict[str, tuple[Callable[[], Any], int]] = {
        "a step of SFT": (lambda: learner.step(samples), 1),
        "sampling": (lambda: drawn(sampler, requests, 1.0, longest), longest),
    }
    for name, (work, per) in works.items():
        try:
            work()
            with counted(where) as found:
                work()
            report(account, name, found, per)
        except Exception as error:
            account.attempt(name, error)
    if where.cuda:
        account.true("some are seen", bool(account.numbers.get("sampling", {}).get("in all")))
    account.note = ", ".join(f"{n}: {account.numbers[n]['per step']}" for n in works if n in account.numbers)
    return account
