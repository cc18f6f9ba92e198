"""The notebook about `LLM`: run from top to bottom, as its readers do."""

from __future__ import annotations

import os
import re
from pathlib import Path
from unittest.mock import patch

import nbformat
from nbclient import NotebookClient

from tests.process import ROOT, environment

NOTEBOOK = ROOT / "examples" / "generate.ipynb"


def test_every_cell_does_what_it_says(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    env = environment(tmp_path, IPYTHONDIR=str(tmp_path / "ipython"))
    client = NotebookClient(
        notebook, timeout=60, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    with patch.dict(os.environ, env, clear=True):  # the kernel inherits it
        client.execute()
    shown = ["".join(str(output) for output in cell.outputs) for cell in notebook.cells if "outputs" in cell]
    assert "LLM('demo')" in shown[0]
    assert "squeue" in shown[2]
    assert re.search(r"200 results, \d+ tokens", shown[3])
    assert "generating" in shown[3]
    assert "200/200" in shown[3]
    assert re.search(r"\['(red|green)'(, '(red|green)'){3}\]", shown[4])
    assert "closed" in shown[5]
