"""The base class of all settings."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Base of all settings: unknown keys are errors, numbers are finite, and settings do not change once checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
