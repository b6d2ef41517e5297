"""Settings of the sampler of stages that train on the policy's own completions: where it runs, and on which engine."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from posttrain.config.settings import SamplerConfig

OF_VLLM = ("python", "engine_args", "separate_adapter")
"""Settings that only vLLM has."""
SET_BY_US = (
    "model", "tokenizer", "skip_tokenizer_init", "dtype", "enable_prefix_caching", "logprobs_mode", "generation_config",
    "max_num_seqs", "kv_cache_memory_bytes", "enable_lora", "max_loras", "max_lora_rank",
)  # fmt: skip
"""Arguments of vLLM's engine that follow from the recipe."""


class RolloutSamplerConfig(SamplerConfig):
    """Settings of a stage's sampler: how completions are drawn, how many at a time, and by which processes."""

    backend: Literal["local", "vllm"] = Field(
        "local",
        description="Engine that samples: posttrain's own, or vLLM in another process and Python environment, which gets the weights after each update (docs/samplers.md).",
    )
    workers: int | None = Field(
        None,
        ge=0,
        description="Processes that sample, on each rank. 0: the process that trains samples itself. None: 0 for local, 1 for vllm.",
    )
    address: str | list[str] | None = Field(
        None,
        description="HOST:PORT of a sampler server that was started by hand, or a list of them, each a worker: sampler_server.py (docs/samplers.md), with the token in POSTTRAIN_SAMPLER_TOKEN. Several ranks share the list. None: the run starts its workers.",
    )
    python: str | None = Field(
        None,
        description="vllm: path of the Python of the environment that has vLLM, such as vllm-env/bin/python. None: the Python that runs posttrain.",
    )
    engine_args: dict[str, Any] = Field(
        default_factory=dict,
        description="vllm: further arguments of its engine, such as {tensor_parallel_size: 2, gpu_memory_utilization: 0.4, max_model_len: 4096}.",
    )

    separate_adapter: bool = Field(
        False,
        description="vllm: send LoRA's two factors alone after each update, and let vLLM multiply by them beside the frozen weights. false: all weights are sent, with adapters merged into them.",
    )

    @property
    def addresses(self) -> list[str]:
        """Return the addresses of sampler servers."""
        return [self.address] if isinstance(self.address, str) else list(self.address or [])

    @model_validator(mode="after")
    def _of_servers(self) -> RolloutSamplerConfig:
        if self.address is None:
            return self
        for name in ("workers", "python"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"sampler.{name} is for workers that the run starts, and sampler.address names servers"
                )
        for address in self.addresses or [""]:
            host, _, port = address.rpartition(":")
            if not host or not port.isdecimal():
                raise ValueError(f"sampler.address has {address!r}: expected HOST:PORT, such as 10.0.0.5:7001")
        return self

    @model_validator(mode="after")
    def _of_backend(self) -> RolloutSamplerConfig:
        if self.backend == "local":
            given = [name for name in OF_VLLM if getattr(self, name)]
            if given:
                raise ValueError(f"sampler.{given[0]} is for sampler.backend vllm, and it is local: leave it out")
            return self
        if self.workers == 0:
            raise ValueError("sampler.workers is 0, and vLLM samples in a process of its own: set it to 1 or more")
        if self.kv_cache is not None:
            raise ValueError(
                "sampler.kv_cache is for the local sampler: for vLLM set engine_args: {kv_cache_dtype: ...}"
            )
        if self.min_p and self.top_p < 1:
            raise ValueError("vLLM applies min_p before top_p, and posttrain after it: leave one of them out")
        fixed = sorted(set(self.engine_args).intersection(SET_BY_US))
        if fixed:
            raise ValueError(
                f"sampler.engine_args.{fixed[0]} is set by posttrain: leave it out (max_running and cache_mb set how "
                "many completions run, and the memory of keys and values)"
            )
        return self

    @property
    def processes(self) -> int:
        """Return the number of worker processes; 0: the process that trains samples itself."""
        if self.address is not None:
            return len(self.addresses)
        return self.workers if self.workers is not None else int(self.backend == "vllm")
