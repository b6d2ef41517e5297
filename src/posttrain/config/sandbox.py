"""Limits of the sandbox."""

from __future__ import annotations

from pydantic import Field

from posttrain.config.settings import Config


class SandboxConfig(Config):
    """Limits of a program. There is no network, and no file but its own, whatever is set here."""

    seconds: float = Field(5.0, gt=0, le=600, description="Time by the clock; as much processor time per process.")
    memory_mb: int = Field(512, ge=32, description="Memory of all its processes together, MiB.")
    processes: int = Field(16, ge=1, le=512, description="Processes and threads at once.")
    output_kb: int = Field(64, ge=1, description="Output and errors together, KiB.")
    files_mb: int = Field(16, ge=1, description="Its folder, and each file in it, MiB.")
