"""Real servers: `penstock serve` as a process, found by its ready line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.checkpoints import save_tiny

from .running import Server, start

StartServer = Callable[..., Server]


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[StartServer]:
    """Start servers that end with the test: start_server(model, *flags, **environment)."""
    servers: list[Server] = []

    def run(model: Path | str, *flags: str, **environment: str) -> Server:
        server = start(tmp_path, model, *flags, **environment)
        servers.append(server)
        return server

    yield run
    for server in servers:
        server.kill()


@pytest.fixture(scope="session")
def long_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with room for answers that take many seconds, and no token that ends them before."""
    folder = save_tiny(tmp_path_factory.mktemp("models") / "long-llama", "llama", max_position_embeddings=65536)
    for name in ("config.json", "generation_config.json"):
        file = folder / name
        if file.exists():
            file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": None}))
    return folder


@pytest.fixture(scope="session")
def server(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server that tests share; they leave it as they found it."""
    home = tmp_path_factory.mktemp("home")
    found = start(home, tiny_llama, "--enable-prefill-logprobs", "--max-top-n-tokens", "5")
    yield found
    found.kill()


@pytest.fixture(scope="session")
def demo_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server of the demo model, which answers sensibly; tests share it."""
    found = start(tmp_path_factory.mktemp("home"), "demo")
    yield found
    found.kill()
