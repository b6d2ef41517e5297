"""Ordinary programs in the sandbox, and a machine without one."""

from __future__ import annotations

import shutil
import sysconfig
import tempfile
from pathlib import Path

import pytest

from posttrain.config.sandbox import SandboxConfig
from posttrain.sandbox import SandboxError, bubblewrap, require_sandbox
from posttrain.sandbox import run_program as run


@pytest.fixture(autouse=True)
def sandboxed(request: pytest.FixtureRequest) -> None:
    if "without" in request.node.name:
        return
    try:
        require_sandbox()
    except SandboxError as error:
        pytest.skip(str(error))


def test_input_output_and_exit_code() -> None:
    done = run("import sys\nprint(sum(map(int, sys.stdin)))\nprint('é', file=sys.stderr)\nsys.exit(3)", "1\n2\n40\n")
    assert (done.status, done.stdout, done.stderr, done.code) == ("error", "43\n", "é\n", 3)
    fine = run("from fractions import Fraction as F\nprint(F(1, 3) + F(1, 6))")
    assert (fine.status, fine.stdout, fine.code) == ("ok", "1/2\n", 0)
    assert 0 < fine.seconds < 5


def test_what_does_not_compile_is_an_error() -> None:
    done = run("print('never'")
    assert done.status == "error" and done.stdout == "" and "SyntaxError" in done.stderr


def test_the_same_program_gives_the_same_output() -> None:
    program = "import os\nprint({'a', 'b', 'c', 'd'}, hash('x'), sorted(os.environ), os.getcwd())"
    assert run(program).stdout == run(program).stdout


def test_it_may_write_its_own_files_and_start_processes() -> None:
    program = (
        "import subprocess, sys, tempfile\nopen('a.txt', 'w').write('hello')\n"
        "tempfile.NamedTemporaryFile().write(b'x')\n"
        "print(subprocess.run([sys.executable, '-c', \"print(open('a.txt').read())\"], capture_output=True).stdout)"
    )
    assert run(program).stdout == "b'hello\\n'\n"
    assert run("import os; print(os.listdir('/work'))").stdout == "[]\n"


def test_of_a_home_folder_with_an_interpreter_nothing_else_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        home = Path(folder)
        home.chmod(0o755)
        python, library = home / "bin" / "python3", Path(sysconfig.get_path("stdlib"))
        python.parent.mkdir()
        shutil.copy(bubblewrap._interpreter(), python)
        left_out = shutil.ignore_patterns("test*", "*-packages", "config-*", "__pycache__")
        shutil.copytree(library, home / "lib" / library.name, ignore=left_out)
        (home / "secret.txt").write_text("secret")
        monkeypatch.setattr(bubblewrap, "_interpreter", lambda: python)
        monkeypatch.setenv("HOME", folder)
        done = run(f"import os, sys; print(sys.executable, sorted(os.listdir({folder!r})))")
        assert done.stdout == f"{python} ['bin', 'lib']\n", done
        monkeypatch.setenv("HOME", "/nowhere")  # an installation of its own is shown whole
        assert "secret.txt" in run(f"import os; print(os.listdir({folder!r}))").stdout


def test_what_was_written_before_a_limit_is_kept() -> None:
    done = run("print('so far', flush=True)\nwhile True: pass", limits=SandboxConfig(seconds=0.5))
    assert (done.status, done.stdout, done.code) == ("timeout", "so far\n", -1)
    done = run("while True: print('x' * 99)", limits=SandboxConfig(output_kb=2))
    assert done.status == "output" and len(done.stdout) == 2048


def test_a_machine_without_a_sandbox_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    require_sandbox.cache_clear()
    try:
        with pytest.raises(SandboxError, match="bubblewrap .* is not installed"):
            run("print(1)")
    finally:
        require_sandbox.cache_clear()
