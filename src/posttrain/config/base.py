"""The base class of all settings."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Base of all settings: unknown keys are errors, numbers are finite, and settings do not change once checked."""

    one_process: ClassVar[tuple[str, ...]] = ()
    """Settings that work in one process only, if they are set; method: the whole stage does."""

    # Validators are built at first use: a process of a command or a reward uses few of the classes that it imports.
    model_config = ConfigDict(defer_build=True, extra="forbid", frozen=True, allow_inf_nan=False)
