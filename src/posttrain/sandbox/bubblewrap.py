"""One program, one sandbox: see the package's text."""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from posttrain.config.sandbox import SandboxConfig
from posttrain.core.errors import PosttrainError
from posttrain.sandbox import seccomp

Status = Literal["ok", "error", "timeout", "memory", "processes", "output"]
TICK = 0.02
"""Seconds between two looks at memory and processes."""
BASE_MB = 64
"""Address space that an interpreter takes before it has done anything."""
OWN = 2
"""Process of bubblewrap itself, and the program's first."""
SOCKET = 5 << 16
"""Bytes that the kernel keeps at most for an open file of a program: a full socket of a pair. Of pipes it is less."""
FILES = 20_000
"""Files and folders that a program may make: the kernel keeps one KiB of each, whatever is in it."""


class SandboxError(PosttrainError, RuntimeError):
    """There is no sandbox to be had on this machine."""


@dataclass(frozen=True, slots=True)
class ProgramResult:
    """Outcome of a program.

    status: ok (exit code 0), error (another, or a signal), or the limit that ended it. stdout, stderr: what it wrote,
    until then. code: exit code, 128 + signal where one ended it, -1 where a limit did. seconds: by the clock.
    """

    status: Status
    stdout: str
    stderr: str
    code: int
    seconds: float


def run_program(program: str, stdin: str = "", limits: SandboxConfig | None = None) -> ProgramResult:
    """Run Python source under `limits`, never without a sandbox.

    The program sees Python's standard library, an empty folder (/work, also its /tmp), `stdin`, and nothing else; the
    order of its sets and its environment are the same every time. Source that does not compile is an error like any
    other.

    Args:
        program: The source.
        stdin: Its input.
        limits: Its limits. None: the defaults.

    Raises:
        SandboxError: There is no sandbox on this machine.
    """
    require_sandbox()
    return _run(program, stdin, limits or SandboxConfig())


@lru_cache(maxsize=1)
def require_sandbox() -> None:
    """Check that the sandbox works and isolates. Raises SandboxError, with what is missing."""
    if sys.platform != "linux" or not seccomp.known():
        raise SandboxError(
            "programs run only in a sandbox, and there is one for Linux on x86-64 and ARM64 only; this is "
            f"{sys.platform} on {os.uname().machine if hasattr(os, 'uname') else 'an unknown machine'}"
        )
    if shutil.which("bwrap") is None:
        raise SandboxError(
            "programs run only in a sandbox, and bubblewrap (bwrap) is not installed: apt install bubblewrap, dnf "
            "install bubblewrap, or the like"
        )
    probe = "import os, socket\nprint(sorted(os.listdir('/work')), os.getpid() < 10)\ntry: socket.socket()\n"
    probe += "except PermissionError: print('alone')"
    probed = _run(probe, "", SandboxConfig(seconds=20))
    if probed.stdout != "[] True\nalone\n":
        raise SandboxError(
            "programs run only in a sandbox, and bubblewrap's does not work here: "
            f"{(probed.stderr or probed.stdout).strip()[-400:] or probed.status}. User namespaces must be allowed "
            "(Ubuntu: sysctl kernel.apparmor_restrict_unprivileged_userns=0; in a container: see its seccomp profile)"
        )


@lru_cache(maxsize=1)
def _interpreter() -> Path:
    """Return the interpreter of this environment; the system's if nobody else may enter that one's
    folder and root asks."""
    own = Path(os.path.realpath(getattr(sys, "_base_executable", "") or sys.executable))
    if os.geteuid() == 0 and not all(p.stat().st_mode & stat.S_IXOTH for p in own.parents):
        system = Path("/usr/bin/python3")
        if not system.exists():
            raise SandboxError(
                f"programs run in a sandbox as nobody in particular, who may not enter {own.parent}: run posttrain as "
                "an ordinary user, or install Python as /usr/bin/python3"
            )
        return system.resolve()
    return own


def _installation(python: Path) -> list[Path]:
    """Return what an interpreter outside of /usr needs of its installation: all of it if nothing else is there.

    Of a home folder, or of its `.local` (pipx, pyenv and uv have folders of their own), only the interpreter, its
    library and the standard library are shown.
    """
    prefix = python.parent.parent
    home = Path(os.path.realpath(Path.home()))
    if prefix.is_relative_to("/usr"):
        return []
    if not (home.is_relative_to(prefix) or prefix == home / ".local"):
        return [prefix]
    library = prefix / "lib"
    own = sorted(library.glob(f"libpython{sys.version_info[0]}*.so*"))
    return [python, library / f"python{sys.version_info[0]}.{sys.version_info[1]}", *own]


