"""The quickstart notebook runs from first cell to last, with two steps, and writes nothing into the repository."""

from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"


def text_of(cell) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")


def test_no_outputs_are_committed():
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert cells and all(not cell.outputs and cell.execution_count is None for cell in cells)


@pytest.mark.notebook
def test_quickstart(tmp_path, monkeypatch):
    from nbclient import NotebookClient

    monkeypatch.setenv("INFINITE_JAX_STEPS", "2")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the kernel's folder is not the repository
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()

    printed = {cell.id: text_of(cell) for cell in notebook.cells if cell.cell_type == "code"}
    assert printed["runtime"].startswith("cpu: 1 device")
    table = printed["train"].splitlines()
    assert table[0].split("|")[1].strip() == "held-out domain" and "step 0" in table[0] and "step 2" in table[0]
    assert any(line.startswith("| macro average") for line in table)
    (figure,) = (output for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output)
    assert "image/png" in figure.data  # each drawing replaced the one before
    assert "| macro average" in printed["evaluate"]
    (run_dir,) = (folder for folder in (tmp_path / "runs").iterdir() if folder.is_dir())
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 3
    assert "model.safetensors" in printed["export"].split()
    assert (run_dir / "exported" / "model.safetensors").is_file()
