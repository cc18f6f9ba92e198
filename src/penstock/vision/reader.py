"""Processes that read the images of one model, from the side of those who have them."""

from __future__ import annotations

import select
import subprocess
import sys
import threading
import weakref
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, TypeVar, cast

import msgspec

from penstock.engine.child import environment
from penstock.errors import InvalidRequest
from penstock.vision.wire import Ask, Limits, RawImage, Setup, Started, Told, frame, receive

T = TypeVar("T")
START_SECONDS = 150.0
READ_SECONDS = 60.0  # the child ends a request by itself before


class ImagesRefused(InvalidRequest):
    """The images of a request cannot be taken. Clients see the text."""


class ImagesUnavailable(Exception):
    """No image can be read here, and why."""


class ImageReader:
    """Asks a process, and starts another when all are busy. Thread safe; `read` waits for the answer.

    inline: what stands for an image in a prompt that no chat template made.
    """

    def __init__(self, folder: Path, token: str, limits: Limits) -> None:
        """token: the placeholder as the tokenizer spells it. Raises ImagesUnavailable."""
        self._setup = Setup(str(folder), token, limits)
        self._lock = threading.Lock()
        self._idle: list[_Child] = []
        self._finalizer = weakref.finalize(self, _end_all, self._idle)
        child = _Child(self._setup)
        self.token, self.inline = token, child.started.inline
        self._idle.append(child)

    def read(self, text: str, images: list[RawImage]) -> Told:
        """The images for the engine, and the prompt with their placeholders. Raises ImagesRefused."""
        with self._lock:
            child = self._idle.pop() if self._idle else None
        told = None
        if child is None or child.gone:
            with suppress(ImagesUnavailable):
                child = _Child(self._setup)
        if child is not None:
            told = child.ask(Ask(text, images), Told, READ_SECONDS)
        if child is None or told is None:
            raise ImagesRefused("the images take too long to read")
        with self._lock:
            self._idle.append(child)
        if told.error:
            raise ImagesRefused(told.error)
        return told

    def close(self) -> None:
        """End the processes."""
        self._finalizer()


class _Child:
    """One process. It serves one request at a time."""

    def __init__(self, setup: Setup) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "penstock.vision.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**environment(), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        self._sink = cast(BinaryIO, self._process.stdin)
        self._source = cast(BinaryIO, self._process.stdout)
        started = self.ask(setup, Started, START_SECONDS)
        if started is None or started.error:
            self.end()
            raise ImagesUnavailable("the process that reads them ended" if started is None else started.error)
        self.started = started

    @property
    def gone(self) -> bool:
        return self._process.poll() is not None

    def ask(self, message: msgspec.Struct, kind: type[T], seconds: float) -> T | None:
        """The answer; None, with the process gone, where none comes in time."""
        reply = None
        try:
            self._sink.write(frame(message))
            self._sink.flush()
            poll = select.poll()
            poll.register(self._source, select.POLLIN)
            if poll.poll(seconds * 1000):
                reply = receive(self._source, kind)
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


def _end_all(children: list[_Child]) -> None:
    while children:
        children.pop().end()
