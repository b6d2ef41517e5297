"""Progress for a person: a bar with the phase in a terminal, lines elsewhere, few but none of a long phase missing."""

from __future__ import annotations

import io
import re
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from posttrain.core import progress
from posttrain.core.progress import Phases, Track, clock


class Clock:
    """Seconds that pass when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


def records(out: io.StringIO) -> list[str]:
    """The lines without their time, which each begins with."""
    lines = [re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  (.*)", line) for line in out.getvalue().splitlines()]
    assert all(lines)
    return [line[1] for line in lines if line]


def test_lines_come_seldom_and_with_an_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten seconds apart; the last always. Three of ten in 12 s: 4 s each, 28 s left."""
    time, out = Clock(monkeypatch), io.StringIO()
    track = Track("job", 10, console=Console(file=out, width=200))
    for done, now in ((1, 4.0), (2, 8.0), (3, 12.0), (4, 15.0), (10, 16.0)):
        time.now = now
        track.update(done, loss=0.5, tokens_per_s=1234.5)
    assert records(out) == [
        "job 3/10  loss 0.5000  tokens per s 1234  left 0:28",
        "job 10/10  loss 0.5000  tokens per s 1234  left 0:00",
    ]
    assert (clock(3667), clock(187.4)) == ("1:01:07", "3:07")


def test_a_record_is_one_line_with_four_digits_of_each_number() -> None:
    """However narrow the console, and whatever the value; what looks like markup is text."""
    out = io.StringIO()
    track = Track("stages.rl [a]", 3, console=Console(file=out, width=30))
    track.update(3, loss=0.25, lr=2e-5, reward=-12.0, margin=123.456, entropy=float("nan"))
    assert records(out) == [
        "stages.rl [a] 3/3  loss 0.2500  lr 2.000e-05  reward -12.00  margin 123.5  entropy nan  left 0:00"
    ]


def test_a_long_phase_is_named_soon_and_its_parts_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    time, out = Clock(monkeypatch), io.StringIO()
    track = Track("rl", 9, console=Console(file=out, width=200))
    phases = Phases(track)
    said = []
    for now, name in ((1, "sample"), (5, "sampling 2/8"), (9, "sampling 3/8"), (15.5, "sampling 6/8"), (17, "score")):
        time.now = now
        track.phase(name)
        said.append(out.getvalue().count("\n"))
    assert said == [0, 1, 1, 2, 2]  # too soon; the phase begins; the same; ten seconds later; too soon again
    time.now = 20
    with phases("learn"):
        pass
    time.now = 21
    track.update(1)  # a step's result is not hidden by what was said of its phases
    assert records(out) == [
        "rl 0/9  sampling 2/8", "rl 0/9  sampling 6/8", "rl 0/9  learn", "rl 1/9  left 2:48",
    ]  # fmt: skip
    assert list(phases.seconds) == ["learn"]


def test_a_terminal_shows_every_phase() -> None:
    out = io.StringIO()
    with Track("rl", 9, console=Console(file=out, width=100, force_terminal=True, force_interactive=True)) as track:
        for name in ("sampling 2/8", "learn"):
            track.phase(name)
            assert track.bar is not None
            track.bar.refresh()
    assert "sampling 2/8" in out.getvalue() and "learn" in out.getvalue() and "0/9" in out.getvalue()


def test_a_notebook_shows_one_line_that_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most twice a second, and the last step always; only `say` adds a line."""
    time, sent = Clock(monkeypatch), list[tuple[str, str]]()

    class Handle:
        def update(self, content: dict[str, str], raw: bool) -> None:
            sent.append(("update", content["text/plain"]))

    def display(content: Any, **settings: Any) -> Handle:
        sent.append(("new", content["text/plain"] if settings else content.text.strip()))
        return Handle()

    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))
    with Track("job", 4, console=Console(force_jupyter=True, width=200)) as track:
        for now, done in ((0.0, 1), (0.2, 2), (0.6, 3), (0.7, 4)):
            time.now = now
            track.phase("learn")
            track.update(done, loss=0.5)
        track.say("ended")
    assert sent == [
        ("new", "job 0/4  learn"), ("update", "job 2/4  learn"), ("update", "job 4/4  loss 0.5000  left 0:00"),
        ("new", "job: ended"),
    ]  # fmt: skip


def test_nothing_is_shown_where_nothing_is_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    time, out = Clock(monkeypatch), io.StringIO()
    track = Track("rl", 2, shown=False, console=Console(file=out))
    time.now = 100
    track.phase("learn")
    track.update(2)
    assert out.getvalue() == ""


def test_time_set_aside_is_no_part_of_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of ten units in 30 s, of which 20 s were for other work: 5 s each, 40 s left, and 7 s of other work."""
    time, out = Clock(monkeypatch), io.StringIO()
    track = Track("job", 10, console=Console(file=out, width=200))
    time.now = 30.0
    track.set_aside(20.0, 7.0)
    track.update(2)
    track.say("10 units of work")
    assert records(out) == ["job 2/10  left 0:47", "job 2/10  10 units of work"]
