"""Processes that do what must not harm us, one question at a time: those who ask keep the idle ones for the next."""

from __future__ import annotations

import select
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import BinaryIO, TypeVar, cast

T = TypeVar("T")


class Child:
    """One process, asked over its pipes: `python -P -m MODULE`, with nothing but `env` in its environment."""

    def __init__(self, module: str, env: Mapping[str, str], stderr: int | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=dict(env),
        )
        self._sink = cast(BinaryIO, self._process.stdin)
        self._source = cast(BinaryIO, self._process.stdout)

    @property
    def gone(self) -> bool:
        return self._process.poll() is not None

    def exchange(
        self, send: Callable[[BinaryIO], object], receive: Callable[[BinaryIO], T | None], seconds: float
    ) -> T | None:
        """Write a question and read its answer; None, with the process gone, where none comes in time."""
        reply = None
        try:
            send(self._sink)
            self._sink.flush()
            poll = select.poll()
            poll.register(self._source, select.POLLIN)
            if poll.poll(seconds * 1000):
                reply = receive(self._source)
        except OSError:  # it died while it was asked
            pass
        finally:
            if reply is None:
                self.end()
        return reply

    def end(self) -> None:
        self._process.kill()
        with suppress(OSError):
            self._sink.close()
        self._source.close()
        self._process.wait()


C = TypeVar("C", bound=Child)


class Children(list[C]):
    """The idle ones. Thread safe."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()

    def take(self) -> C | None:
        """One that nobody else has, if it still lives; None where another has to be started."""
        with self._lock:
            child = self.pop() if self else None
        return None if child is None or child.gone else child

    def give_back(self, child: C) -> None:
        with self._lock:
            self.append(child)

    def end_with(self, owner: object) -> Callable[[], object]:
        """Let them end with their owner; the result ends them now."""
        return weakref.finalize(owner, self._end_all)

    def _end_all(self) -> None:
        while self:
            self.pop().end()
