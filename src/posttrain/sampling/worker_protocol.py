"""Protocol of sampler workers: processes that sample beside the learner, with weights that are pushed to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Protocol

from torch import Tensor

from posttrain.config import SamplingConfig
from posttrain.core.errors import PosttrainError
from posttrain.core.types import RolloutGroup
from posttrain.sampling.protocol import Request


class WorkerError(PosttrainError, RuntimeError):
    """A sampler worker that can't be started, or that refuses what it was asked for. Asking again does not help."""


class WorkerLost(WorkerError):
    """A sampler worker whose process or machine is gone: another one can be asked the same again."""


class SamplerWorker(Protocol):
    """A sampler in another process, environment or machine.

    What it is told is done in order: requests that were submitted before an update are completed with the weights
    before it, those after it with the new ones. So all tokens that one request brings are of one version, which is
    `Rollout.pieces[0].step` of its rollouts; completions that continue under new weights are asked for in pieces.

    Attributes:
        version: Version of the weights that the next request is sampled with. 0: those that it was opened with.
        context: Most tokens of a prompt and its completion.
    """

    version: int

    @property
    def context(self) -> int: ...  # a plain attribute serves as well

    def update(self, version: int, weights: Mapping[str, Tensor]) -> None:
        """Replace weights; returns once the worker has them, or once the tensors may be changed.

        Args:
            version: Number of the weights, larger than any before.
            weights: By the names of the Hugging Face state dict, whole and unsharded. What is not named stays as it
                was, so that frozen weights are sent once. Adapters are merged into the weights that they change:
                see `posttrain.models.published_weights`.

        Raises:
            WorkerLost: The worker is gone.
            WorkerError: It can't take the weights.
        """

    def submit(self, requests: Sequence[Request], params: SamplingConfig) -> Future[list[RolloutGroup]]:
        """Start sampling and return at once.

        The future has one group for each request, in their order, or raises WorkerLost if the worker is gone,
        DataError for a prompt that does not fit, and WorkerError for what else the worker refuses.

        Args:
            requests: The prompts. Random streams depend on a request's seed and the number of the completion alone.
            params: How tokens are drawn.
        """

    def close(self) -> None:
        """End the worker; futures that are not done raise WorkerLost. Calling it again does nothing."""
