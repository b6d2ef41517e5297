"""A sampler that writes what it is told to, turn by turn."""

from __future__ import annotations

from collections.abc import Sequence

from posttrain.config import SamplingConfig
from posttrain.core.types import Rollout, RolloutGroup
from posttrain.models.tiny_model import tiny_tokenizer
from posttrain.sampling.protocol import OnDone, Request

TOKENIZER = tiny_tokenizer()


def ids(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False)["input_ids"])


class Script:
    """Writes given texts, turn by turn, one list a completion in order of request and number; ends as texts say."""

    def __init__(self, *scripts: list[str]) -> None:
        self.scripts = [list(s) for s in scripts]
        self.asked: list[tuple[str, int | None, int]] = []
        self.order: list[int] | None = None

    def sample(
        self, requests: Sequence[Request], params: SamplingConfig, on_done: OnDone | None = None
    ) -> list[RolloutGroup]:
        if self.order is None:
            self.order = list(range(sum(r.n for r in requests)))
        out, at, going = [], 0, []
        for i, r in enumerate(requests):
            self.asked.append((TOKENIZER.decode(list(r.tokens)), r.max_tokens, r.seed))
            rollouts = []
            for j in range(r.n):
                who = self.order[at]
                text = self.scripts[who].pop(0)
                limit = min(params.max_tokens, r.max_tokens or params.max_tokens)
                tokens = ids(text)[:limit]
                written = TOKENIZER.decode(tokens)
                cut = min((written.find(s) for s in params.stop if s in written), default=-1)
                if "<|im_end|>" in written:
                    finish, shown = "end", written.split("<|im_end|>")[0]
                elif cut >= 0:
                    finish, shown = "stop", written[:cut]
                else:
                    finish, shown = "length", written
                rollouts.append(Rollout(tokens, [-0.5] * len(tokens), finish, shown))
                if on_done is not None:
                    on_done(i, j, rollouts[-1])
                at += 1
                if self.scripts[who]:
                    going.append(who)
            out.append(RolloutGroup(r.tokens, r.example, rollouts))
        self.order = going
        return out
