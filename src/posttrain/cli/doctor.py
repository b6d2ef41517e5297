"""posttrain doctor: print what is installed, what is missing, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from posttrain.cli.arguments import make_console

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet
    from rich.console import Console

NEEDED = ("torch", "transformers", "peft", "datasets", "tokenizers", "safetensors", "pydantic", "numpy")
SLOW_GFLOPS_A_CORE = 8.0
"""Any processor of the last ten years does several times this in float32 once its vector units are used."""


def doctor_command() -> None:
    """Print versions, devices, memory, extras and problems. The exit code is 1 if there is a problem."""
    raise typer.Exit(0 if print_findings(make_console()) else 1)


def print_findings(console: Console) -> bool:
    """Print what was found; return True if there is no problem."""
    problems: list[str] = []
    for title, part in (("versions", _versions), ("machine", _machine), ("extras", _extras)):
        console.print(title, style="bold")
        part(lambda name, value: console.print(f"  {name:<14} {value}", soft_wrap=True), problems)
    if problems:
        console.print("problems", style="bold")
        for problem in problems:
            console.print(f"  - {problem}", soft_wrap=True)
    else:
        console.print("no problems found")
    return not problems


Line = Callable[[str, object], None]


def _versions(line: Line, problems: list[str]) -> None:
    from posttrain import __version__

    line("posttrain", __version__)
    line("python", f"{platform.python_version()} ({sys.executable})")
    wanted = _requirements()
    for name in NEEDED:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            line(name, "missing")
            problems.append(f"{name} is not installed: pip install posttrain")
            continue
        line(name, version)
        specifier = wanted.get(name)
        if specifier and not specifier.contains(version.split("+")[0], prereleases=True):
            problems.append(f"{name} {version} is outside what was tested: pip install '{name}{specifier}'")


def _requirements() -> dict[str, SpecifierSet]:
    """Return the versions of each package that posttrain's own metadata asks for."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(line) for line in importlib.metadata.requires("posttrain") or []]
    except importlib.metadata.PackageNotFoundError:
        return {}
    return {r.name.lower(): r.specifier for r in wanted if r.marker is None}


def _machine(line: Line, problems: list[str]) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    from posttrain.runs.machine import cpu_name

    line("processor", f"{cpu_name()} ({platform.machine()}), {cores} cores")
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        line("memory", f"{memory:.1f} GiB")
        if memory < 3:
            problems.append(f"{memory:.1f} GiB of memory: the smallest recipe needs about 3")
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    line("free disk", f"{free:.1f} GiB here")
    if free < 2:
        problems.append(
            f"{free:.1f} GiB of disk left here: a run of a 135M model takes about 2; use --folder elsewhere"
        )
    try:
        import torch
    except ImportError as error:
        problems.append(f"torch can't be imported ({error}): reinstall it")
        return
    _devices(line, problems)
    from posttrain.models.backends import backend_for

    computes = backend_for(torch.device("cpu")).describe()
    rate, threads = products_rate(), torch.get_num_threads()
    line("products", f"{rate:.0f} GFLOP/s in float32 with {threads} threads ({computes['float32_products']})")
    line("sampling", f"through {computes['decoding']}")
    if rate < SLOW_GFLOPS_A_CORE * min(threads, cores):
        problems.append(
            f"matrix products are slow ({rate:.1f} GFLOP/s): other processes may hold the cores, or OMP_NUM_THREADS "
            f"({os.environ.get('OMP_NUM_THREADS', 'not set')}) exceeds the {cores} cores there are"
        )
    _cache(line, problems)


def _devices(line: Line, problems: list[str]) -> None:
    import torch

    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(i)
            name = torch.cuda.get_device_name(i)
            line(f"cuda:{i}", f"{name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free")
    elif torch.backends.mps.is_available():
        line("device", "mps")
    else:
        line("device", "cpu")
        if shutil.which("nvidia-smi"):
            built = torch.version.cuda or "none"
            problems.append(f"nvidia-smi is here but torch sees no GPU (torch {torch.__version__}, CUDA {built}): "
                            "install a build of torch for your driver")  # fmt: skip


def products_rate(seconds: float = 0.5) -> float:
    """Return the GFLOP/s of float32 matrix products: the best of repeated 1024³ products in about `seconds`.

    The products take the same route as those of training.
    """
    import torch

    from posttrain.models.backends import backend_for

    backend_for(torch.device("cpu")).describe()  # sets up products as for training
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best / 1e9


def _cache(line: Line, problems: list[str]) -> None:
    from posttrain.core.files import cache_folder

    folder = cache_folder()
    line("cache", folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        problems.append(
            f"the cache folder {folder} can't be written ({error.strerror}): set POSTTRAIN_CACHE to another"
        )


def _extras(line: Line, problems: list[str]) -> None:
    from posttrain import sandbox
    from posttrain.recipe.machine_checks import OPTIONAL_PACKAGES, is_installed

    try:
        sandbox.require_sandbox()
        line("sandbox", "works (programs as rewards)")
    except sandbox.SandboxError as error:
        line("sandbox", f"{error} (programs as rewards)")  # not a problem: most runs need none
    for package, (extra, use) in OPTIONAL_PACKAGES.items():
        state = importlib.metadata.version(package) if is_installed(package) else f"missing: pip install {package}"
        line(package, f"{state} ({use}; extra {extra})")
