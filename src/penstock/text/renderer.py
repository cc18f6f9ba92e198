"""Processes that render one model's chat templates, from the side of those who ask."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from penstock.text.children import Child, Children
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
        self._idle: Children[_Child] = Children()
        self._finalizer = self._idle.end_with(self)
        child = _Child(self._sources)
        self.found = child.found
        self._idle.give_back(child)

    def ask(self, name: str, variables: Mapping[str, Any]) -> dict[str, str]:
        """{"text": ...} or {"error": ...}. Raises RendererEnded."""
        child = self._idle.take() or _Child(self._sources)
        reply: dict[str, str] = child.ask({"name": name, "variables": dict(variables)}, RENDER_SECONDS + GRACE)
        self._idle.give_back(child)
        return reply

    def close(self) -> None:
        """End the processes."""
        self._finalizer()


class _Child(Child):
    def __init__(self, sources: Mapping[str, str]) -> None:
        super().__init__(
            "penstock.text.render_child", {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        )
        self.found: dict[str, dict[str, Any]] = self.ask({"sources": dict(sources)}, COMPILE_SECONDS)

    def ask(self, message: dict[str, Any], seconds: float) -> Any:
        """The answer. Raises RendererEnded; the process is then gone."""
        reply = self.exchange(lambda sink: send(sink, message), receive, seconds + _PATIENCE)
        if reply is None:
            raise RendererEnded
        return reply
