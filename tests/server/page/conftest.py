"""One browser, and the servers that its tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ..running import Server, start
from .browser import Page, driver


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    found = start(tmp_path_factory.mktemp("home"), "demo")
    yield found
    found.kill()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    yield from driver()


@pytest.fixture(scope="session")
def narrow(tmp_path_factory: pytest.TempPathFactory, long_llama: Path) -> Iterator[Server]:
    """A server with room for one request, whose answers take long."""
    home = tmp_path_factory.mktemp("narrow")
    found = start(home, long_llama, "--max-concurrent-requests", "1", "--served-model-name", "demo")
    yield found
    found.kill()


@pytest.fixture
def page(browser: Any, demo: Server) -> Page:
    return Page(browser, demo).open()
