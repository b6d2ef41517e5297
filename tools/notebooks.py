"""Execute the notebooks of examples/notebooks in a Jupyter kernel, and write what they show into them.

`python tools/notebooks.py [NAME ...]` (extra: dev) rewrites the outputs; tests/examples/test_notebooks.py runs copies.
"""

from __future__ import annotations

import base64
import io
import sys
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "notebooks"


def executed(path: Path, folder: Path) -> Any:
    """Return a notebook with the outputs of its cells, run in a folder; a cell that raises is an error.

    Args:
        path: The notebook.
        folder: Working folder of its kernel, where its runs go.
    """
    import nbclient
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    # timing metadata and the like would make every execution another file
    client = nbclient.NotebookClient(
        notebook, timeout=600, record_timing=False, resources={"metadata": {"path": folder}}
    )
    return client.execute()


def _few_colours(png: str) -> str:
    """Return a figure, in base64, with 32 colours: a fifth of the bytes."""
    from PIL import Image

    out = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").quantize(32).save(out, "PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode()


def main() -> None:
    """Execute the named notebooks, or all, and save them."""
    import nbformat

    for path in sorted(FOLDER.glob("*.ipynb")):
        if sys.argv[1:] and path.stem not in sys.argv[1:]:
            continue
        with tempfile.TemporaryDirectory() as folder:
            notebook = executed(path, Path(folder))
        for cell in notebook.cells:
            if cell.cell_type == "code":
                # warnings on the standard error name files of this machine
                cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
                for out in cell.outputs:
                    if "image/png" in out.get("data", {}):
                        out.data["image/png"] = _few_colours(out.data["image/png"])
        notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
        nbformat.write(notebook, path)
        print(f"executed {path.name}")


if __name__ == "__main__":
    main()
