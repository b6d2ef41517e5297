"""Texts of evaluations' items, without the wording of their prompts."""

import json

from posttrain.config import Recipe
from posttrain.eval.item_texts import item_texts
from posttrain.models.tiny_model import tiny_tokenizer


def evaluations(*settings):
    stage = {"method": "sft", "name": "s", "data": {"source": "packaged:movie_reviews.tsv"}}
    recipe = Recipe.model_validate(
        {"name": "r", "model": {"source": "tiny:llama"}, "stages": [stage], "evaluate": list(settings)}
    )
    return recipe.evaluate


def texts(config):
    return item_texts(config, tiny_tokenizer(), None)


def test_columns_of_a_template_and_turns_of_messages(tmp_path):
    table = tmp_path / "t.tsv"
    table.write_text("text\tlabel\tnote\nA long film.\tgood\tn1\nShort\ta reason of many words\tn2\n")
    chat = tmp_path / "chat.jsonl"
    turns = [("system", "Be kind to all."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Why?")]
    messages = [{"role": role, "content": content} for role, content in [*turns, ("assistant", "Because it is so.")]]
    chat.write_text(json.dumps({"messages": messages}) + "\n")
    templated, plain = evaluations(
        {
            "kind": "generate",
            "name": "a",
            "data": {"source": str(table), "prompt": "Judge this: {text}", "completion": "{label}"},
        },
        {"kind": "perplexity", "name": "b", "data": {"source": str(chat)}},
    )
    assert texts(templated) == [["A long film."], ["Short", "a reason of many words"]]
    assert texts(plain) == [["Hi", "Why?", "Because it is so."]]


def test_problems_and_evaluations_from_elsewhere(tmp_path):
    rows = tmp_path / "p.jsonl"
    rows.write_text(json.dumps({"prompt": "What is 2 + 3?", "answer": "5"}) + "\n")
    (config,) = evaluations(
        {
            "kind": "sample",
            "name": "c",
            "problems": {"kind": "rows", "data": {"source": str(rows)}, "template": "{question}"},
        }
    )
    assert texts(config) == [["What is 2 + 3?"]]
    instructed = config.problems.model_copy(update={"instruction": "Answer with the number.", "template": None})
    assert texts(config.model_copy(update={"problems": instructed})) == [["What is 2 + 3?"]]
    assert item_texts(object(), None, None) is None
