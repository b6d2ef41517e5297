"""The notebooks run in a Jupyter kernel, and what is stored in them is small and of no particular machine."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


def code_cells(path: Path) -> list[dict]:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_what_is_stored(path: Path) -> None:
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    kinds = [key for cell in cells for out in cell["outputs"] for key in out.get("data", {})]
    assert "image/png" in kinds and "text/html" in kinds
    for cell in cells:
        text = json.dumps(cell["outputs"])
        assert len(text) < 150_000 and not re.search(r"/(root|home|tmp|work|usr)/", text)
        assert all(out["output_type"] in ("display_data", "execute_result", "stream") for out in cell["outputs"])
        assert len(cell["outputs"]) < 30  # each stage and evaluation has one line of progress, however long it runs


@pytest.mark.long
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nbclient", reason="extra: dev")
    pytest.importorskip("ipykernel", reason="extra: dev")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    monkeypatch.setattr(sys, "path", [str(ROOT / "tools"), *sys.path])
    from notebooks import executed

    notebook = executed(path, tmp_path)
    (summary,) = tmp_path.glob("runs/*/manifest.json")
    assert json.loads(summary.read_text())["status"] == "done"
    assert any("image/png" in out.get("data", {}) for cell in notebook.cells for out in cell.get("outputs", ()))
