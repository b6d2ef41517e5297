"""One Ray cluster for all tests that need one; RAY_ADDRESS=auto takes one that runs already."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from posttrain.core.ray_cluster import OF_STARTED


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    ray = pytest.importorskip("ray", reason="needs Ray: pip install 'posttrain[ray]'")
    os.environ.update({name: os.environ.get(name, value) for name, value in OF_STARTED.items()})
    own = {"address": "local", "num_cpus": 8, "include_dashboard": False, "object_store_memory": 200_000_000}
    options = {} if "RAY_ADDRESS" in os.environ else own
    ray.init(log_to_driver=False, logging_level="ERROR", **options)
    yield ray
    ray.shutdown()
