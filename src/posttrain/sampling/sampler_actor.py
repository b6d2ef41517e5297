"""The Ray actor that samples: the local engine, on any machine of the cluster.

The class travels by value: at its top the module imports the standard library alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any


class SamplerActor:
    """Sample with weights that are pushed to it. What it is told is done in order."""

    def __init__(self, path: Sequence[str], folder: str, settings: Mapping[str, Any], threads: int) -> None:
        """Open the model.

        Args:
            path: The trainer's `sys.path`.
            folder: The trainer's working folder, in which names of files are looked up if this machine has it.
            settings: As the first message to a worker of `posttrain.sampling.local_worker`.
            threads: Threads of its products on a CPU.
        """
        sys.path[:] = [*path, *(p for p in sys.path if p not in path)]
        if os.path.isdir(folder):
            os.chdir(folder)
        import torch

        from posttrain.sampling.local_worker import open_worker_sampler

        torch.set_num_threads(threads)
        self.sampler = open_worker_sampler(settings)

    def process(self) -> int:
        """Return the process of the actor."""
        return os.getpid()

    def context(self) -> int:
        """Return the most tokens of a prompt and its completion."""
        return self.sampler.context

    def sample(self, requests: Any, params: Any) -> Any:
        """Return the groups of requests."""
        return self.sampler.sample(requests, params)

    def update(self, content: bytes) -> None:
        """Replace weights by those of a safetensors file's content."""
        from safetensors.torch import load

        from posttrain.sampling.local_worker import replace_weights

        replace_weights(self.sampler, load(content))