def _sealed(data: bytes) -> int:
    """A file descriptor with these bytes, in memory, that nobody can change."""
    import fcntl

    fd = os.memfd_create("posttrain", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, os.SEEK_SET)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
    return fd


@dataclass(frozen=True, slots=True)
class Launch:
    """Describe a program that runs in a sandbox.

    Attributes:
        target: Path there of the Python source that runs after the limits are set.
        files: Contents of the files that it sees besides the system's, by path there.
        arguments: Of the target.
        stdin: Its input.
        pipes: File descriptors that it inherits.
        lasting: True for a server of many jobs, each of which has its own limit of processor time.
    """

    target: str
    files: Mapping[str, bytes]
    arguments: Sequence[str] = ()
    stdin: bytes = b""
    pipes: Sequence[int] = ()
    lasting: bool = False


def resource_limits(limits: SandboxConfig) -> dict[str, int]:
    """Return the limits that the kernel holds for each process, by their names in `resource`."""
    return {
        "CORE": 0, "CPU": int(limits.seconds) + 1, "FSIZE": limits.files_mb << 20, "NOFILE": 64,
        "NPROC": limits.processes + 1, "AS": (limits.memory_mb + BASE_MB) << 20,
    }  # fmt: skip


def _command(launch: Launch, limits: SandboxConfig, fds: dict[str, int], seccomp_fd: int) -> list[str]:
    """Return bubblewrap's command line."""
    python = _interpreter()
    files = str(limits.files_mb << 20)
    out = [
        # The program is the first process there: bubblewrap's own would run as the same user, and its memory could be
        # written (/proc/1/mem).
        "bwrap", "--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--new-session",
        "--as-pid-1",
        "--cap-drop", "ALL", "--uid", "1000", "--gid", "1000", "--hostname", "sandbox", "--clearenv",
        "--ro-bind", "/usr", "/usr", "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache",
    ]  # fmt: skip
    for name in ("lib", "lib64", "lib32", "bin"):
        path = Path("/", name)
        if path.is_symlink():
            out += ["--symlink", os.readlink(path), str(path)]
        elif path.is_dir():
            out += ["--ro-bind", str(path), str(path)]
    for path in _installation(python):
        out += ["--ro-bind", str(path), str(path)]
    out += [
        "--proc", "/proc", "--dev", "/dev", "--size", "65536", "--tmpfs", "/dev/shm", "--remount-ro", "/dev/shm",
        "--remount-ro", "/dev", "--size", files, "--tmpfs", "/work", "--symlink", "work", "/tmp", "--chdir", "/work",
    ]  # fmt: skip
    for target, fd in fds.items():
        out += ["--ro-bind-data", str(fd), target]
    out += ["--remount-ro", "/", "--seccomp", str(seccomp_fd)]
    for name, value in {
        "PATH": "/usr/bin:/bin", "HOME": "/work", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1",
        "PYTHONUTF8": "1", "PYTHONDONTWRITEBYTECODE": "1",
    }.items():  # fmt: skip
        out += ["--setenv", name, value]
    settings = {n: v for n, v in resource_limits(limits).items() if not (launch.lasting and n == "CPU")}
    inside = [str(x) for pair in settings.items() for x in pair]
    return [*out, "--", str(python), "-s", "/inside.py", launch.target, *inside, "--", *launch.arguments]


def start_sandbox(launch: Launch, limits: SandboxConfig) -> subprocess.Popen[bytes]:
    """Start a sandbox."""
    with contextlib.ExitStack() as stack:

        def sealed(data: bytes) -> int:
            fd = _sealed(data)
            stack.callback(os.close, fd)
            return fd

        inside = (Path(__file__).parent / "inside.py").read_bytes()
        fds = {path: sealed(data) for path, data in {"/inside.py": inside, **launch.files}.items()}
        seccomp_fd = sealed(seccomp.program())
        who: dict[str, Any] = {}
        if os.geteuid() == 0:
            # The kernel does not count root's processes, so nobody in particular runs it: a number for each caller.
            number = 30000 + os.getpid() % 30000
            who = {"user": number, "group": number, "extra_groups": []}
        return subprocess.Popen(
            _command(launch, limits, fds, seccomp_fd), stdin=sealed(launch.stdin), stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, bufsize=0, cwd="/", env={"PATH": "/usr/bin"}, start_new_session=True,
            pass_fds=[*fds.values(), seccomp_fd, *launch.pipes], **who,
        )  # fmt: skip


