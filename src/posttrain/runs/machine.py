"""The machine of a run, for its manifest."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "peft", "datasets", "tokenizers", "safetensors", "numpy")


def machine() -> dict[str, Any]:
    """Return processor, memory, device, and the versions of the packages that compute."""
    import torch

    from posttrain.models.backends import backend_for

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    info: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        **backend_for(device).describe(),
    }
    info.update({name: importlib.metadata.version(name) for name in PACKAGES})
    return info


def program_name() -> str:
    """Return how to call the command line again: `posttrain` if a shell finds it, else the way it was started."""
    started, found = Path(sys.argv[0]), shutil.which("posttrain")
    if started.name == "posttrain" and (found is None or not started.exists() or not os.path.samefile(found, started)):
        return shlex.quote(str(started))
    if started.name == "__main__.py" and found is None:
        return f"{shlex.quote(sys.executable)} -m posttrain"
    return "posttrain"


def cpu_name() -> str:
    """Return the processor's name as the system gives it, else its kind."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            for line in f:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
