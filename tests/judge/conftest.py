"""One small judge and one server of it for all tests here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.judge.serving import make_judge, served


@pytest.fixture(scope="session")
def judge_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_judge(tmp_path_factory.mktemp("judge") / "model")


@pytest.fixture(scope="session")
def server(judge_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(judge_folder, tmp_path_factory.mktemp("serve") / "log.txt") as url:
        yield url
