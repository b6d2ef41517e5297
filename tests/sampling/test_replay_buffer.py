"""Completions that grow piece by piece, and rare successes that are kept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from posttrain.config import ReplayConfig, SamplingConfig
from posttrain.core.types import PartialRollout, Rollout
from posttrain.methods.rl.replay import Replay
from posttrain.sampling.replay_buffer import PARTIAL, Growth, rollout_from_json, rollout_to_json


def letters(tokens: Sequence[int], plain: bool) -> str:
    """Token 0 ends a text and is special; 1 to 26 are letters."""
    return "".join("$" if t == 0 else chr(96 + t) for t in tokens if t or not rollout_to_json)


def growth(tokens: int | None = 3, context: int = 100, **sampling: object) -> Growth:
    return Growth(tokens, SamplingConfig.model_validate({"max_tokens": 8, **sampling}), context, letters)


def piece(text: str, finish: str = "length") -> Rollout:
    tokens = [0 if c == "$" else ord(c) - 96 for c in text]
    return Rollout(tokens, [-0.5 - 0.01 * t for t in tokens], finish, text.rstrip("$"))


def test_a_completion_grows_and_remembers_what_sampled_it() -> None:
    g = growth()
    first = g.grown(5, None, piece("abc"), step=4, temperature=1.0)
    assert first.finish == PARTIAL and g.asked() == 3 and g.asked(first) == 3
    second = g.grown(5, first, piece("def"), step=5, temperature=1.25)
    assert second.finish == PARTIAL and g.asked(second) == 2
    third = g.grown(5, second, piece("g$", "end"), step=7, temperature=0.75)
    assert third.finish == "end" and third.text == "abcdefg"
    assert list(third.tokens) == [1, 2, 3, 4, 5, 6, 7, 0]
    assert list(third.logprobs) == [*piece("abc").logprobs, *piece("def").logprobs, *piece("g$").logprobs]
    assert third.pieces == (PartialRollout(3, 4, 1.0), PartialRollout(3, 5, 1.25), PartialRollout(2, 7, 0.75))


def test_what_is_as_long_as_it_may_be_has_ended() -> None:
    g = growth()
    two = g.grown(5, g.grown(5, None, piece("abc"), 0, 1.0), piece("abc"), 1, 1.0)
    assert g.grown(5, two, piece("xy"), 2, 1.0).finish == "length"
    assert growth(context=9).grown(5, None, piece("abc"), 0, 1.0).finish == PARTIAL
    assert growth(context=8).grown(5, None, piece("abc"), 0, 1.0).finish == "length"  # no room for one more
    assert growth(context=7).grown(5, None, piece("ab"), 0, 1.0).finish == "length"  # cut short by the context
    assert growth(None).grown(5, None, piece("abc"), 0, 1.0).finish == "length" and growth(None).asked() is None


def test_a_stop_string_across_the_seam_ends_it_there() -> None:
    g = growth(stop=["cde", "zz"])
    first = g.grown(5, None, piece("abc"), 0, 1.0)
    joined = g.grown(5, first, piece("def"), 1, 1.0)
    assert joined.finish == "stop" and joined.text == "ab"
    assert list(joined.tokens) == [1, 2, 3, 4, 5] and len(joined.logprobs) == 5
    assert joined.pieces == (PartialRollout(3, 0, 1.0), PartialRollout(2, 1, 1.0))
    inside = g.grown(5, first, replace(piece("xzz", "stop"), text="x"), 1, 1.0)
    assert inside.finish == "stop" and inside.text == "abcx" and len(inside.tokens) == 6
    assert g.grown(5, first, piece("xyx"), 1, 1.0).finish == PARTIAL
    special = g.grown(5, g.grown(5, None, piece("a$c"), 0, 1.0), piece("$zz"), 1, 1.0)
    assert special.finish == "stop" and special.text == "ac"  # as any other text, without special tokens


def right(step: int, surprise: float, reward: float = 1.0) -> Rollout:
    return Rollout(
        (1, 2), (-surprise, -surprise), "end", "ab", {"right": reward}, reward, pieces=(PartialRollout(2, step, 1.0),)
    )


def test_rare_successes_are_kept_and_stand_in() -> None:
    wrong = [right(0, 0.1, 0.0)] * 7
    replay = Replay(ReplayConfig(rare=0.25, size=2), max_staleness=3)
    assert replay.visit(5, wrong, 1.0) is None and not replay.kept
    assert replay.visit(5, [*wrong[:6], right(0, 0.9), right(0, 0.3)], 1.0) is None
    assert replay.kept[5] == right(0, 0.3)  # the least surprising
    assert replay.visit(5, wrong, 1.0) == right(0, 0.3)
    assert replay.visit(5, [], 1.0) is None  # nothing was judged
    replay.visit(5, [right(1, 0.5), right(1, 0.5), right(1, 0.4), *wrong[:5]], 1.0)  # 3 of 8: rare no longer
    assert not replay.kept
    for problem in (1, 2, 3):
        replay.visit(problem, [right(problem, 0.5), *wrong], 1.0)
    assert list(replay.kept) == [2, 3]  # the oldest left
    assert replay.expire(5) == 0 and replay.expire(6) == 1 and list(replay.kept) == [3]


def test_state_comes_back_to_the_bit() -> None:
    odd = Rollout(
        (1, 2), (-0.1234567890123456789, -1e-30), "end", "é", {"a": 1 / 3}, 1 / 3, pieces=(PartialRollout(2, 3, 1.1),)
    )
    assert rollout_from_json(json.loads(json.dumps(rollout_to_json(odd)))) == odd
    turns = Rollout((1, 2), (-0.5, 0.0), "stop", mask=(True, False), steps={"s": ((0, 1, 0.5),)})
    back = rollout_from_json(json.loads(json.dumps(rollout_to_json(turns))))
    assert back.mask == (True, False) and list(back.own) == [0] and list(back.steps["s"][0]) == [0, 1, 0.5]
    replay = Replay(ReplayConfig(), 3)
    replay.visit(7, [right(0, 0.5), *[right(0, 0.1, 0.0)] * 5], 1.0)
    other = Replay(ReplayConfig(), 3)
    other.load_state_dict(json.loads(json.dumps(replay.state_dict())))
    assert other.kept == replay.kept
