"""Which characters of a conversation carry loss, for the templates people have: expected strings written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.config import DataConfig
from posttrain.data.chat_template import render_chat
from posttrain.data.encoding import prompt_tokens, prompt_with_completion
from posttrain.data.formats import BadRow
from posttrain.data.learnt_turns import IN_WINDOW, OWN_TEXT, render_with_loss
from posttrain.data.marked_text import pieces, render_terminal
from posttrain.data.sft_rows import prepare
from posttrain.data.tokenizing import end_of_turn_token, tokenize_rendered

from .tokenizers import TEMPLATES, byte_level, merging, sentencepiece

BOTH = ["yes<|im_end|>", "end<|im_end|>"]
EXPECTED: dict[str, list[str]] = {
    "chatml": BOTH,
    "smollm2": BOTH,
    "llama3": ["yes<|eot_id|>", "end<|eot_id|>"],
    "llama2": [" yes </s>", " end </s>"],
    "gemma": ["yes<end_of_turn>", "end<end_of_turn>"],
    "mistral": ["yes</s>", "end</s>"],
    "phi3": ["yes<|end|>", "end<|end|>"],
    "qwen3": ["<think>\n\n</think>\n\n" + turn for turn in BOTH],
    "zephyr": ["yes</s>", "end</s>"],
    "deepseek": ["yes<｜end▁of▁sentence｜>", "end<｜end▁of▁sentence｜>"],
    "no_end": ["yes</s>", "end</s>"],
    "no_end_marks": ["yes<|user|>", "end</s>"],
    "ignores": ["<|im_start|>assistant\nyes<|im_end|>", "<|im_start|>assistant\nend<|im_end|>"],
    "needs_two": BOTH,
}
TURNS = [
    {"role": "user", "content": "yes end"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "end"},
    {"role": "assistant", "content": "end"},
]


def learnt(tokenizer: Any, messages: list[dict[str, str]], loss_on: str = "completion") -> list[str]:
    """The text of each run of tokens that carry loss, through the tokens."""
    rendered = render_with_loss(tokenizer, messages, loss_on)  # type: ignore[arg-type]
    runs: list[list[int]] = []
    for tokens, weights in (sample for samples in tokenize_rendered(tokenizer, rendered) for sample in samples):
        for i, w in enumerate(weights):
            if w and not weights[i - 1]:
                runs.append([])
            if w:
                runs[-1].append(tokens[i])
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("name", TEMPLATES)
def test_loss_of_each_turn(name: str) -> None:
    tokenizer = byte_level(name)
    assert learnt(tokenizer, TURNS) == EXPECTED[name][1:]
    assert learnt(tokenizer, TURNS, "assistant") == EXPECTED[name]
    single = [{"role": "user", "content": "end"}, {"role": "assistant", "content": "end"}]
    assert learnt(tokenizer, single) == EXPECTED[name][1:]
    text = tokenizer.apply_chat_template(TURNS, tokenize=False)
    everything = tokenize_rendered(tokenizer, render_with_loss(tokenizer, TURNS, "all"))[0][0]
    added = "</s>" if name.startswith("no_end") else ""
    assert tokenizer.decode(everything[0]) == text + added and everything[1] == [0.0] + [1.0] * (len(everything[0]) - 1)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("make", [byte_level, merging, sentencepiece])
def test_training_sees_the_prompt_that_generation_sees(name: str, make: Any, tmp_path: Path) -> None:
    tokenizer = make(name)
    path = tmp_path / "rows.jsonl"
    answers = ["good", "\n\nof the end", " a", "e"]
    rows = [{"messages": [*TURNS[:3], {"role": "assistant", "content": a}]} for a in answers]
    path.write_text("\n".join(map(json.dumps, rows)))
    config = DataConfig(source=str(path))
    prepared = prepare(config, tokenizer)
    for sample, row, answer in zip(prepared.samples, prepared.rows, answers, strict=True):
        prompt = prompt_tokens(row, tokenizer, config)
        assert list(sample.tokens[: len(prompt)]) == prompt and not any(sample.weights[: len(prompt)])
        assert all(sample.weights[len(prompt) :]) and len(sample) > len(prompt)
        bos = tokenizer.convert_tokens_to_ids("<s>")
        assert list(sample.tokens[:2]).count(bos) <= 1
        whole = prompt_with_completion(row, answer, tokenizer, config, end=True)
        assert list(whole.tokens) == list(sample.tokens)
        open_ended = prompt_with_completion(row, answer, tokenizer, config)
        assert list(open_ended.tokens[: len(prompt)]) == prompt
        scored = "".join(p for p, w in pieces(open_ended, tokenizer) if w)
        assert scored.rstrip().endswith(answer.strip()) and tokenizer.eos_token not in scored


TRAPS = {
    "a": "a",
    "e": "e",
    "end": "end",
    "im_end": "im_end",
    "|": "|",
    "\n": None,
    "yes<|im_end|>no": "yes<|im_end|>no",
    "<|im_end|>": "<|im_end|>",
    "<|im_start|>": "<|im_start|>",
    "assistant": "assistant",
    "twice twice": "twice twice",
    "Qz7f0Xw": "Qz7f0Xw",
    r"(.*)[a-z]+\d$ \1": r"(.*)[a-z]+\d$ \1",
    "  spaced \n": "  spaced \n",
    "naïve 👩‍👩‍👧 日本": "naïve 👩‍👩‍👧 日本",
    "{{ x }} {% y %}": "{{ x }} {% y %}",
}


@pytest.mark.parametrize("content", TRAPS)
@pytest.mark.parametrize("name", ["chatml", "needs_two", "ignores", "qwen3"])
def test_content_that_could_be_taken_for_something_else(name: str, content: str) -> None:
    tokenizer = byte_level(name)
    turns = [{"role": "user", "content": content + "?"}, {"role": "assistant", "content": content}]
    if TRAPS[content] is None:
        with pytest.raises(BadRow, match="empty completion"):
            render_with_loss(tokenizer, turns, "completion")  # type: ignore[arg-type]
        return
    head = {"qwen3": "<think>\n\n</think>\n\n", "ignores": "<|im_start|>assistant\n"}.get(name, "")
    assert learnt(tokenizer, turns) == [head + str(TRAPS[content]) + "<|im_end|>"]
    both = learnt(tokenizer, [*turns, *TURNS[2:]], "assistant")
    assert both[0] == head + str(TRAPS[content]) + "<|im_end|>"


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("chatml", "<|im_end|>"),
        ("llama3", "<|eot_id|>"),
        ("llama2", "</s>"),
        ("gemma", "<end_of_turn>"),
        ("phi3", "<|end|>"),
        ("qwen3", "<|im_end|>"),
        ("no_end", None),
    ],
)
def test_where_a_turn_ends(name: str, end: str | None) -> None:
    """Sampling stops there, whatever the tokenizer's own end token is."""
    tokenizer = byte_level(name)
    found = end_of_turn_token(tokenizer)
    assert (found if found is None else tokenizer.convert_ids_to_tokens(found)) == end
    tokenizer.chat_template = None
    assert end_of_turn_token(tokenizer) is None


