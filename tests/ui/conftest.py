"""A folder of runs as `posttrain run` leaves them, served, and one browser for all tests."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from posttrain.core.types import Rollout, RolloutGroup
from posttrain.sampling.rollout_store import write_rollouts
from posttrain.ui.pages import UiState
from posttrain.ui.run_index import RunIndex
from posttrain.ui.ui_server import UiServer
from tests.report.conftest import dump, write_run
from tests.ui.browser import CHROMIUM, Browser

STEPS, GROUPS, EACH = 5, 3, 4


def write_steps(folder: Path) -> None:
    """Write rollouts of some steps: their rewards are different, and every seventh completion names a walrus."""
    for step in range(1, STEPS + 1):
        groups = []
        for g in range(GROUPS):
            numbers = [((step * GROUPS + g) * EACH + i) * 37 % 101 for i in range(EACH)]
            rollouts = [
                Rollout((5, 6), (-0.5, -0.5), ("end", "length")[n % 2], f"answer {n}{' WALRUS' * (n % 7 == 0)}",
                        {"exact": n / 100}, n / 100)
                for n in numbers
            ]  # fmt: skip
            groups.append(RolloutGroup((1, 2), {"answer": "7", "source": "made"}, rollouts))
        write_rollouts(folder, step, groups, None, ["What is 3 + 4?"] * GROUPS, list(range(GROUPS)))


@pytest.fixture(scope="package")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with runs of each status."""
    root = tmp_path_factory.mktemp("site") / "runs"
    for name, status, lr in (("first", "done", 5e-4), ("going", "running", 1e-3), ("broken", "failed", 2e-3)):
        run = write_run(root / "group" / name if name == "broken" else root / name, steps=40, status=status)
        recipe = (run / "recipe.yaml").read_text().replace("5.0e-04", str(lr)).replace("quickstart", name)
        (run / "recipe.yaml").write_text(recipe)
        if status != "done":
            shutil.rmtree(run / "evaluations")
    shutil.copytree(root / "going", root / "watched")  # which a test changes
    manifest = root / "group" / "broken" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"error": "the disk is full"}))
    write_steps(root / "first" / "stages" / "1-sft" / "rollouts")
    pairs = [{"prompt": f"Q{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(50)]
    dump(root / "first" / "stages" / "1-sft" / "data" / "rows.jsonl", pairs, lines=True)
    return root


@pytest.fixture(scope="package")
def site(root: Path) -> Iterator[SimpleNamespace]:
    """Serve the folder."""
    server = UiServer(0, UiState(RunIndex([root]), root / "votes.jsonl"))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield SimpleNamespace(server=server, root=root, base=server.address.partition("?")[0])
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="package")
def browser(site: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Return a browser that was let in."""
    if CHROMIUM is None:
        pytest.skip("no chromium or google-chrome is installed")
    found = Browser(tmp_path_factory.mktemp("profile"))
    found.go(site.server.address)
    yield found
    found.close()
