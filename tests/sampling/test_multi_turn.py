"""Turns: what is asked, answered, counted and kept; by a scripted sampler, and by the real one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from posttrain.config import SamplingConfig
from posttrain.config.environment import EnvironmentConfig
from posttrain.core.errors import DataError, PosttrainError, RecipeError, RewardError
from posttrain.core.types import Rollout, Sample
from posttrain.models.language_model import LanguageModel
from posttrain.models.tiny_model import tiny_model, tiny_tokenizer
from posttrain.sampling.engine import LocalSampler
from posttrain.sampling.environments import environment
from posttrain.sampling.multi_turn import TurnSampler, in_turns
from posttrain.sampling.protocol import Request
from tests.sampling.scripted_sampler import TOKENIZER, Script, ids


def settings(**given: Any) -> Any:
    return TypeAdapter(EnvironmentConfig).validate_python({"kind": "calculator", **given})


def run(
    config: Any, *scripts: list[str], n: int | None = None, context: int = 2000, given: Any = None, **sampling: Any
) -> tuple[list[Rollout], Script]:
    script = Script(*scripts)
    sampler = TurnSampler(script, environment(config, given), config, TOKENIZER, context)
    done: list[tuple[int, int, str]] = []
    params = SamplingConfig(**{"max_tokens": 200, **sampling})
    requests = [Request(ids("2+3="), n or len(scripts), 11, {"source": "q:1"})]
    (group,) = sampler.sample(requests, params, lambda i, j, r: done.append((i, j, r.finish)))
    rollouts = list(group.rollouts)
    assert sorted(done) == [(0, j, r.finish) for j, r in enumerate(rollouts)]  # each told of once
    for r in rollouts:
        assert r.mask is not None
        assert [p for p, mine in zip(r.logprobs, r.mask, strict=True) if not mine] == [0.0] * (len(r.mask) - r.length)
        assert r.length == sum(p == -0.5 for p in r.logprobs)
    return rollouts, script


CALL = "<calculate>2+3</calculate>"


def own_and_reply(r: Rollout) -> list[tuple[bool, str]]:
    """Runs of the model's and the environment's text."""
    out: list[tuple[bool, list[int]]] = []
    assert r.mask is not None
    for token, mine in zip(r.tokens, r.mask, strict=True):
        if not out or out[-1][0] != mine:
            out.append((mine, []))
        out[-1][1].append(token)
    return [(mine, TOKENIZER.decode(tokens)) for mine, tokens in out]


def test_a_call_is_answered_and_what_needs_none_is_left_alone() -> None:
    (called, plain), script = run(settings(), [CALL, "\n5<|im_end|>"], ["guess 5<|im_end|>"])
    assert called.text == CALL + "<result>5</result>\n5" and called.finish == "end" and called.replies == 1
    assert own_and_reply(called) == [(True, CALL), (False, "<result>5</result>"), (True, "\n5<|im_end|>")]
    assert plain.text == "guess 5" and plain.finish == "end" and plain.replies == 0
    # The second turn goes on from all that is there; its budget is what is left.
    assert script.asked[1][:2] == ("2+3=" + CALL + "<result>5</result>", 200 - len(CALL))


def test_several_turns_errors_in_words_and_the_most_turns() -> None:
    scripts = [["<calculate>1/0</calculate>", "<calculate>x</calculate>", "5</calculate>", "so 5<|im_end|>"]]
    (r,), _ = run(settings(), *scripts)
    assert [text for mine, text in own_and_reply(r) if not mine] == [
        "<result>error: division by zero</result>",
        "<result>error: not arithmetic: x</result>",
        "<result>error: no <calculate> before </calculate></result>",
    ]
    (r,), _ = run(settings(max_turns=2), [CALL, CALL, CALL])
    assert r.finish == "turns" and r.replies == 2 and r.text.endswith(CALL)
    assert r.text.count("<result>") == 2


def test_budgets() -> None:
    """max_tokens bounds what the model writes over all turns; the context everything."""
    (r,), _ = run(settings(), [CALL, "0123456789"], max_tokens=len(CALL) + 4)
    assert r.finish == "length" and r.length == len(CALL) + 4 and r.text.endswith("</result>0123")
    # The call uses it all up: no reply, so that what stands last is the model's.
    (r,), _ = run(settings(), [CALL], max_tokens=len(CALL))
    assert r.finish == "length" and r.text == CALL and r.replies == 0
    reply = len("<result>5</result>")
    for spare, finish in ((1, "end"), (0, "length")):
        (r,), _ = run(settings(), [CALL, "<|im_end|>"], context=len("2+3=" + CALL) + reply + spare)
        assert r.finish == finish and r.replies == spare
    (r,), _ = run(settings(max_reply=10), [CALL, "5<|im_end|>"])
    assert own_and_reply(r)[1] == (False, "<result>5< [cut]")
    (group,) = TurnSampler(Script(["abc"]), environment(settings()), settings(), TOKENIZER, 99).sample(
        [Request([5], 1, 0, {}, max_tokens=2)], SamplingConfig()
    )
    assert group.rollouts[0].length == 2


def test_a_stop_string_of_the_recipe_ends_it_all() -> None:
    (r,), _ = run(settings(), [CALL, " five;"], stop=[";"])
    assert r.finish == "stop" and r.text == CALL + "<result>5</result> five"
    (r,), _ = run(settings(), ["a;" + CALL], stop=[";"])  # whichever comes first
    assert r.finish == "stop" and r.text == "a"


class Guessing:
    """Think of a number: says higher or lower; done when it is found, or when the model gives up."""

    def __init__(self, high: int = 9) -> None:
        self.high = high

    def start(self, example: Any) -> dict[str, int]:
        return {"asked": 0}

    def step(self, state: dict[str, int], text: str) -> tuple[str | None, bool]:
        state["asked"] += 1
        if "give up" in text:
            return None, True
        if "hm" in text:
            return None, False
        n = int(text.split("?")[0].removesuffix("<|im_end|>"))
        word = "right" if n == 5 else "lower" if n > 5 else "higher"
        return f"{word} ({state['asked']}, up to {self.high})", n == 5


def test_an_environment_of_ones_own_in_turns_of_the_template() -> None:
    config = settings(kind="function", function="guessing", answers="turn", options={"high": 7})
    scripts = [["7<|im_end|>", "5<|im_end|>"], ["give up<|im_end|>"], ["hm<|im_end|>"]]
    rollouts, script = run(config, *scripts, given={"guessing": Guessing})
    a, b, c = rollouts
    turn = "\n<|im_start|>user\nlower (1, up to 7)<|im_end|>\n<|im_start|>assistant\n"
    assert own_and_reply(a)[:3] == [(True, "7<|im_end|>"), (False, turn), (True, "5<|im_end|>")]
    assert own_and_reply(a)[3][1].startswith("\n<|im_start|>user\nright (2, up to 7)<|im_end|>")
    assert a.finish == "stop" and b.finish == "stop" and c.finish == "end"
    assert b.text == "give up" and c.text == "hm" and "right (2, up to 7)" in a.text
    assert script.asked[1][0] == "2+3=7<|im_end|>" + turn
    # What the template makes of the same conversation is what the model saw.
    told = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "7"},
        {"role": "user", "content": "lower (1, up to 7)"},
    ]
    text = TOKENIZER.apply_chat_template(told, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>assistant\n7<|im_end|>" + turn)
    # At a stop string the turn is closed for the model.
    config = settings(kind="function", function="guessing", answers="turn", role="tool", stop=["?"])
    (r,), _ = run(config, ["3?", "5?"], given={"guessing": Guessing})
    assert own_and_reply(r)[1][1].startswith("<|im_end|>\n<|im_start|>tool\nhigher (1, up to 9)<|im_end|>\n")


def test_going_on_without_a_reply() -> None:
    config = settings(kind="function", function="g", stop=["?"])
    (r,), script = run(config, ["hm?", "5?"], given={"g": Guessing})
    assert own_and_reply(r) == [(True, "hm?5?"), (False, "right (2, up to 9)")]
    assert script.asked[1][:2] == ("2+3=hm?", 197)


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(ValueError, match="would never be called"):
        settings(kind="function", function="m:f")
    with pytest.raises(ValueError, match="can't be told apart"):
        settings(opening="<c>", closing="<c>")
    with pytest.raises(ValueError, match=r"expected text with {result} in it"):
        settings(reply="5")
    with pytest.raises(RecipeError, match="makes a dict, which has no start and no step"):
        environment(settings(kind="function", function="f", stop=["?"]), {"f": dict})
    with pytest.raises(RewardError, match="module 'nowhere' can't be imported"):
        environment(settings(kind="function", function="nowhere:f", stop=["?"]))
    config = settings(kind="function", function="g", stop=["?"])
    with pytest.raises(PosttrainError, match=r"environment g: step failed for q:1: ValueError: invalid literal"):
        run(config, ["what?"], given={"g": Guessing})
    with pytest.raises(RecipeError, match="min_tokens"):
        run(settings(), ["x"], min_tokens=2)
    strict = tiny_tokenizer()
    strict.chat_template = (
        "{% for m in messages %}{% if m['role'] != 'tool' %}[{{ m['content'] }}]{% endif %}{% endfor %}"
    )
    with pytest.raises(DataError, match="leaves out or changes turn 3, the tool's"):
        TurnSampler(Script(), Guessing(), settings(answers="turn", role="tool"), strict, 99)
    strict.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        TurnSampler(Script(), Guessing(), settings(answers="turn"), strict, 99)


class Echo:
    """Answers each letter e with some text, of bytes that take several tokens to a character."""

    def start(self, example: Any) -> list[str]:
        return []

    def step(self, state: list[str], text: str) -> tuple[str | None, bool]:
        state.append(text)
        return f" né{len(state)} ", False


def test_a_text_in_turns() -> None:
    """Bytes are tokens here. The last turn may be cut at a stop string; texts that don't add up say nothing."""

    def rollout(parts: list[tuple[bool, str]], text: str) -> Rollout:
        tokens = [t for _, said in parts for t in ids(said)]
        mask = [mine for mine, said in parts for _ in ids(said)]
        return Rollout(tokens, [0.0] * len(tokens), "stop", text, mask=mask)

    parts = [(True, "7+4>"), (False, "=11"), (True, "so 11;")]
    assert in_turns(rollout(parts, "7+4>=11so 11;"), TOKENIZER) == parts
    assert in_turns(rollout(parts, "7+4>=11so 11"), TOKENIZER) == [*parts[:2], (True, "so 11")]
    assert in_turns(rollout(parts, "7+4>=11"), TOKENIZER) == parts[:2]
    assert in_turns(rollout(parts[:2], "7+4>=11"), TOKENIZER) == parts[:2]
    assert in_turns(rollout(parts, "7+4> =11 so 11"), TOKENIZER) == []
    assert in_turns(rollout(parts[:1], "7+4>"), TOKENIZER) == []


