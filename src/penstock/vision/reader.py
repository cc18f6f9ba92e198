"""Processes that read the images of one model, from the side of those who have them."""

from __future__ import annotations

import subprocess
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import msgspec

from penstock.engine.child import environment
from penstock.errors import InvalidRequest
from penstock.text.children import Child, Children
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
        self._idle: Children[_Child] = Children()
        self._finalizer = self._idle.end_with(self)
        child = _Child(self._setup)
        self.token, self.inline = token, child.started.inline
        self._idle.give_back(child)

    def read(self, text: str, images: list[RawImage]) -> Told:
        """The images for the engine, and the prompt with their placeholders. Raises ImagesRefused."""
        child, told = self._idle.take(), None
        if child is None:
            with suppress(ImagesUnavailable):
                child = _Child(self._setup)
        if child is not None:
            told = child.ask(Ask(text, images), Told, READ_SECONDS)
        if child is None or told is None:
            raise ImagesRefused("the images take too long to read")
        self._idle.give_back(child)
        if told.error:
            raise ImagesRefused(told.error)
        return told

    def close(self) -> None:
        """End the processes."""
        self._finalizer()


class _Child(Child):
    def __init__(self, setup: Setup) -> None:
        env = {**environment(), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        super().__init__("penstock.vision.child", env, stderr=subprocess.DEVNULL)
        started = self.ask(setup, Started, START_SECONDS)
        if started is None or started.error:
            self.end()
            raise ImagesUnavailable("the process that reads them ended" if started is None else started.error)
        self.started = started

    def ask(self, message: msgspec.Struct, kind: type[T], seconds: float) -> T | None:
        """The answer; None, with the process gone, where none comes in time."""
        return self.exchange(lambda sink: sink.write(frame(message)), lambda source: receive(source, kind), seconds)
