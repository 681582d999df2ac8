"""
The notebook: that it works from top to bottom, and that what is stored is what it said. To store it again:

    PYTHONPATH=.:tests python tests/test_notebook.py
"""

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell

from training import ROOT


NOTEBOOK = ROOT / "notebooks" / "pvm.ipynb"
NOT_RUN = "skip-execution"  # the tag that nbclient knows
SHORTER = "CONVERSATIONS = 160"  # after the cell tagged as papermill does, "parameters"
# After the last cell.
FOUND = """
import json

print(json.dumps({
    "base": right(base, 64), "off": right(trained, 64, use_pvm=False), "used": used, "of_cache": of_cache,
    "of_branches": of_branches, "attention": [weights[0, :, -1].mean(dim=0).sum().item() for weights in attentions],
    "gates": trained.description.gates, "step": trained.description.step,
    "report": json.loads(Path("runs/eval/report.json").read_text())["overall"],
}))
"""


def code_cells(notebook: NotebookNode, run: bool) -> list[NotebookNode]:
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [cell for cell in cells if (NOT_RUN in cell.metadata.get("tags", [])) != run]


def pictures(notebook: NotebookNode) -> int:
    return sum("image/png" in output.get("data", {}) for cell in code_cells(notebook, True) for output in cell.outputs)


def execute(notebook: NotebookNode, folder: str) -> NotebookNode:
    """In a kernel whose working directory is an empty folder, as if the package were installed."""
    client = NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": folder}})
    client.execute(env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": folder, "HF_HUB_OFFLINE": "1"})
    return notebook


@pytest.fixture(scope="module")
def executed(tmp_path_factory) -> NotebookNode:
    """The notebook with a shorter training, and a cell more that tells what the others found."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = (k for k, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    notebook.cells.insert(parameters + 1, new_code_cell(SHORTER))
    notebook.cells.append(new_code_cell(FOUND))
    return execute(notebook, str(tmp_path_factory.mktemp("notebook")))


def test_it_runs_from_top_to_bottom(executed):
    assert [cell.execution_count for cell in code_cells(executed, True)] == list(range(1, 12))
    assert len(code_cells(executed, False)) == 3 and pictures(executed) == 3
    found = json.loads(executed.cells[-1].outputs[-1].text)
    assert found["step"] == 10 and len(found["gates"]) == 3 and all(found["gates"].values())
    assert found["off"] == found["base"], "without branches it answers like its base"
    assert found["used"]["keep"] - found["used"]["evict"] == 16 * found["of_cache"]
    assert 0 < found["of_branches"] < found["of_cache"]
    assert found["attention"] == pytest.approx([1.0] * 3), "of three branches, all of it on the image"
    names = ("base", "PVM", "PVM - evict", "PVM - another memory")
    assert {name: result["n"] for name, result in found["report"].items()} == dict.fromkeys(names, 120)


def test_what_is_stored_is_one_run():
    """In order, without errors, logs or anything of the machine; and small."""
    stored = nbformat.read(NOTEBOOK, as_version=4)
    assert [cell.execution_count for cell in code_cells(stored, True)] == list(range(1, 10))
    assert pictures(stored) == 3 and not any(cell.outputs for cell in code_cells(stored, False))
    for cell in code_cells(stored, True):
        assert all(output.output_type != "error" and output.get("name") != "stderr" for output in cell.outputs)
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < 300_000
    for path in ("/home/", "/tmp/", "site-packages", str(ROOT), str(Path.home())):
        assert path not in text


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        notebook = execute(nbformat.read(NOTEBOOK, as_version=4), folder)
    for cell in code_cells(notebook, True):  # without progress bars and warnings
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        del cell.metadata["execution"]  # times
    nbformat.write(notebook, NOTEBOOK)
