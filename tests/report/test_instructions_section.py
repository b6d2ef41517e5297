"""The quality report of instruction rows, on the page and in the terminal."""

import io
import json

import pytest
from rich.console import Console

from posttrain.cli.inspect_rows import print_quality
from posttrain.data.row_quality import measure_rows
from posttrain.report.build import build_report
from posttrain.report.row_quality_view import instruction_qualities, quality_lines, quality_view

LEAKS = {
    "dropped": True,
    "n": 13,
    "rows": 1,
    "examples": {"exam": {"reviews": 4}},
    "not_searched": {"later": "it reads what a stage makes"},
}
FOUND = {"items": 9, "short": 0, "runs": 5, "shared_runs": 0, "leaking_rows": 1, "leaked_items": 2}


def row(i, **more):
    about = {"task": "reviews", "type": "classification", "cluster": "sentiment", "language": "en", "domain": "films"}
    form = {"wording": i % 3, "inverted": False, "shots": i % 2, "rationale": False, "place": f"r.tsv:{i}"}
    text = f"{'she' if i % 3 else 'it'} went {i}"
    label = "good" if i % 3 == 0 or i % 10 == 1 else "bad"
    return {
        "prompt": f"Good or bad? {text}",
        "completion": label,
        "label": label,
        "input": text,
        **about,
        **form,
        **more,
    }


def stats(evil=""):
    rows = [row(i) for i in range(300)] + [row(0, task="names", label=None, language="de", completion=evil or "x")]
    quality = measure_rows(rows, tokens_of=lambda r: 70 if r["task"] == "names" else 10, context=64)
    quality["leaks"] = {
        **LEAKS,
        "evaluations": {"exam": {**FOUND, "examples": [{"row": 6, "item": 0, "words": f"a b {evil}"}]}},
    }
    pair = {"task": "reviews", "similarity": 0.9, "place": "r.tsv:2", "text": f"t {evil}"}
    quality["duplicates"] = {"threshold": 0.8, "dropped": True, "texts": 40, "exact": 0, "near": 3, "crowded": 2}
    quality["duplicates"] |= {"tasks": {}, "examples": [{**pair, "earlier": {"place": "r.tsv:1", "text": "t"}}]}
    quality["difficulty"] = {"reviews": {"rows": 3, "too_long": 0, "tokens": 6, "nll": 1.25, "low": 1.0, "high": 1.5}}
    dropped = {"dropped": {"text of evaluation exam": 4}, "dropped_examples": {"text of evaluation exam": [pair]}}
    return json.loads(json.dumps({"tasks": {}, **dropped, "quality": quality}))


def test_the_page_has_every_part_of_the_report_and_escapes_texts(make_run, evil):
    run = make_run()
    folder = run / "stages" / "1-build" / "data"
    folder.mkdir(parents=True)
    (folder / "stats.json").write_text(json.dumps(stats(evil)))
    page = build_report(run).read_text()
    assert evil not in page
    for name, value in (
        ("instructions.build.rows", 301),
        ("instructions.build.tasks", 2),
        ("instructions.build.truncated", 1),
        ("instructions.build.duplicates", 3),
        ("instructions.build.leaks.exam", 1),
        ("instructions.build.difficulty.reviews", 1.25),
        ("instructions.build.marked", 1),
    ):
        assert f'data-metric="{name}" data-value="{value}"' in page, name
    assert 'href="#instructions"' in page
    assert "2 examples have so many neighbours" in page and "later was not looked for" in page


def test_parts_that_were_not_looked_for_are_said_to_be_missing(make_run):
    content = stats()
    for part in ("leaks", "duplicates", "difficulty"):
        del content["quality"][part]
    content["quality"]["truncated"] = None
    run = make_run()
    folder = run / "stages" / "1-build" / "data"
    folder.mkdir(parents=True)
    (folder / "stats.json").write_text(json.dumps(content))
    assert "Not looked for (leaks is null)" in build_report(run).read_text()
    lines = "\n".join(quality_lines(quality_view("build", content)))
    for words in ("near_duplicates is null", "leaks is null", "not known"):
        assert words in lines


def test_lines_for_the_terminal():
    lines = "\n".join(quality_lines(quality_view("build", stats())))
    for words in (
        "301 of 2 tasks",
        "50% with demonstrations",
        "4 text of evaluation exam",
        "3 of 40 examples nearly repeat",
        "exam: 1 row has text of 2 of its 9 items; 4 examples were left out for it",
        "row 7: 'a b '",
        "later: not looked for: it reads what a stage makes",
        "labels bad 60%, good 40%; 1.25 nats a token",
        "1 of 1 associations",
        "reviews: good 10% of 200 with women, 100% of the others",
        "1 row is longer than the model's 64 tokens",
    ):
        assert words in lines, lines
    out = io.StringIO()
    print_quality(quality_view("build", stats()), [row(5)], Console(file=out, width=200))
    assert "row 1  reviews, wording 2  r.tsv:5\nGood or bad? she went 5\n→ bad\n" in out.getvalue()


@pytest.mark.parametrize("content", ["[]", '{"tasks": {"similarity": 1}}', '{"quality": 3}'])
def test_stats_of_other_methods_are_left_alone(tmp_path, content):
    folder = tmp_path / "stages" / "0-x" / "data"
    folder.mkdir(parents=True)
    (folder / "stats.json").write_text(content)
    assert instruction_qualities(tmp_path, []) == []
