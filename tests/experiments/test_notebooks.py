"""Every notebook runs from its first cell to its last, as a reader would run it."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "experiments" / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("LMX_CACHE", str(tmp_path))
    notebook = nbformat.read(path, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), f"{path.name}: clear its outputs"
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    loop = next(cell for cell in notebook.cells if "lmx.train.steps(run):" in cell.source)
    printed = "".join(output.get("text", "") for output in loop.outputs)
    losses = [float(line.split()[1]) for line in printed.splitlines()]
    assert len(losses) > 1 and losses[-1] < losses[0]
