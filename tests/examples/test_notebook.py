"""The notebook in examples/: run from top to bottom against a server, as its readers do."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import nbformat
import pytest
from nbclient import NotebookClient

from tests.process import ROOT, environment
from tests.server.running import Server, start

NOTEBOOK = ROOT / "examples" / "chat.ipynb"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    found = start(tmp_path_factory.mktemp("home"), "demo")
    yield found
    found.kill()


@pytest.fixture(scope="module")
def printed(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each code cell shows, by the cell's first line."""
    home = tmp_path_factory.mktemp("reader")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    address = server.url.replace("127.0.0.1", "localhost")  # the end of a tunnel
    env = environment(home, PENSTOCK_URL=address, PENSTOCK_API_KEY=server.key or "", IPYTHONDIR=str(home / "ipython"))
    client = NotebookClient(notebook, timeout=60, kernel_name="python3", resources={"metadata": {"path": str(home)}})
    with patch.dict(os.environ, env, clear=True):  # the kernel inherits it
        client.execute()
    return {
        cell.source.split("\n")[0]: "".join(map(_shown, cell.outputs)) for cell in notebook.cells if "outputs" in cell
    }


def _shown(output: Any) -> str:
    return str(output.get("text") or output.get("data", {}).get("text/plain", ""))


def test_it_runs_and_says_what_it_should(printed: dict[str, str]) -> None:
    def of(start: str) -> str:
        (text,) = [shown for line, shown in printed.items() if line.startswith(start)]
        return text

    assert of("from openai import OpenAI") == "'demo'"
    assert of("def ask").startswith("`squeue --me` lists only your own jobs.\n")
    assert re.search(r"\d+ tokens; the first after \d\.\d\d s, then \d+ tokens/s", of("import time"))
    assert re.match(r"8 answers, \d+ tokens/s together\n", of("import asyncio"))
    assert of("import json") == (
        "{'location': 'park',\n 'activity': 'bike ride',\n 'animals_seen': 3,\n 'animals': ['puppy', 'cat', 'raccoon']}"
    )
    assert re.fullmatch(r"queue_length \{'partition': '[cg]pu'\}\n", of("tool = "))
    story, counts = of("from huggingface_hub").rstrip("\n").rsplit("\n", 1)
    assert counts == "40 tokens, ended by length"
    assert of("for piece in hub") == story
    assert of("chat = hub").startswith("`sinfo` lists")
    assert re.match(r"4\d\d .*`top_p`", of("import openai"))


def test_it_is_kept_without_outputs() -> None:
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
