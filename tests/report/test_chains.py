"""Chains of critique and revision on the page and in the terminal: the counts are the account's, every text escaped."""

import io
import json

import pytest
from rich.console import Console

from posttrain.cli import inspect_rollouts as browse
from posttrain.core.errors import DataError
from posttrain.methods.data.revision_chain import BY_VERDICT, Chain, Round, Text, chain_stats, write_chains
from posttrain.report import build_report
from posttrain.report.chains import EACH, KEPT, choose_chains
from tests.report.test_page import Page, check_offline

PRINCIPLES = ["Be short.", "Be kind."]


def chain(number, *rounds, text="Long.", stopped=""):
    asked = [{"role": "user", "content": f"question {number}"}]
    return Chain(number, f"s:{number}", asked, Text(text, "end", 7, 0.0, {"short": 0.0}), list(rounds), stopped)


def good(evil=""):
    return Round(
        0, PRINCIPLES[0], Text(f"Too long. {evil}", "end", 3), Text(f"Short. {evil}", "end", 2, 1.0, {"short": 1.0})
    )


def bad():
    return Round(
        1, PRINCIPLES[1], Text("Rude.", "end", 2), Text("Rude.", "end", 2), "revision: the same as the critique"
    )


def write(folder, evil):
    chains = [chain(i, good(evil), bad()) for i in range(6)]
    chains += [chain(6 + i, bad()) for i in range(3)]
    chains += [chain(9, Round(0, PRINCIPLES[0], Text("No change.", "end", 2)), stopped=BY_VERDICT)]
    stage = folder / "stages" / "3-revise"
    write_chains(stage / "chains", 1, chains[:4])
    write_chains(stage / "chains", 2, chains[4:])
    return stage, chain_stats(chains, PRINCIPLES, 7, 1.0)


def test_on_the_page(make_run, evil):
    folder = make_run()
    stage, stats = write(folder, evil)
    page = Page(build_report(folder).read_text(encoding="utf-8"))
    assert "10 chains so far; the stage is not finished." in page.text
    (stage / "data").mkdir()
    (stage / "data" / "stats.json").write_text(json.dumps(stats))
    page = Page(build_report(folder).read_text(encoding="utf-8"))
    shown = {k.removeprefix("chains.revise."): v for k, v in page.metrics.items() if k.startswith("chains.revise.")}
    assert shown == {
        "chains": "10", "rows": "7", "usable": "6", "rounds": "16",
        "round.revision: the same as the critique": "9",
        "chain without a row.no revision could be used": "3",
        f"chain ended early.{BY_VERDICT}": "1",
        "reward.first": "0", "reward.last": "0.6", "short.first": "0", "short.last": "0.6",
    }  # fmt: skip
    for text in ("Be short.", "question 0", "Not used: revision: the same as the critique.", "0 → 1", "Too long.",
                 "0 of the first answers, 6 of the last; 6 gained it, 0 lost it"):  # fmt: skip
        assert text in page.text, text
    check_offline(page, evil)


def test_a_few_of_each_kind_are_chosen_and_none_twice():
    many = [chain(i, good()) for i in range(9)] + [chain(10 + i, good(), bad()) for i in range(5)]
    many += [chain(20 + i, bad()) for i in range(5)]
    found = choose_chains(many)
    assert [(why, c.problem) for why, c in found] == [
        ("gave a row", 0), ("gave a row", 1), ("gave a row", 2), ("gave a row", 3),
        ("revision: the same as the critique", 10), ("revision: the same as the critique", 11),
        ("no revision could be used", 20), ("no revision could be used", 21),
    ]  # fmt: skip
    assert (KEPT, EACH) == (4, 2)


def test_in_the_terminal(make_run, evil):
    folder = make_run()
    out = Console(file=io.StringIO(), record=True, width=160)
    assert not browse.print_chains(folder, out)
    write(folder, "")
    assert browse.print_chains(folder, out, stage="revise", groups=1)
    said = out.export_text()
    assert "6 of 16 rounds ended in a revision of use; 1 chains shown" in said
    for text in ("question 0", "first answer  7 tokens, end, reward 0", "round 1  Be short.", "critique  3 tokens, end",
                 "Too long.", "revision  2 tokens, end, reward 1", "not used: revision: the same as the critique",
                 "gave a row  reward 0 → 1  short 0 → 1"):  # fmt: skip
        assert text in said, text
    assert "question 1" not in said
    assert browse.print_chains(folder, out, problem=9)
    said = out.export_text()
    assert "question 9" in said and f"ended early: {BY_VERDICT}" in said
    with pytest.raises(DataError, match="no chain of problem 77"):
        browse.print_chains(folder, out, problem=77)
    assert not browse.print_chains(folder, out, stage="other")


def test_a_damaged_file_is_named_and_the_page_is_written(make_run):
    folder = make_run()
    stage, _ = write(folder, "")
    (stage / "chains" / "chunk-000003.jsonl").write_text('{"problem": 1}\n')
    page = Page(build_report(folder).read_text(encoding="utf-8"))
    assert "chains of stage revise can't be read" in page.text and 'id="chains"' not in page.text
