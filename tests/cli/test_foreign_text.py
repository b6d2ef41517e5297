"""Text from rows, models, servers and files reaches the terminal as visible symbols: nothing of it is obeyed."""

from __future__ import annotations

import io
import json
import math
import os
import re
import subprocess
import sys
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from typer.testing import CliRunner

from posttrain.cli import inspect_rollouts
from posttrain.cli.main import app
from posttrain.core.console import VisibleConsole
from posttrain.core.errors import ModelError
from posttrain.core.progress import Track
from posttrain.core.secrets import add_secret, hide_secrets
from posttrain.core.types import Rollout, RolloutGroup
from posttrain.core.visible_text import visible
from posttrain.sampling.rollout_store import write_rollouts

HOSTILE = (
    "a\x1b]0;title\x07\x1b]52;c;cm0=\x1b\\\x1b[2J\x1b[31m\x9b5n\r\x00\x08\x7f"
    "\u202egnp\u2066\u200b\U000e0041[bold]z[/bold][/x]"
)
STYLE = re.compile(r"\x1b\[[0-9;]*m")
ENV = {"COLUMNS": "200", "NO_COLOR": "1"}


def obeyed(printed: str) -> list[str]:
    """Return the characters that a terminal would obey or hide."""
    kinds = ("Cc", "Cf", "Cs", "Zl", "Zp")
    signs = ("ARABIC", "SYRIAC", "KAITHI", "ZERO WIDTH JOINER", "ZERO WIDTH NON-JOINER")  # seen, or part of a script
    found = [c for c in set(printed) - {"\n", "\t"} if unicodedata.category(c) in kinds]
    return [c for c in found if not unicodedata.name(c, "").startswith(signs)]


def test_visible_leaves_ordinary_text_and_shows_all_else() -> None:
    for text in (
        "plain\ttext\n",
        "zażółć gęślą",
        "漢字 עברית عربي हिन्दी",
        "👩\u200d👩\u200d👧 ❤\ufe0f",
        "نمی\u200cخواهم",
    ):
        assert visible(text) == text
    assert visible("\x1b[2J\r\x00\x7f") == "␛[2J␍␀␡"
    assert visible("\u202e\x9b\ud800\ufeff\U000e0041") == "<U+202E><U+009B><U+D800><U+FEFF><U+E0041>"
    assert not obeyed(visible("".join(map(chr, [*range(0x20000), *range(0xE0000, 0xE1000)]))))


def renderables() -> list[object]:
    table = Table(title=HOSTILE)
    table.add_column(HOSTILE)
    table.add_row(HOSTILE)
    return [
        HOSTILE,
        Text(HOSTILE, style="red"),
        Panel(Text(HOSTILE), title=Text(HOSTILE)),
        table,
        [HOSTILE],
        {"k": HOSTILE},
    ]


@pytest.mark.parametrize("terminal", [False, True])
def test_the_console_shows_whatever_is_printed(terminal: bool) -> None:
    for thing in renderables():
        out = io.StringIO()
        console = VisibleConsole(file=out, force_terminal=terminal, width=300, color_system="truecolor")
        console.print(thing)
        console.rule(HOSTILE.replace("\r", ""))
        printed = STYLE.sub("", out.getvalue())
        assert not obeyed(printed) and "␛]0;title" in printed and "[bold]z[/bold][/x]" in printed
    colours = io.StringIO()
    VisibleConsole(file=colours, force_terminal=True, color_system="truecolor").print(Text("x", style="red"))
    assert "\x1b[" in colours.getvalue()  # styles of our own stay


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_shows_what_it_is_told(terminal: bool) -> None:
    out = io.StringIO()
    with Track(HOSTILE, 2, console=VisibleConsole(file=out, force_terminal=terminal, width=1000)) as track:
        track.phase(HOSTILE)
        track.update(2, found=HOSTILE)
    assert "␛]0;title" in out.getvalue()
    for code in ("\x1b]", "\x1b[2J", "\x1b[31m", "\x9b", "\u202e", "\x08", "\x00"):
        assert code not in out.getvalue()


def inspect(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["inspect", *arguments], env=ENV)
    assert done.exit_code == 0, done.output
    return done.output


def test_inspect_shows_rows(tmp_path: Path) -> None:
    def rows(**row: object) -> str:
        path = tmp_path / f"[bold]{len(list(tmp_path.iterdir()))}[x].jsonl"  # markup in a file's name
        path.write_text(json.dumps(row) + "\n")
        return str(path)

    tiny = "model.source=tiny:llama"
    for name, row in (
        ("sft", {"prompt": HOSTILE, "completion": HOSTILE}),
        ("dpo", {"prompt": HOSTILE, "chosen": HOSTILE + "c", "rejected": "b"}),
    ):
        printed = inspect(name, tiny, f"stages.{name}.data.source={rows(**row)}")
        assert not obeyed(printed) and "␛]0;title" in printed and "[bold]z[/bold][/x]" in printed
    source = rows(prompt=HOSTILE, answer="\x1b[2J3")
    asked = f"stages.rl.problems={{kind: rows, data: {{source: {json.dumps(source)}}}}}"
    printed = inspect("lab", tiny, asked, "stages.rl.held_out=", "evaluate=[]")
    assert not obeyed(printed) and "␛]0;title" in printed and "answer     ␛[2J3" in printed


