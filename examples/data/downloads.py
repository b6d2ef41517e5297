"""Get packages from the Python index and from Debian's archive into a folder, without installing anything."""

from __future__ import annotations

import gzip
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


class FetchError(Exception):
    """Say what could not be had, and what to do."""


@dataclass(frozen=True)
class Downloads:
    """Fetch into a folder. What is there already is not fetched again.

    Attributes:
        folder: Where to.
    """

    folder: Path

    def wheel(self, name: str, version: str) -> Path:
        """Return the unpacked folder of a wheel. Raises FetchError if pip can't get it."""
        return self._unpacked(name, version, ["--only-binary", ":all:"], "*.whl")

    def source_distribution(self, name: str, version: str) -> Path:
        """Return the unpacked folder of a source distribution. Raises FetchError if pip can't get it."""
        return self._unpacked(name, version, ["--no-binary", ":all:"], "*.tar.gz")

    def _unpacked(self, name: str, version: str, options: list[str], pattern: str) -> Path:
        target = self.folder / f"{name}-{version}"
        if target.is_dir():
            return target
        part = self._empty(f"{name}-{version}.part")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
        run([*command, *options, "-d", str(part), f"{name}=={version}"], f"{name} {version} from the Python index")
        found = sorted(part.glob(pattern))
        if not found:
            raise FetchError(
                f"pip downloaded {[p.name for p in part.iterdir()]} for {name} {version}, and no {pattern}"
            )
        unpack(found[0], part)
        found[0].unlink()
        os.replace(part, target)  # at once: a folder of this name is complete
        return target

    def apt_lists(self, languages: list[str]) -> list[Path]:
        """Update package lists in a private state folder, and return them.

        The sources of the system's apt are read; the lists, caches and packages of the system are left alone.

        Args:
            languages: Languages of descriptions, such as en and de.

        Raises:
            FetchError: There is no apt-get, or no source gave a list.
        """
        target = self.folder / f"apt-{'-'.join(languages)}"
        lists = target / "lists"
        if not (target / "complete").exists():
            self._empty(target.name)
            (lists / "partial").mkdir(parents=True)
            options = [*self._apt(target), "-o", f"Acquire::Languages={','.join(languages)}"]
            try:
                run(["apt-get", *options, "-q", "update"], "package lists of Debian")
            except FetchError:
                if not any(lists.glob("*_Packages*")):  # else one of the system's sources failed, and others did not
                    raise
            (target / "complete").touch()
        found = sorted(p for p in lists.iterdir() if p.is_file() and p.stat().st_size)
        if not any("_Packages" in path.name for path in found):
            raise FetchError("apt-get update left no list: does /etc/apt name a Debian or Ubuntu archive?")
        return found

    def deb(self, name: str) -> Path:
        """Return the unpacked folder of a Debian package. Raises FetchError if apt-get can't get it."""
        target = self.folder / f"deb-{name}"
        if target.is_dir():
            return target
        state = self.apt_lists(["en", "de"])[0].parents[1]
        part = self._empty(f"deb-{name}.part")
        run(["apt-get", *self._apt(state), "-q", "download", name], f"Debian's package {name}", cwd=part)
        found = sorted(part.glob("*.deb"))
        if not found:
            raise FetchError(f"apt-get download {name} left no .deb file")
        run(["dpkg-deb", "-x", str(found[0]), str(part)], f"contents of {found[0].name}")
        found[0].unlink()
        os.replace(part, target)
        return target

    def _apt(self, state: Path) -> list[str]:
        (state / "cache" / "archives" / "partial").mkdir(parents=True, exist_ok=True)
        place = state.resolve()
        settings = {
            "Dir::State": place,
            "Dir::State::lists": place / "lists",
            "Dir::State::status": "/var/lib/dpkg/status",
            "Dir::Cache": place / "cache",
            "APT::Sandbox::User": "",  # the user _apt may not enter the folder
        }
        return [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]

    def _empty(self, name: str) -> Path:
        path = self.folder / name
        if path.exists():
            shutil.rmtree(path)
        path.mkdir(parents=True)
        return path


def run(command: list[str], wanted: str, cwd: Path | None = None) -> str:
    """Run a program and return what it printed.

    Args:
        command: The program and its arguments.
        wanted: What it is to get, for the message.
        cwd: Folder that it runs in.

    Raises:
        FetchError: The program does not exist, or failed; with the end of what it printed.
    """
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, errors="replace")
    except FileNotFoundError as error:
        raise FetchError(f"{wanted}: there is no program {command[0]} here; this source needs it") from error
    if done.returncode:
        last = "\n  ".join((done.stderr or done.stdout).strip().splitlines()[-4:])
        raise FetchError(f"{wanted} can't be had ({command[0]} ended with {done.returncode}):\n  {last}")
    return done.stdout


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a wheel or a .tar.gz file; members that point outside of the folder are refused."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(folder)
    else:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")


def list_text(path: Path) -> str:
    """Return the text of one of apt's lists, which may be compressed."""
    if path.suffix == ".gz":
        return gzip.decompress(path.read_bytes()).decode("utf-8")
    if path.suffix == ".xz":
        return lzma.decompress(path.read_bytes()).decode("utf-8")
    if path.suffix == ".lz4":
        return run(["/usr/lib/apt/apt-helper", "cat-file", str(path)], f"text of {path.name}")
    return path.read_text(encoding="utf-8")
