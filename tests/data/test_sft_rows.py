"""From rows to samples: what is learnt, what is left out, and that all of it is counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.config import DataConfig, Recipe
from posttrain.core.errors import DataError
from posttrain.data.encoding import prompt_tokens, prompt_with_completion
from posttrain.data.learnt_turns import UNENDED
from posttrain.data.readers import find_sources
from posttrain.data.sample_cache import cache_key
from posttrain.data.sft_rows import Prepared, prepare
from posttrain.runs.inputs import find_inputs
from tests.data.tokenizers import byte_level

TOKENIZER = byte_level("chatml")
HEAD = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def chat(prompt: str, *answers: str) -> dict[str, Any]:
    turns = [{"role": "user", "content": prompt}]
    for answer in answers:
        turns += [{"role": "assistant", "content": answer}, {"role": "user", "content": "and?"}]
    return {"messages": turns[:-1] if answers else turns}


def save(tmp_path: Path, rows: list[Any]) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def run(tmp_path: Path, given: list[Any], context: int | None = None, **settings: Any) -> Prepared:
    return prepare(DataConfig(source=save(tmp_path, given), **settings), TOKENIZER, context=context)


def learnt(prepared: Prepared, i: int = 0) -> str:
    s = prepared.samples[i]
    return str(TOKENIZER.decode([t for t, w in zip(s.tokens, s.weights, strict=True) if w]))


def whole(prepared: Prepared, i: int = 0) -> str:
    return str(TOKENIZER.decode(prepared.samples[i].tokens))


def test_what_carries_loss(tmp_path: Path) -> None:
    rows = [chat("one?", "first", "second")]
    assert learnt(run(tmp_path, rows)) == "second<|im_end|>"
    assert learnt(run(tmp_path, rows, loss_on="assistant")) == "first<|im_end|>second<|im_end|>"
    everything = run(tmp_path, rows, loss_on="all")
    assert list(everything.samples[0].weights) == [0.0] + [1.0] * (len(everything.samples[0]) - 1)
    stats = run(tmp_path, rows).stats
    assert stats["tokens"] == len(everything.samples[0]) - len("\n")  # nothing is learnt behind the last end token
    assert stats["loss_tokens"] == len("second") + 1 and stats["layout"] == "messages"
    assert "".join(p for p, w in stats["examples"][0]["pieces"] if w) == "second<|im_end|>"


def test_plain_text_ends_with_the_end_of_text(tmp_path: Path) -> None:
    prepared = run(tmp_path, [{"prompt": "2+2=", "completion": "4"}], chat=False)
    assert whole(prepared) == "2+2=4<|im_end|>" and learnt(prepared) == "4<|im_end|>"
    several = run(tmp_path, [chat("2+2=", "4", "5", "6")], chat=False, loss_on="assistant")
    assert whole(several) == "2+2=4and?5and?6<|im_end|>" and learnt(several) == "456<|im_end|>"
    assert several.stats["rendering"] == {UNENDED: 2} and not prepared.stats["rendering"]
    text = run(tmp_path, [{"text": "abc"}])
    assert whole(text) == "abc<|im_end|>" and learnt(text) == "bc<|im_end|>"  # nothing predicts the first token


LONG = "x" * 60
MIXED = [chat("q", "fine"), chat("q"), chat("q", " "), chat("q", LONG), chat("", "no question"), {"messages": 3}]


def test_bad_rows_stop_the_run_with_file_row_and_reason(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        run(tmp_path, MIXED, max_tokens=60)
    lines = str(error.value).split("\n")
    assert lines[0].startswith("4 of 6 rows can't be used (")
    assert "  rows.jsonl:2: no assistant turn in it" in lines
    assert "  rows.jsonl:3: empty completion" in lines
    assert "  rows.jsonl:4: too long (81 tokens, and the limit is 60)" in lines
    assert "  rows.jsonl:6: expected a list of turns, each with role and content" in lines
    assert (
        lines[-1].startswith("Fix these rows, or skip them with on_bad_row: skip beside their source")
        and len(lines) == 6
    )


def test_only_ten_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)^13 of 14 rows.*:11: empty completion\n  and 3 more\n"):
        run(tmp_path, [chat("q", "fine"), *[chat("q", "")] * 13])


def test_skipped_rows_are_counted(tmp_path: Path) -> None:
    stats = run(tmp_path, MIXED, max_tokens=60, on_bad_row="skip").stats
    assert stats["used"] == 2 and stats["rows"] == 6
    assert sum(stats["dropped"].values()) == 4 and stats["dropped"]["too long"] == 1 and stats["truncated"] == 0
    assert {b["row"] for b in stats["bad_rows"]} == {2, 3, 4, 6}
    with pytest.raises(DataError, match="1 of 1 rows"):
        run(tmp_path, MIXED[2:3], on_bad_row="skip")


def test_truncation_is_asked_for_and_counted(tmp_path: Path) -> None:
    prepared = run(tmp_path, MIXED[:1] + MIXED[3:4], max_tokens=60, on_long="truncate")
    assert [len(s) for s in prepared.samples][1] == 60 and prepared.stats["truncated"] == 1
    assert learnt(prepared, 1) == "x" * (60 - len(TOKENIZER(HEAD.format("q"))["input_ids"]))
    with pytest.raises(DataError, match=r"no loss token left \(cut at 8 tokens\)"):
        run(tmp_path, MIXED[3:4], max_tokens=8, on_long="truncate")


def test_the_model_s_context_is_the_limit(tmp_path: Path) -> None:
    for settings in ({}, {"max_tokens": 1000}):
        with pytest.raises(DataError, match="the limit is 50"):
            run(tmp_path, MIXED[3:4], context=50, **settings)


def test_rows_are_of_the_shuffled_file(tmp_path: Path) -> None:
    rows = [chat("q", f"answer {i}") for i in range(20)]
    parts = [run(tmp_path, rows, shuffle_seed=3, rows=r) for r in ((0, 12), (12, 20))]
    said = [[r["completion"] for r in p.rows] for p in parts]
    assert sorted(said[0] + said[1]) == sorted(f"answer {i}" for i in range(20)) and len(said[1]) == 8
    assert said[0] != [f"answer {i}" for i in range(12)]
    assert said[0] == [r["completion"] for r in run(tmp_path, rows, shuffle_seed=3, rows=(0, 12)).rows]
    for sample, row in zip(parts[0].samples, parts[0].rows, strict=True):
        assert sample.source == row["source"] == f"rows.jsonl:{int(row['completion'].split()[1]) + 1}"
    with pytest.raises(DataError, match=r"rows is \[12, 21\], and .* has rows 0 to 20"):
        run(tmp_path, rows, rows=(12, 21))


def test_a_table_becomes_instructions(tmp_path: Path) -> None:
    rows = [{"body": f"text {i}", "score": s} for i, s in enumerate((-2, -0.1, 0.1, 2))]
    classes = {"column": "score", "cuts": [0], "names": ["bad", "good"], "margin": 0.5}
    settings = {"columns": {"text": "body"}, "classes": classes, "prompt": "{text}?", "completion": "{label}"}
    prepared = run(tmp_path, rows, **settings)
    assert [learnt(prepared, i) for i in range(2)] == ["bad<|im_end|>", "good<|im_end|>"]
    assert whole(prepared).startswith(HEAD.format("text 0?"))
    assert prepared.stats["dropped"] == {"filtered": 2} and prepared.stats["layout"] == "template"
    for change, message in (
        ({"columns": {"text": "bdy"}}, r"columns.text names 'bdy', and the columns are \['body', 'score'\]"),
        ({"classes": {**classes, "column": "stars"}}, "column names 'stars'"),
        ({"prompt": "{body}"}, r"prompt names \{body\}"),
        ({"classes": {**classes, "margin": 9}}, "all 4 rows lie within"),
    ):
        with pytest.raises(DataError, match=message):
            run(tmp_path, rows, **{**settings, **change})


def test_passages_of_documents_stand_in_templates(tmp_path: Path) -> None:
    documents = tmp_path / "documents"
    documents.mkdir()
    (documents / "a.txt").write_text("Rome is the capital of Italy.\n\nThe moon is made of rock.\n\nItaly is wet.")
    (documents / "b.jsonl").write_text('{"text": "Paris is the capital of France."}\n')
    rows = [{"ask": f"What is {x}?", "say": "yes"} for x in ("the capital of Italy", "made of rock", "xyzzy")]
    passages = {"documents": str(documents), "query": "{ask}", "most": 2}
    settings = {"passages": passages, "prompt": "{passages}|{ask}", "completion": "{say}"}
    prepared = run(tmp_path, rows, **settings)
    found = [whole(prepared, i).partition("user\n")[2].split("|")[0].split("\n") for i in range(3)]
    assert found[0] == ["Rome is the capital of Italy.", "Paris is the capital of France."]
    assert found[1][0] == "The moon is made of rock." and "wet" not in " ".join(found[1])
    assert found[2][0] != "The moon is made of rock."  # it shares "is" with all
    stage = {"method": "sft", "data": {"source": str(tmp_path / "rows.jsonl"), **settings}}
    recipe = Recipe.model_validate({"name": "r", "model": {"source": "tiny:llama"}, "stages": [stage]})
    first = find_inputs(recipe, {})[str(documents / "b.jsonl")]
    config = DataConfig(source=str(tmp_path / "rows.jsonl"), **settings)
    key = cache_key(config, find_sources(config), TOKENIZER, None)
    (documents / "b.jsonl").write_text('{"text": "Paris was the capital of France."}\n')
    assert find_inputs(recipe, {})[str(documents / "b.jsonl")] != first
    assert cache_key(config, find_sources(config), TOKENIZER, None) != key
    for change, message in (
        ({"prompt": "{ask}"}, r"no effect if data.prompt does not name \{passages\}"),
        (
            {"passages": {**passages, "query": "{q}"}},
            r"passages.query names \{q\}, and the columns are",
        ),
        ({"passages": {**passages, "documents": "nowhere.txt"}}, "documents 'nowhere.txt' can't be read"),
        ({"columns": {"passages": "say"}, "completion": "{passages}"}, "rename it by data.columns"),
    ):
        with pytest.raises(DataError, match=message):
            run(tmp_path, rows, **{**settings, **change})


def test_duplicates_are_counted(tmp_path: Path) -> None:
    rows = [chat("q", "a"), chat("q", "a"), chat("q", "b"), chat("q", "a")]
    assert run(tmp_path, rows).stats["duplicates"] == 2


def test_a_base_model_has_no_template(tmp_path: Path) -> None:
    tokenizer = byte_level("chatml")
    tokenizer.chat_template = None
    source = save(tmp_path, [chat("q", "a")])
    with pytest.raises(DataError, match=r"no chat template.*data.chat=false"):
        prepare(DataConfig(source=source), tokenizer)
    assert prepare(DataConfig(source=source, chat=False), tokenizer).stats["used"] == 1


@pytest.mark.parametrize("chatting", [True, False])
def test_evaluation_asks_what_training_taught(tmp_path: Path, chatting: bool) -> None:
    config = DataConfig(source=save(tmp_path, [chat("one?", "first"), chat("two?", "second")]), chat=chatting)
    prepared = prepare(config, TOKENIZER)
    for sample, row in zip(prepared.samples, prepared.rows, strict=True):
        prompt = prompt_tokens(row, TOKENIZER, config)
        assert list(sample.tokens[: len(prompt)]) == prompt
        assert list(sample.weights) == [0.0] * len(prompt) + [1.0] * (len(sample) - len(prompt))
        assert prompt_with_completion(row, row["completion"], TOKENIZER, config, end=True).tokens == sample.tokens
        scored = prompt_with_completion(row, row["completion"], TOKENIZER, config)
        assert list(scored.tokens) == list(sample.tokens[:-1])  # the end token does not take part in a comparison
    assert [r["prompt_text"] for r in prepared.rows] == ["one?", "two?"]


def test_bad_rows_are_listed_by_number_and_a_hint_is_said_once(tmp_path: Path) -> None:
    wizard = {"messages": [{"role": "wizard", "content": "x"}]}
    given = [chat("q", "fine") if i in (2, 5) else wizard for i in range(9)]
    with pytest.raises(DataError) as error:
        run(tmp_path, given, shuffle_seed=1)
    first, *rows, hint, advice = str(error.value).split("\n")
    assert first == "7 of 9 rows can't be used (7 unknown role 'wizard'):"
    assert rows == [f"  rows.jsonl:{i}: unknown role 'wizard'" for i in (1, 2, 4, 5, 7, 8, 9)]
    assert hint.startswith("Known roles: assistant, bard, bing, bot") and "on_long" not in advice
    skipped = run(tmp_path, given, shuffle_seed=1, on_bad_row="skip").stats
    assert [b["row"] for b in skipped["bad_rows"]] == [1, 2, 4, 5, 7, 8, 9]
