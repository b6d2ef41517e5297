"""Programs that try to get out, to look out, to hang, or to take everything."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

from posttrain.config.sandbox import SandboxConfig
from posttrain.sandbox import ProgramResult, SandboxError, bubblewrap, require_sandbox
from posttrain.sandbox import run_program as run

LIMITS = SandboxConfig(seconds=3, memory_mb=128, processes=8, output_kb=16, files_mb=4)
SECRET = "the quick brown secret"


@pytest.fixture(scope="module", autouse=True)
def sandboxed() -> None:
    try:
        require_sandbox()
    except SandboxError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outside")
    (folder / "secret.txt").write_text(SECRET)
    folder.chmod(0o755)
    (folder / "secret.txt").chmod(0o666)  # anybody could read and write it, if they saw it
    return folder


def ended(outcome: ProgramResult, *wanted: str) -> None:
    assert outcome.status in wanted, outcome
    assert outcome.seconds < LIMITS.seconds + 2
    assert len(outcome.stdout) + len(outcome.stderr) <= LIMITS.output_kb << 10


TRIED = "try:\n    {}\n    print('DONE')\nexcept BaseException as e:\n    print('REFUSED', type(e).__name__)\n"
SYSCALL = "import ctypes, os; libc = ctypes.CDLL(None, use_errno=True)\nassert libc.syscall({}) == -1\nprint('REFUSED')"

EXHAUSTING = {
    "a loop without end": ("while True: pass", ["timeout"]),
    "sleep": ("import time; time.sleep(1000)", ["timeout"]),
    "a thread that never ends": ("import threading\nthreading.Thread(target=lambda: any(iter(int, 1))).start()",
                                 ["timeout"]),
    "memory at once": ("x = bytearray(1 << 34)", ["error", "memory"]),
    "memory bit by bit": ("x = []\nwhile True: x.append(bytearray(1 << 20))", ["error", "memory"]),
    "memory of many processes": (
        "import os, time\nfor _ in range(7):\n    if os.fork() == 0:\n        x = b'x' * (100 << 20); time.sleep(100)\n"
        "time.sleep(100)", ["memory"]),
    "endless output": ("while True: print('x' * 1000)", ["output"]),
    "endless errors": ("import sys\nwhile True: sys.stderr.write('x' * 1000)", ["output"]),
    "one long line": ("import os\nos.write(1, b'x' * (1 << 22))\nos.write(1, b'x' * (1 << 22))", ["output"]),
    "a fork bomb": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", ["timeout", "processes"]),
    "a thread bomb": ("import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(99,)).start()",
                      ["error", "timeout", "processes"]),
    "a bomb of subprocesses": (
        "import subprocess, sys\nwhile True:\n    try: subprocess.Popen([sys.executable, '-c', 'import time; "
        "time.sleep(99)'])\n    except OSError: pass", ["timeout", "processes", "memory"]),
    "a full disk": ("i = 0\nwhile True:\n    i += 1\n    open(f'/work/{i}', 'wb').write(b'x' * (1 << 20))", ["error"]),
    "one big file": ("f = open('/tmp/x', 'wb')\nwhile True: f.write(b'x' * (1 << 20))", ["error"]),
    "deep recursion in C": ("import sys; sys.setrecursionlimit(10**9)\ndef f(): return f()\nf()",
                            ["error", "memory", "timeout"]),
    "signals that it ignores": (
        "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, "
        "ValueError): pass\nwhile True: pass", ["timeout"]),
    "closed output": ("import os, time\nfor fd in range(3): os.close(fd)\ntime.sleep(1000)", ["timeout"]),
    "a child left behind": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    while True: time.sleep(1)\nprint('bye')",
        ["timeout", "ok"]),
    "a bomb of empty files": ("import itertools\nfor i in itertools.count(): open(f'/work/{i}', 'w').close()",
                             ["memory"]),
    "a bomb of attributes": (
        "import itertools, os\nopen('a', 'w').close()\n"
        "for i in itertools.count(): os.setxattr('a', f'user.{i}', b'x' * 4000)", ["memory", "error"]),
    "a bomb of symbolic links": ("import os\nos.symlink('/work/b', '/work/a'); os.symlink('/work/a', '/work/b')\n"
                                 "open('/work/a')", ["error"]),
}  # fmt: skip


@pytest.mark.parametrize("name", EXHAUSTING)
def test_what_takes_everything_is_ended(name: str) -> None:
    program, wanted = EXHAUSTING[name]
    # Where time is what ends it, there is nothing to wait for.
    limits = LIMITS.model_copy(update={"seconds": 1}) if wanted[0] == "timeout" else LIMITS
    ended(run(program, limits=limits), *wanted)


def test_the_memory_of_sockets_is_counted() -> None:
    """A program whose open sockets can hold more than its memory is ended, though no process of it has that memory."""
    opened = "import os, socket, time\nkept = [socket.socketpair() for _ in range(28)]\n"
    filled = (
        "n = 0\nfor a, b in kept:\n    a.setblocking(False)\n    try:\n        while True: n += a.send(b'x' * 65536)\n"
    )
    filled += "    except BlockingIOError: pass\nprint(n)"
    outcome = run(opened + filled, limits=LIMITS)
    assert outcome.status == "ok" and int(outcome.stdout) <= 28 * bubblewrap.SOCKET
    forks = "for _ in range(6):\n    if os.fork() == 0: break\ntime.sleep(9)"
    ended(run(opened + forks, limits=LIMITS.model_copy(update={"memory_mb": 32})), "memory")


LOOKING_OUT = {
    "a file outside": "print(open('{outside}/secret.txt').read())",
    "a symbolic link to it": (
        "import os; os.symlink('{outside}/secret.txt', '/work/link'); print(open('/work/link').read())"
    ),
    "the root of the first process": "print(open('/proc/1/root{outside}/secret.txt').read())",
    "the root of its parent": "import os; print(open(f'/proc/{{os.getppid()}}/root{outside}/secret.txt').read())",
    "its own working folder's parents": "print(open('../../../../..{outside}/secret.txt').read())",
    "passwords": "print(open('/etc/passwd').read())",
    "the environment of another process": "print(open('/proc/1/environ').read()); 1/0",
    "writing outside": "open('{outside}/secret.txt', 'w').write('gone')",
    "writing into Python": "import os; open(os.__file__, 'a').write('#')",
    "writing a kernel setting": "open('/proc/sys/kernel/hostname', 'w').write('x')",
    "writing its own root": "open('/x', 'w')",
    "a device": "open('/dev/mem', 'rb')",
    "the memory of bubblewrap": (
        "import os\nfor p in os.listdir('/proc'):\n"
        "    if p.isdigit() and int(p) != os.getpid(): open(f'/proc/{{p}}/mem', 'r+b')\n1/0"
    ),
    "memory that outlasts": "open('/dev/shm/x', 'w')",
}


@pytest.mark.parametrize("name", LOOKING_OUT)
def test_nothing_outside_is_seen_or_changed(name: str, outside: Path) -> None:
    outcome = run(LOOKING_OUT[name].format(outside=outside), limits=LIMITS)
    ended(outcome, "error")
    assert SECRET not in outcome.stdout + outcome.stderr and "root:" not in outcome.stdout
    assert "PYTEST" not in outcome.stdout  # the environment of this test
    assert (outside / "secret.txt").read_text() == SECRET
    assert Path(os.__file__).exists()


def test_no_network() -> None:
    """A server on the loopback of this machine, on the internet's addresses, and on an abstract UNIX socket."""
    with socket.socket() as tcp, socket.socket(socket.AF_UNIX) as unix:
        tcp.bind(("127.0.0.1", 0))
        tcp.listen()
        name = f"\0posttrain-{os.getpid()}"
        unix.bind(name)
        unix.listen()
        port = tcp.getsockname()[1]
        for attempt in (
            f"import socket; socket.create_connection(('127.0.0.1', {port}), 1)",
            "import socket; socket.create_connection(('1.1.1.1', 53), 1)",
            "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('1.1.1.1', 53))",
            "import socket; socket.socket(socket.AF_VSOCK)",
            "import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)",
            f"import socket; s = socket.socket(socket.AF_UNIX); s.connect({name!r})",
            f"import socket; a, b = socket.socketpair(type=socket.SOCK_DGRAM); a.sendto(b'x', {name!r})",
            "import socket; a, b = socket.socketpair(); a.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 24)",
            "import socket; a, b = socket.socketpair(); a.bind('/work/x')",
        ):
            outcome = run(TRIED.format(attempt), limits=LIMITS)
            assert outcome.stdout.startswith("REFUSED"), (attempt, outcome)