@pytest.mark.parametrize("answers", ["inline", "turn"])
def test_the_real_sampler(answers: str) -> None:
    """Log-probabilities are the learner's, of what the model wrote, given all before; the same again, and alone."""
    torch.manual_seed(0)
    lm = LanguageModel(tiny_model("llama"))
    config = settings(kind="function", function="echo", stop=["e", "a", "1"], max_turns=3, answers=answers)
    local = LocalSampler(lm, TOKENIZER)
    sampler = TurnSampler(local, Echo(), config, TOKENIZER, local.context)
    params = SamplingConfig(max_tokens=80, temperature=0.8)
    requests = [Request(ids(f"{i} plus {i} ="), 4, 5 + i, {"source": "q"}) for i in range(3)]
    groups = sampler.sample(requests, params)
    again = sampler.sample(requests, params)
    alone = sampler.sample(requests[1:2], params)
    replies = 0
    for group, other in zip(groups, again, strict=True):
        assert [r.tokens for r in group.rollouts] == [r.tokens for r in other.rollouts]
        for r in group.rollouts:
            replies += r.replies
            assert r.finish in ("end", "length", "turns") and (r.finish == "turns") <= (r.replies == 3)
            whole = [*group.prompt, *r.tokens]
            batch = lm.pack([Sample(whole, [0.0] * len(whole))])
            with torch.no_grad():
                logp = lm(batch, "logprobs", batch.rows[0][len(group.prompt) :], temperature=0.8)[0]
            assert r.mask is not None
            for mine, sampled, learner in zip(r.mask, r.logprobs, logp.tolist(), strict=True):
                assert sampled == (pytest.approx(learner, abs=1e-4) if mine else 0.0)
            text = TOKENIZER.decode(
                list(r.tokens[:-1]) if r.finish == "end" else list(r.tokens), skip_special_tokens=True
            )
            assert r.text == text and r.text.count("né") == r.replies
            parts = in_turns(r, TOKENIZER)
            assert "".join(said for _, said in parts) == (r.text if r.replies else "")
            replied = [said for mine, said in parts if not mine]
            assert len(replied) == r.replies and all(f"né{i}" in said for i, said in enumerate(replied, 1))
            assert not any("né" in said for mine, said in parts if mine)
    assert replies > 8
    assert [r.tokens for r in alone[0].rollouts] == [r.tokens for r in groups[1].rollouts]
    assert len({r.tokens for g in groups for r in g.rollouts}) > 8  # turns of different completions differ
