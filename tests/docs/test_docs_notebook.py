"""The notebook runs from top to bottom, is kept without outputs, and shows what it says."""

import json

import pytest
from docs_blocks import DOCS, ROOT

PATH = DOCS / "notebooks" / "skd_quickstart.ipynb"


def test_it_is_kept_without_outputs():
    notebook = json.loads(PATH.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert code and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert PATH.stat().st_size < 50_000
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"


def test_it_runs(tmp_path, monkeypatch):
    pytest.importorskip("ipykernel")
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = nbformat.read(PATH, as_version=4)
    nbformat.validate(notebook)
    client = nbclient.NotebookClient(
        notebook,
        kernel_name="python3",
        startup_timeout=300,
        timeout=300,
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs)
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 4
    assert "4 of 40 training cases are labelled" in text and "its mask may not be read" in text
    printed = [line for line in text.splitlines() if line.startswith("{")]
    first, second = (json.loads(line.replace("'", '"')) for line in printed)
    assert {"sam", "seg_fusion", "skd_unet", "skd_vnet", "consistency_unet"} <= set(first)
    assert set(second) == {"mine", "sam", "skd"}
    assert not any(output.output_type == "error" for output in outputs)