def test_no_signal_leaves() -> None:
    """Every process number, the parent's, and the group: nothing outside of the sandbox is ended."""
    bystander = subprocess.Popen(["sleep", "30"])
    try:
        program = (
            "import os\nfor pid in [os.getppid(), -1, *range(2, 70000)]:\n"
            "    if pid == os.getpid(): continue\n    try: os.kill(pid, 9)\n    except OSError: pass\n"
            f"os.kill({bystander.pid}, 9)"
        )
        ended(run(program, limits=LIMITS), "error")
        assert bystander.poll() is None and threading.main_thread().is_alive()
    finally:
        bystander.kill()
        bystander.wait()


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("a new user namespace", "{'x86_64': 272, 'aarch64': 97}[os.uname().machine], 0x10000000"),
        ("a mount", "{'x86_64': 165, 'aarch64': 40}[os.uname().machine], b'none', b'/work', b'tmpfs', 0, None"),
        ("memory that no limit counts", "{'x86_64': 319, 'aarch64': 279}[os.uname().machine], b'x', 0"),
        ("shared memory", "{'x86_64': 29, 'aarch64': 194}[os.uname().machine], 0, 1 << 20, 0o1600"),
        ("tracing", "{'x86_64': 101, 'aarch64': 117}[os.uname().machine], 16, 1, 0, 0"),
        ("a new root", "{'x86_64': 161, 'aarch64': 51}[os.uname().machine], b'/work'"),
        ("a ring of system calls", "425, 1, ctypes.create_string_buffer(256)"),
    ],
)
def test_system_calls_that_are_refused(name: str, call: str) -> None:
    outcome = run(SYSCALL.format(call), limits=LIMITS)
    assert (outcome.status, outcome.stdout) == ("ok", "REFUSED\n"), (name, outcome)


def test_limits_can_t_be_lifted() -> None:
    lift = "import resource as r\nfor n in (r.RLIMIT_AS, r.RLIMIT_NPROC, r.RLIMIT_CPU, r.RLIMIT_FSIZE):\n"
    outcome = run(
        lift + "    try: r.setrlimit(n, (r.RLIM_INFINITY,) * 2); print('LIFTED')\n    except ValueError: pass"
    )
    assert (outcome.status, outcome.stdout) == ("ok", ""), outcome


def test_nobody_is_left_when_it_is_over() -> None:
    """A program's children go with it, also those of a session of their own."""
    mark = f"sleep-{time.monotonic_ns()}"
    program = (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    for fd in range(3): os.close(fd)\n"
        f"    os.execv('/bin/sleep', ['{mark}', '100'])\ntime.sleep(0.2)\nprint('bye')"
    )
    outcome = run(program, limits=LIMITS)
    assert outcome.stdout == "bye\n"
    time.sleep(0.3)
    left = [p for p in Path("/proc").glob("[0-9]*/cmdline") if mark.encode() in _read(p)]
    assert not left


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