def _run(program: str, stdin: str, limits: SandboxConfig) -> ProgramResult:
    began = time.monotonic()
    files = {"/main.py": program.encode("utf-8", "replace")}
    process = start_sandbox(Launch("/main.py", files, stdin=stdin.encode("utf-8", "replace")), limits)
    try:
        ended, out, err = watch_sandbox(process, limits, began + limits.seconds)
    finally:
        end_sandbox(process)
    code = process.wait()
    status: Status = ended or ("ok" if code == 0 else "error")
    text = [b.decode("utf-8", "replace") for b in (out, err)]
    return ProgramResult(status, text[0], text[1], -1 if ended else code, time.monotonic() - began)


def watch_sandbox(
    process: subprocess.Popen[bytes], limits: SandboxConfig, until: float, verdict: int | None = None
) -> tuple[Status | None, bytes, bytes]:
    """Read the output of a sandbox until its program ends or breaks a limit.

    Args:
        process: The sandbox.
        limits: Its limits.
        until: When its time is over, by the monotonic clock.
        verdict: A file descriptor: once it can be read, nothing else matters. Until then, an ended program is no end.

    Returns:
        The limit that it broke (None: none), its output and its errors.
    """
    assert process.stdout and process.stderr
    got = {process.stdout: bytearray(), process.stderr: bytearray()}
    ended: Status | None = None
    with selectors.DefaultSelector() as selector:
        for stream in got:
            selector.register(stream, selectors.EVENT_READ)
        if verdict is not None:
            selector.register(verdict, selectors.EVENT_READ)
        looked = 0.0
        while ended is None:
            events = selector.select(TICK)
            if any(key.fd == verdict for key, _ in events):
                break
            for key, _ in events:
                stream = key.fileobj  # type: ignore[assignment]
                data = os.read(stream.fileno(), 65536)
                got[stream] += data
                if not data:
                    selector.unregister(stream)
            # A program that closed its output is watched until it ends.
            silent = not any(stream in selector.get_map() for stream in got)
            if silent and verdict is None and process.poll() is not None:
                break
            now = time.monotonic()
            if sum(map(len, got.values())) > limits.output_kb << 10:
                ended = "output"
            elif now > until:
                ended = "timeout"
            elif now - looked >= TICK:
                looked = now
                ended = _excess(process.pid, limits)
            if silent and verdict is None and ended is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(TICK)  # nothing is left to select on
    room = limits.output_kb << 10
    out = bytes(got[process.stdout][:room])
    return ended, out, bytes(got[process.stderr][: room - len(out)])


def _excess(pid: int, limits: SandboxConfig) -> Status | None:
    """The limit that the processes under `pid` exceed together; their files' and sockets' memory in the kernel too."""
    page, size, count, made = os.sysconf("SC_PAGE_SIZE"), 0, 0, 0
    for one in _family(pid):
        count += 1
        with contextlib.suppress(OSError, IndexError):
            size += int(Path(f"/proc/{one}/statm").read_text().split()[1]) * page
        if one != pid:
            with contextlib.suppress(OSError):
                size += len(os.listdir(f"/proc/{one}/fd")) * SOCKET
                if os.path.exists(f"/proc/{one}/root/inside.py"):  # its folders are no longer this machine's
                    files = os.statvfs(f"/proc/{one}/root/work")
                    made = files.f_files - files.f_ffree
    if size > (limits.memory_mb + BASE_MB) << 20 or made > FILES:
        return "memory"
    return "processes" if count > limits.processes + OWN else None


def _family(pid: int) -> Iterator[int]:
    """A process and all that descend from it."""
    todo = [pid]
    while todo:
        one = todo.pop()
        yield one
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{one}/task"):
                todo += map(int, Path(f"/proc/{one}/task/{task}/children").read_text().split())


def end_sandbox(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left: the namespace's first process, with which the kernel ends all others in it."""
    for pid in reversed(list(_family(process.pid))) if process.poll() is None else []:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(OSError):
        process.kill()
    process.wait()
    for stream in (process.stdout, process.stderr):
        if stream:
            stream.close()
