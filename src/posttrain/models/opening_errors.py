"""Errors on opening a model, as one that says what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from posttrain.core.errors import ModelError, PosttrainError
from posttrain.core.files import similar


class explained:
    """Turns errors on opening a model into one that says what to do; `every`: of any kind, not transformers' alone."""

    def __init__(self, source: str, every: bool = True) -> None:
        self.source, self.every = source, every

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        # A damaged file makes torch, safetensors, pickle and transformers raise errors of many kinds.
        turned = Exception if self.every else (OSError, ValueError, KeyError)
        passed_on = PosttrainError | MemoryError | torch.OutOfMemoryError
        if isinstance(error, turned) and not isinstance(error, passed_on):
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ModelError(
                f"model source {self.source!r} can't be opened: {first}\n"
                "Expected a Hub name (needs the network, or the model in the Hub's cache), a folder in the Hugging "
                "Face layout, a .gguf file, package:NAME, lab:SEED, lab:reviews or tiny:TYPE."
                f"{similar(Path(self.source))}"
            ) from error
