"""The judge's report on the page and in the terminal: every number its own, every text escaped."""

import io
import json

from rich.console import Console

from posttrain.cli import inspect_rollouts as browse
from posttrain.data.comparisons import AnswerPair
from posttrain.judge.judge_summary import summarize_judge
from posttrain.judge.labels import JudgedPair
from posttrain.report import build_report
from tests.report.test_page import Page, check_offline


def write_feedback(folder, evil):
    """A stage that compared: the judge agrees with people in three pairs of four, and says nothing of a fifth."""
    orders = [(0.9, 0.8), (0.7, 0.6), (0.2, 0.3), (0.6, 0.9)]
    judged = [
        JudgedPair(
            AnswerPair(f"p{i} {evil}", "a longer answer", f"b {evil}", f"r:{i}", 0.8),
            sum(o) / 2,
            sum(o) - 1,
            o,
            None,
            0.7,
        )
        for i, o in enumerate(orders)
    ]
    judged.append(JudgedPair(AnswerPair("p", "a", "b", "r:9", 0.8), None, why="refused: 400"))
    cost = {"questions": 10, "from_store": 4, "prompt_tokens": 1200, "completion_tokens": 10, "new_prompt_tokens": 700}
    cost |= {"new_completion_tokens": 6, "seconds": 12.0, "requests": 9, "retries": {"429": 2, "timed out": 1}}
    about = {
        "kind": "server",
        "model": f"small {evil}",
        "base_url": "http://x/v1",
        "mode": "pairwise",
        "rationale": True,
    }
    stage = folder / "stages" / "2-ai"
    stage.mkdir(parents=True)
    (stage / "judge.json").write_text(
        json.dumps({"name": "ai", "judge": about, **summarize_judge(judged), "cost": cost})
    )
    raters = {"alpha": {"nominal": 0.25, "interval": 0.7982}, "units": 60, "ratings_per_unit": 18.75}
    (stage / "raters.json").write_text(json.dumps({"name": "ai", **raters}))


def test_on_the_page_and_in_the_terminal(make_run, evil, tmp_path):
    folder = make_run()
    write_feedback(folder, evil)
    page = Page(build_report(folder).read_text(encoding="utf-8"))
    shown = {k.removeprefix("feedback.ai."): v for k, v in page.values.items() if k.startswith("feedback.ai.")}
    assert shown["agrees with people"] == "0.75" and page.metrics["feedback.ai.agrees with people"] == "0.750"
    assert (
        page.metrics["feedback.ai.kappa"] == "0.500"
        and page.metrics["feedback.ai.same verdict in both orders"] == "1.000"
    )
    for text in (
        "interval 0.798".replace("interval ", "") + " (interval)",
        "at http://x/v1 compared in both orders, after a rationale: 4 of 5 pairs labelled",
        "10 questions, 4 of them from the store; 1,200 prompt tokens and 10 completion tokens",
        "(700 and 6 of them in this run)",
        "refused: 400",
        "9 requests, repeated after 2 429, 1 timed out",
        "1 of 5 pairs got no label and are left out: 1 refused.",
        "judge and people disagree",
    ):
        assert text in page.text, text
    check_offline(page, evil)
    out = Console(file=io.StringIO(), record=True, width=200)
    assert browse.print_feedback(folder, out, rows=1)
    said = out.export_text()
    assert "agrees with people" in said and "0.750" in said and "r:2: judge 0.25, people 0.80" in said
    assert not browse.print_feedback(tmp_path / "nothing", out, rows=1)


def test_a_damaged_file_is_named_and_the_page_is_written(make_run):
    folder = make_run()
    (folder / "stages" / "2-ai").mkdir(parents=True)
    (folder / "stages" / "2-ai" / "judge.json").write_text("{")
    page = Page(build_report(folder).read_text(encoding="utf-8"))
    assert "judge.json of stage ai can't be read" in page.text and 'id="feedback"' not in page.text