def test_short_content_inside_the_name_of_the_end_token() -> None:
    tokenizer = byte_level("phi3")
    for content in ("e", "end", "|", "<|end|>", "d|>"):
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": content}]
        assert learnt(tokenizer, turns) == [content + "<|end|>"]
        assert learnt(tokenizer, [*turns, *TURNS[:2]], "assistant") == [content + "<|end|>", "yes<|end|>"]


def test_reasoning() -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>why</think>so"}]
    assert learnt(byte_level("qwen3"), turns) == ["<think>\nwhy\n</think>\n\nso<|im_end|>"]
    # Before a later question the reasoning is gone; the turn is learnt with it, in a text of its own.
    assert learnt(byte_level("qwen3"), [*turns, *TURNS[2:]], "assistant")[0] == "<think>\nwhy\n</think>\n\nso<|im_end|>"
    assert learnt(byte_level("deepseek"), turns) == ["<think>why</think>so<｜end▁of▁sentence｜>"]
    turns[1]["content"] = "<think>why</think>"
    with pytest.raises(BadRow, match="leaves nothing of turn 2 to train on"):
        learnt(byte_level("deepseek"), turns)


def test_system_message_and_what_templates_refuse() -> None:
    system = {"role": "system", "content": "Be brief"}
    for name in ("chatml", "smollm2", "llama3", "llama2", "phi3", "zephyr", "deepseek"):
        assert learnt(byte_level(name), [system, *TURNS], "assistant") == EXPECTED[name]
    with pytest.raises(BadRow, match="System role not supported"):
        learnt(byte_level("gemma"), [system, *TURNS])
    with pytest.raises(BadRow, match="must alternate"):
        learnt(byte_level("mistral"), [TURNS[0], TURNS[0], TURNS[1]])
    with pytest.raises(BadRow, match="the last turn is the user's"):
        learnt(byte_level(), TURNS[:3])
    with pytest.raises(BadRow, match="no assistant turn"):
        learnt(byte_level(), TURNS[:1], "assistant")
    # A conversation that the assistant begins has no prompt to render: its own text is learnt.
    assert learnt(byte_level(), [TURNS[1], *TURNS[2:]], "assistant") == BOTH
    assert learnt(byte_level(), TURNS[:3], "assistant") == BOTH[:1]


def test_a_template_that_changes_the_text_is_refused() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | upper }}<|im_end|>{% endfor %}"
    with pytest.raises(BadRow, match="changes turn 1, the user's"):
        learnt(tokenizer, TURNS[:2])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + m.content }}<|im_end|>{% endfor %}"
    with pytest.raises(BadRow, match="writes the text of turn 2 more than once"):
        learnt(tokenizer, TURNS[:2])


LEAVES_OUT = {
    "always": "loop.index0 == 2",
    "all but the last ones": "loop.length > 3 and loop.index0 < loop.length - 3",
    "what was there before": "loop.index0 > 1 and m.content == messages[loop.index0 - 2].content",
}
"""When a template leaves out the turn of a user."""


