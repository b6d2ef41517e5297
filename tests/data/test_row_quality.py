"""Measures of instruction rows, against numbers worked out by hand."""

import math

import pytest

from posttrain.data.group_associations import Associations, GroupMentions, holm
from posttrain.data.group_terms import GROUP_TERMS, terms_of
from posttrain.data.row_quality import count_words, effective_number, label_balance, measure_rows, quantiles, row_texts


def row(**changes):
    return {
        "prompt": "Is this review good or bad?\nA film",
        "completion": "good",
        "task": "reviews",
        "type": "classification",
        "cluster": "sentiment",
        "language": "en",
        "domain": "films",
        "wording": 0,
        "inverted": False,
        "shots": 0,
        "rationale": False,
        "label": "positive",
        "input": "A film",
        "place": "reviews.tsv:2",
        **changes,
    }


def test_breadth_lengths_and_labels():
    messages = [{"role": "user", "content": "a b c"}, {"role": "assistant", "content": "d"}]
    rows = [
        row(),
        row(wording=1, label="negative", prompt=messages, shots=1),
        row(wording=1, label="negative", inverted=True, rationale=True),
        row(
            task="facts", type="translation", cluster="facts", language="zh", domain="x", label=None, completion="好书"
        ),
    ]
    stats = measure_rows(iter(rows))
    breadth = stats["breadth"]
    assert (breadth["rows"], breadth["repeated_rows"]) == (4, 1)
    assert breadth["tasks"] == {"count": 2, "effective": 1.75, "rows": {"reviews": 3, "facts": 1}}
    assert breadth["languages"]["rows"] == {"en": 3, "zh": 1}
    assert breadth["shots"] == {0: 3, 1: 1}
    assert (breadth["wordings"], breadth["inverted"], breadth["rationale"]) == (3, 1, 1)
    assert breadth["prompt_words"]["counts"][:4] == [0, 1, 3, 0]
    assert breadth["completion_words"]["counts"][:3] == [3, 1, 0]
    assert stats["tasks"]["reviews"]["prompt_words"] == {"low": 4, "median": 8, "high": 8, "longest": 8}
    assert stats["tasks"]["reviews"]["with_shots"] == 1
    assert stats["labels"] == {
        "reviews": {"rows": 2, "count": 2, "largest": 0.5, "balance": 1.0, "labels": {"negative": 1, "positive": 1}}
    }
    assert stats["truncated"] is None


def test_rows_longer_than_the_context_are_counted_with_their_places():
    rows = [row(place=f"f:{i}", input=str(i)) for i in range(12)]
    stats = measure_rows(rows, tokens_of=lambda r: 95 + int(r["input"]), context=100)["truncated"]
    assert (stats["rows"], stats["tasks"]) == (6, {"reviews": 6})
    assert stats["examples"][0] == {"task": "reviews", "place": "f:6", "tokens": 101}
    assert len(stats["examples"]) == 5
    assert measure_rows(rows, tokens_of=lambda r: 10**6)["truncated"]["rows"] == 0


def test_association_of_labels_with_groups_by_hand():
    def rows(count, text, label):
        return [row(input=f"{text} number {i}", label=label) for i in range(count)]

    table = rows(40, "she went", "positive") + rows(10, "she went", "negative")
    table += rows(50, "it went", "positive") + rows(100, "it went", "negative")
    bias = measure_rows([*table, *table])["bias"]  # other wordings of an input do not count again
    (found,) = bias["rows"]
    ratio, error = math.log(40 * 100 / (10 * 50)), math.sqrt(1 / 40 + 1 / 10 + 1 / 50 + 1 / 100)
    assert (found["group"], found["label"], found["mentions"], found["with_label"]) == ("women", "positive", 50, 40)
    assert (found["others"], found["others_with_label"], found["rate"]) == (150, 50, 0.8)
    assert found["others_rate"] == pytest.approx(1 / 3)
    assert found["log_odds_ratio"] == pytest.approx(ratio)
    assert (found["low"], found["high"]) == pytest.approx(
        (ratio - 1.959964 * error, ratio + 1.959964 * error), abs=1e-6
    )
    assert found["p_adjusted"] == found["p"] == pytest.approx(math.erfc(ratio / error / math.sqrt(2)), rel=1e-6)
    assert found["marked"] and (bias["inputs"], bias["comparisons"], bias["too_few_rows"]) == (200, 1, 0)


def test_groups_with_few_rows_are_not_compared_and_empty_cells_are():
    few = Associations()
    for i in range(29):
        few.add("t", {"g": ["she"]}, f"she {i}", "a")
        few.add("t", {"g": ["she"]}, f"it {i}", "b")
    assert few.stats()["too_few_rows"] == 1 and not few.stats()["rows"]
    empty = Associations()
    for i in range(60):
        empty.add("t", {"g": ["she"]}, f"she {i}", "a")
        empty.add("t", {"g": ["she"]}, f"it {i}", "ab"[i % 2])
    (found,) = empty.stats()["rows"]
    assert found["log_odds_ratio"] == pytest.approx(math.log(0.5 * 30.5 / (60.5 * 30.5)))
    none = Associations()
    none.add("t", {}, "she", "a")
    assert none.stats()["inputs"] == 0


def test_groups_are_found_by_words_and_by_runs_of_words():
    mentions = GroupMentions({"old": ["old man", "elderly"], "men": ["man"], "女": ["女人"]})
    assert mentions.groups("An OLD-man, here") == {"old", "men"}
    assert mentions.groups("the manor of an old, wise person") == set()
    assert mentions.groups("一个女人") == {"女"}
    assert (
        terms_of("en-GB") is GROUP_TERMS["en"]
        and terms_of("German") is GROUP_TERMS["de"]
        and terms_of("xx") == {}
        and terms_of("en", {}) == {}
    )


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([]) == [] and holm([0.9, 0.8]) == [1.0, 1.0]


def test_small_measures():
    assert count_words("two words") == 2 and count_words("我 abc, 书é") == 4
    assert effective_number([5, 5, 0]) == pytest.approx(2) and effective_number([]) == 0
    assert label_balance({"a": 3})["balance"] == 0
    assert label_balance({"a": 3, "b": 1})["balance"] == pytest.approx(0.811278, abs=1e-6)
    assert quantiles(range(101)) == {"low": 5, "median": 50, "high": 95, "longest": 100}
    assert row_texts(row(prompt=[{"role": "user", "content": "q"}])) == ["q", "good", "A film"]
    assert row_texts(row(input="long " * 50)) == [row()["prompt"], "good"]
