"""Settings of where a run is carried out: on this machine, or on a Ray cluster."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from posttrain.config.base import Config

OF_RAY = ("address", "trainers", "nodes", "samplers", "rewards", "cpus", "restarts", "wait")


class PlacementConfig(Config):
    """Say where a run is carried out. Results do not depend on it, but for the order of floating-point sums."""

    engine: Literal["local", "ray"] = Field(
        "local",
        description="local: this process, or the processes that torchrun started. ray: processes on a Ray cluster (extra: ray).",
    )
    address: str | None = Field(
        None,
        description="HOST:PORT of the Ray cluster, or auto: the one that this machine belongs to. None: a cluster of this machine alone is started for the run.",
    )
    trainers: int = Field(
        1,
        ge=1,
        description="Processes that train together (FSDP2), each on a GPU, or on `cpus` cores if there is no GPU.",
    )
    nodes: int | None = Field(
        None, ge=1, description="Machines that the trainers are spread over, evenly. None: as few as have room."
    )
    replicas: int = Field(
        1,
        ge=1,
        description="Copies of the weights, each sharded over trainers / replicas neighbouring processes (HSDP). With one for each machine only gradients travel between machines.",
    )
    sequence_parallel: int = Field(
        1,
        ge=1,
        description="Neighbouring processes that compute each micro-batch together, a slice of its tokens each: long sequences need 1 / N of the memory for activations. Each then takes N times systems.tokens_per_micro_batch of its stage. 1: each process computes its own.",
    )
    samplers: int = Field(
        0,
        ge=0,
        description="Actors that sample completions with weights pushed to them, each on a GPU or `cpus` cores, on any machine. 0: trainers sample themselves, or as `sampler.workers` says.",
    )
    rewards: int = Field(
        0,
        ge=0,
        description="Actors that call rewards which run in separate processes (mathematics, programs, your functions), a core each, on any machine. 0: each trainer has `rewards.workers` processes beside it.",
    )
    cpus: int = Field(1, ge=1, description="Processor cores of each trainer and sampler, which its threads use.")
    restarts: int = Field(
        3, ge=0, description="How often all trainers are started again from the last checkpoint when one was lost."
    )
    wait: float = Field(
        600.0, ge=0, description="Seconds to wait until the cluster has room, at the start and after a loss."
    )

    @model_validator(mode="after")
    def _fits(self) -> PlacementConfig:
        odd = [name for name in OF_RAY if name in self.model_fields_set and getattr(self, name) != _default(name)]
        if self.engine != "ray" and odd:
            more = "; the number of processes is torchrun's --nproc-per-node" if odd[0] == "trainers" else ""
            raise ValueError(f"{odd[0]} is for engine: ray, and engine is {self.engine}{more}")
        if self.nodes is not None and self.trainers % self.nodes:
            raise ValueError(f"{self.trainers} trainers can't be spread evenly over {self.nodes} nodes")
        for name in ("samplers", "rewards"):
            if 0 < (count := getattr(self, name)) < self.trainers:
                raise ValueError(f"{name} is {count}, and each of {self.trainers} trainers needs one at least")
        if self.engine == "ray" and self.trainers % self.replicas:
            raise ValueError(f"{self.trainers} trainers can't be divided into {self.replicas} replicas")
        if self.engine == "ray" and self.trainers % self.sequence_parallel:
            raise ValueError(
                f"{self.trainers} trainers can't be divided into groups of {self.sequence_parallel} (sequence_parallel)"
            )
        return self


def _default(name: str) -> object:
    return PlacementConfig.model_fields[name].default