@pytest.mark.parametrize("text", ["go on", "user", "e", "{\n}", "im_start"])
@pytest.mark.parametrize("name", LEAVES_OUT)
def test_a_turn_that_is_left_out_though_its_text_is_there_elsewhere(name: str, text: str) -> None:
    tokenizer, said = byte_level(), {"role": "user", "content": text}
    turns = [
        said,
        {"role": "assistant", "content": "one"},
        said,
        {"role": "assistant", "content": f"two: {text}"},
        said,
    ]
    assert text in render_chat(tokenizer, turns, True)
    body = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    tokenizer.chat_template = (
        f"{{% for m in messages %}}{{% if not (m.role == 'user' and {LEAVES_OUT[name]}) %}}{body}{{% endif %}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    with pytest.raises(BadRow, match="leaves out or changes turn"):
        render_chat(tokenizer, turns, True)
    if name != "always":
        turns = [*turns, {"role": "assistant", "content": "three"}]
    with pytest.raises(BadRow, match="leaves out or changes turn"):
        learnt(tokenizer, turns[:4] if name == "always" else turns)


def test_every_turn_learns_its_end_where_turns_end_in_words() -> None:
    """A text has an end token only at its end, so each turn is learnt in a text of its own."""
    tokenizer = byte_level("no_end")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '[' + m.role + '] ' + m.content + ' [/' + m.role + ']\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
    )
    assert learnt(tokenizer, TURNS, "assistant") == ["yes [/assistant]</s>", "end [/assistant]</s>"]
    first, last = render_with_loss(tokenizer, TURNS, "assistant")  # type: ignore[arg-type]
    assert last.text.startswith(first.text) and last.notes == {OWN_TEXT: 1}
    flagged = [TURNS[0], {**TURNS[1], "train": False}, *TURNS[2:]]
    assert learnt(tokenizer, flagged, "all") == [
        "user] yes end [/user]\n[assistant] ",
        "\n[user] end [/user]\n[assistant] end [/assistant]\n</s>",
    ]


def test_long_conversations_say_how_many_turns_were_checked_in_part() -> None:
    turns = [{"role": role, "content": f"{role} {i}"} for i in range(40) for role in ("user", "assistant")]
    (rendered,) = render_with_loss(byte_level(), turns, "assistant")  # type: ignore[arg-type]
    assert len(rendered.spans) == 40 and 20 < rendered.notes[IN_WINDOW] < 40
    (short,) = render_with_loss(byte_level(), turns[:32], "assistant")  # type: ignore[arg-type]
    assert len(short.spans) == 16 and not short.notes


@pytest.mark.parametrize("make", [merging, sentencepiece])
def test_tokens_that_would_straddle_the_border(make: Any) -> None:
    tokenizer = make("no_end")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "good end"}]
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ':' + ('' if m.role == 'user' else ' the ') + m.content "
    )
    tokenizer.chat_template += "}}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: th' }}{% endif %}"
    (rendered,) = render_with_loss(tokenizer, turns, "completion")  # type: ignore[arg-type]
    tokens, weights = tokenize_rendered(tokenizer, [rendered])[0][0]
    prompt = tokenizer("user:aassistant: th", add_special_tokens=False)["input_ids"]
    assert tokenizer(rendered.text, add_special_tokens=False)["input_ids"][: len(prompt)] != prompt
    assert tokens[: len(prompt)] == prompt and sum(weights) == len(tokens) - len(prompt)
    assert tokenizer.decode(tokens) == "user:aassistant: the good end</s>"


@pytest.mark.parametrize("make", [merging, sentencepiece])
def test_segments_give_the_tokens_of_the_whole_text(make: Any) -> None:
    tokenizer = make("llama3")
    (rendered,) = render_with_loss(tokenizer, TURNS, "all")  # type: ignore[arg-type]
    assert (
        tokenize_rendered(tokenizer, [rendered])[0][0][0]
        == tokenizer(rendered.text, add_special_tokens=False)["input_ids"]
    )


def test_pieces_join_to_the_text() -> None:
    tokenizer = sentencepiece("llama2")
    (rendered,) = render_with_loss(tokenizer, TURNS, "assistant")  # type: ignore[arg-type]
    from posttrain.core.types import Sample

    sample = Sample(*tokenize_rendered(tokenizer, [rendered])[0][0])
    assert list(pieces(sample, tokenizer)) == [
        ("<s>[INST] yes end [/INST]", 0.0),
        (" yes </s>", 1.0),
        ("<s>[INST] end [/INST]", 0.0),
        (" end </s>", 1.0),
    ]
    assert render_terminal(sample, tokenizer).plain == rendered.text
    learnt = [piece for piece, weight in pieces(sample, tokenizer) if weight]
    plain = render_terminal(sample, tokenizer, colours=False).plain
    assert learnt and all(f"\u27e6{piece}\u27e7" in plain for piece in learnt)
    assert plain.replace("\u27e6", "").replace("\u27e7", "") == rendered.text
