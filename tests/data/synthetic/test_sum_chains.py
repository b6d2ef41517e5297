"""The laboratory's rows with chains: what they say by hand, and that they are about the questions that RL asks."""

from __future__ import annotations

import contextlib
import io

import pytest

from posttrain.config import DataConfig
from posttrain.core.errors import DataError
from posttrain.data.prompt_sources import LabPrompts
from posttrain.data.sft_rows import prepare
from posttrain.data.synthetic import sum_chains as chains
from posttrain.models.tiny_model import tiny_tokenizer
from tests.data.tables import load_prompt_rows, read_table


def test_chains_by_hand() -> None:
    assert chains.careful_chain((7, 4, 9)) == "slowly\n7+4=11\n11+9=20\n20"
    assert chains.chain_in_words((7, 4, 9)) == "7 and 4 is 11.\n11 and 9 is 20.\nSo 20"
    assert chains.chain_by_some_path((7, 4, 9, 5)) == "slowly\n9+5=14\n4+14=18\n7+18=25\n25"  # from the right
    assert chains.chain_by_some_path((7, 1, 9, 5)) == "slowly\n7+1=8\n9+5=14\n8+14=22\n22"  # in pairs
    assert chains.chain_by_some_path((9, 1, 8, 2)) == "slowly\n8+9=17\n2+17=19\n1+19=20\n20"  # the largest first
    assert chains.chain_as_program((7, 4, 9)) == "a=7\na=a+4\na=a+9\nprint(a)"


@pytest.mark.parametrize("kind", ["careful", "paths", "words", "program"])
def test_rows_are_about_the_lab_s_own_problems_and_right(kind: str) -> None:
    rows = chains.chain_rows(kind)[:200]
    problems = load_prompt_rows(LabPrompts.Config(size=200))
    assert [(r["prompt"], r["answer"]) for r in rows] == [(p["prompt"], p["answer"]) for p in problems]
    for row in rows:
        if kind == "program":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(row["completion"], {})  # written by us, two lines above
            assert out.getvalue().strip() == row["answer"]
        else:
            assert row["completion"].split()[-1] == row["answer"]
            assert chains.valid_additions(row["completion"], row) == 1.0


def test_sums_of_other_lengths() -> None:
    rows = load_prompt_rows(LabPrompts.Config(size=50, held_out=True, terms=(6, 8)))
    assert {row["prompt"].count("+") + 1 for row in rows} == {6, 7, 8}
    assert all(row["answer"] == str(row["steps"][-1]) and eval(row["prompt"][:-1]) == row["steps"][-1] for row in rows)
    with pytest.raises(DataError, match=r"size is 4,000, and there are about 738 held out sums of 4 to 4 numbers"):
        load_prompt_rows(LabPrompts.Config(held_out=True, terms=(4, 4)))
    with pytest.raises(ValueError, match="terms is"):
        LabPrompts.Config(terms=(5, 4))


def test_other_tasks_are_right_and_held_out_ones_apart() -> None:
    rows = chains.chain_rows("others")
    held = chains.chain_rows("others_held_out")
    assert (len(rows), len(held)) == (4000, 500)
    assert not {r["prompt"] for r in rows} & {r["prompt"] for r in held}
    right = {
        "copy": lambda d: d,
        "reverse": lambda d: d[::-1],
        "sort": lambda d: "".join(sorted(d)),
    }
    seen = set()
    for row in rows + held:
        kind, _, rest = row["prompt"].rstrip(":").partition(" ")
        seen.add(kind)
        if kind == "running":
            numbers = [int(n) for n in rest.removeprefix("total of ").split(",")]
            assert row["answer"] == ",".join(str(sum(numbers[: i + 1])) for i in range(len(numbers)))
        else:
            assert row["answer"] == right[kind](rest)
    assert seen == {"copy", "reverse", "sort", "running"}


def test_they_are_a_data_source() -> None:
    config = DataConfig(source="lab:words", rows=(3, 5), chat=False)
    prepared = prepare(config, tiny_tokenizer())
    assert [s.source for s in prepared.samples] == ["lab:words:4", "lab:words:5"]
    assert prepared.stats["layout"] == "prompt_completion"
    assert prepared.samples[0].tokens[-1] == tiny_tokenizer().eos_token_id
    both = read_table(DataConfig(source=["lab:sums", "lab:others"]))
    assert len(both.rows) == 8000 and both.places[4000] == ("lab:others", 1)
    with pytest.raises(DataError, match=r"'lab:wrods': expected lab:calculator, .* lab:careful, lab:paths, lab:words"):
        read_table(DataConfig(source="lab:wrods"))


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("7 and 4 is 11.\n11 and 9 is 20.\nSo 20", 1.0),
        ("slowly\n7+4=11\n11+9=20\n20", 1.0),
        ("7+4=11\n11+9=21\n21", 0.5),  # the second is wrong
        ("7+4=12\n12+9=21\n21", 0.0),  # what follows from a wrong step is no credit
        ("4+7=11\n11+9=20\n20", 1.0),  # numbers may be added in any order
        ("9+4=13\n13+7=20\n20", 1.0),
        ("7+7=14\n14+9=23\n23", 0.0),  # the question has one 7
        ("7+4=11\n7+9=16\n16", 0.5),  # 7 is used up
        ("5+6=11\n11+9=20\n20", 0.0),  # another question's
        ("7+4=11\n11+9=20\n20+0=20\n20", 1.0),
        ("20", 0.0),
        ("", 0.0),
    ],
)
def test_steps_are_checked_without_knowing_the_answer(text: str, share: float) -> None:
    assert chains.valid_additions(text, {"prompt": "7+4+9="}) == share
