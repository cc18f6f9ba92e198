"""Processes that render one model's chat templates, from the side of those who ask."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, BinaryIO, cast

from penstock.text.render_wire import COMPILE_SECONDS, GRACE, RENDER_SECONDS, receive, send

# A template that got out of its sandbox would find no token or key in its environment.
_ENVIRONMENT = (
    "PATH", "HOME", "LANG", "LC_ALL", "LC_TIME", "TZ", "LD_LIBRARY_PATH",
    "PYTHONPATH", "PYTHONHOME", "PYTHONUSERBASE", "PYTHONNOUSERSITE",
)  # fmt: skip
_PATIENCE = 3.0  # seconds beyond the child's own alarm, for a machine that is busy


class RendererEnded(Exception):
    """The process had to be ended: it took too long or too much memory."""


class Renderers:
    """Asks a process, and starts another when all are busy. Thread safe; `ask` waits for the answer.

    found: for each template, what `render_child.examine` says, or {"error": ...}.
    """

    def __init__(self, sources: Mapping[str, str]) -> None:
        """Raises RendererEnded when the templates cannot even be compiled."""
        self._sources = dict(sources)
        self._lock = threading.Lock()
        self._idle: list[_Child] = []
        self._finalizer = weakref.finalize(self, _end_all, self._idle)
        child = _Child(self._sources)
        self.found = child.found
        self._idle.append(child)

    def ask(self, name: str, variables: Mapping[str, Any]) -> dict[str, str]:
        """{"text": ...} or {"error": ...}. Raises RendererEnded."""
        with self._lock:
            child = self._idle.pop() if self._idle else None
        if child is None or child.gone:
            child = _Child(self._sources)
        reply: dict[str, str] = child.ask({"name": name, "variables": dict(variables)}, RENDER_SECONDS + GRACE)
        with self._lock:
            self._idle.append(child)
        return reply

    def close(self) -> None:
        """End the processes."""
        self._finalizer()


class _Child:
    """One process. It serves one question at a time."""

    def __init__(self, sources: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "penstock.text.render_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        )
        self._sink = cast(BinaryIO, self._process.stdin)
        self._source = cast(BinaryIO, self._process.stdout)
        self.found: dict[str, dict[str, Any]] = self.ask({"sources": dict(sources)}, COMPILE_SECONDS)

    @property
    def gone(self) -> bool:
        return self._process.poll() is not None

    def ask(self, message: dict[str, Any], seconds: float) -> Any:
        """The answer. Raises RendererEnded; the process is then gone."""
        reply = None
        try:
            send(self._sink, message)
            poll = select.poll()
            poll.register(self._source, select.POLLIN)
            if poll.poll((seconds + _PATIENCE) * 1000):
                reply = receive(self._source)
        except OSError:  # it died while it was asked
            pass
        finally:
            if reply is None:
                self.end()
        if reply is None:
            raise RendererEnded
        return reply

    def end(self) -> None:
        self._process.kill()
        with suppress(OSError):
            self._sink.close()
        self._source.close()
        self._process.wait()


def _end_all(children: list[_Child]) -> None:
    while children:
        children.pop().end()