def test_inspect_shows_rollouts_of_a_run(tmp_path: Path) -> None:
    folder = tmp_path / "stages" / "0-rl"
    rollout = Rollout((1, 2), (-1.0, -1.0), "end", HOSTILE, {"length": 1.0}, 1.0, notes={HOSTILE: HOSTILE})
    failed = replace(rollout, reward=math.nan, failures={HOSTILE: HOSTILE})
    group = RolloutGroup((1,), {"source": HOSTILE, "answer": HOSTILE}, [failed, rollout])
    for step in (1, 2, 3):
        write_rollouts(
            folder / "rollouts", step, [group], None, [HOSTILE], [0],
            lambda r: [(True, r.text), (False, HOSTILE)],
        )  # fmt: skip
    for terminal in (False, True):
        out = io.StringIO()
        console = VisibleConsole(file=out, width=300, force_terminal=terminal)
        inspect_rollouts.print_rollouts(tmp_path, console)
        inspect_rollouts.print_drift(tmp_path, console)
        assert not obeyed(STYLE.sub("", out.getvalue())) and out.getvalue().count("␛]0;title") >= 8


def test_chat_shows_what_the_model_writes() -> None:
    """A tiny model of random weights writes random bytes, control characters among them."""
    torch.manual_seed(0)
    done = CliRunner().invoke(
        app, ["chat", "tiny:llama", "-p", "hello", "--temperature", "5", "--max-new-tokens", "200"], env=ENV
    )
    assert done.exit_code == 0 and len(done.output) > 50 and not obeyed(done.output)
    assert any(0x2400 <= ord(c) <= 0x2421 for c in done.output)


def test_errors_show_what_they_quote(monkeypatch: pytest.MonkeyPatch) -> None:
    import posttrain.cli.chat

    def fails(error: Exception) -> str:
        def open_(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(posttrain.cli.chat.Chat, "open", open_)
        return CliRunner().invoke(app, ["chat", "tiny:llama"], env=ENV).output

    printed = fails(ModelError(f"the server answered 401: {HOSTILE}"))
    assert printed.startswith("error: the server answered 401: a␛]0;title") and not obeyed(printed)
    printed = fails(OSError(30, "Read-only file system", f"/x/{HOSTILE}"))
    assert printed.startswith("error: /x/a␛]0;title") and "output=FOLDER" in printed and not obeyed(printed)


def test_a_traceback_and_warnings_and_log_lines_show_what_they_quote(tmp_path: Path) -> None:
    code = (
        "import sys, logging, warnings, posttrain.cli.main as main\n"
        f"text = {HOSTILE!r}\n"
        "def app():\n"
        "    print('\\ud800 \\N{SYMBOL FOR ESCAPE}')\n"
        "    logging.getLogger('posttrain').warning('%s', text)\n"
        "    warnings.warn(text)\n"
        "    raise ZeroDivisionError(text + ' key ' + 'k' * 20)\n"
        "main.app = app\n"
        "main.main()\n"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "SOME_API_KEY": "k" * 20}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr and "Traceback" in done.stderr
    assert done.stderr.count("]0;title") >= 3 and not obeyed(done.stderr.replace("\\u241b", "")), done.stderr
    assert "k" * 20 not in done.stderr and "key ***" in done.stderr
    assert "\\ud800" in done.stdout


def test_secrets_are_hidden_in_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_JUDGE_KEY", 'quoted"key/with+signs')
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "whatever-it-is")
    add_secret("a-registered-secret")
    add_secret("short")
    assert hide_secrets('401 quoted"key/with+signs') == "401 ***"
    assert hide_secrets('{"k": "quoted\\"key/with+signs"}') == '{"k": "***"}'
    assert hide_secrets("?x=quoted%22key%2Fwith%2Bsigns") == "?x=***"
    assert hide_secrets("a-registered-secret, short, whatever-it-is") == "***, short, whatever-it-is"
    assert hide_secrets("at http://me:pass@host/v1?api_key=abc&x=1") == "at http://***@host/v1?api_key=***&x=1"
    assert hide_secrets("at https://me@host/a@b") == "at https://***@host/a@b"
    assert (
        hide_secrets("Authorization: Bearer abcdefghijkl, Basic dXNlcjpwYXNz") == "Authorization: Bearer ***, Basic ***"
    )
    assert hide_secrets("sk-proj-0123456789abcdefghij hf_0123456789abcdefghijklmn") == "sk-*** hf_***"
    assert hide_secrets("/tmp/hf_cache_of_mine/sk-small a@b.c x://y") == "/tmp/hf_cache_of_mine/sk-small a@b.c x://y"
