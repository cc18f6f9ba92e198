"""The clients that people have, unmodified, each in a venv of its own, against a real server with a key.

`make test-clients` runs it; `make test` does not, since it downloads some 3 GB once. The venvs stay in `.venv-clients`
(or in $PENSTOCK_CLIENT_VENVS); each holds what its lock in `locks/` says, and is made anew when the lock changes.
A lock is made with:

    echo 'openai==3.52.0' | uv pip compile - --universal --python-version 3.11 -o locks/openai-3.txt

PyTorch's lines in guidellm's are by hand: the version of constraints.txt, and without CUDA.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.process import ROOT, environment
from tests.server.running import Server, start

HERE = Path(__file__).parent
VENVS = Path(os.environ.get("PENSTOCK_CLIENT_VENVS", ROOT / ".venv-clients"))
CLIENTS = {
    "openai-3": "use_openai",
    "openai-2": "use_openai",
    "huggingface-hub": "use_huggingface_hub",
    "text-generation": "use_text_generation",
    "langchain-openai": "use_langchain_openai",
    "litellm": "use_litellm",
    "lm-eval": "use_lm_eval",
    "guidellm": "use_guidellm",
    "aiperf": "use_aiperf",
    "llm": "use_llm",
}

pytestmark = pytest.mark.timeout(3600)  # the first run installs


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The demo model behind a key, on a port."""
    found = start(tmp_path_factory.mktemp("home"), "demo")
    yield found
    found.kill()


@pytest.fixture(scope="module")
def behind_a_socket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The same on a unix socket, for the clients that can use one."""
    home = tmp_path_factory.mktemp("uds")
    found = start(home, "demo", "--uds", str(home / "s"))
    yield found
    found.kill()


def installed(client: str) -> Path:
    """The python of a client's venv."""
    lock, folder = HERE / "locks" / f"{client}.txt", VENVS / client
    python, mark = folder / "bin" / "python", folder / "lock.sha256"
    digest = hashlib.sha256(lock.read_bytes()).hexdigest()
    if not mark.exists() or mark.read_text() != digest:
        venv.create(folder, clear=True, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--requirement", lock], check=True)
        mark.write_text(digest)
    return python


@pytest.mark.parametrize("client", CLIENTS)
def test_client(client: str, server: Server, behind_a_socket: Server, tmp_path: Path) -> None:
    env = environment(
        tmp_path,
        PENSTOCK_URL=server.url,
        PENSTOCK_API_KEY=server.key or "",
        PENSTOCK_UDS=behind_a_socket.ready["uds"],
        PENSTOCK_UDS_KEY=behind_a_socket.key or "",
        PENSTOCK_TOKENIZER=str(ROOT / "src/penstock/demo/model"),
        PYTHONDONTWRITEBYTECODE="1",
        LITELLM_LOCAL_MODEL_COST_MAP="True",  # or it asks its own server for prices
    )
    del env["PYTHONPATH"]  # the client's own packages, not ours
    script = HERE / "scripts" / f"{CLIENTS[client]}.py"
    done = subprocess.run(
        [installed(client), script], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False
    )
    print(done.stdout)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    server.wait_idle()
