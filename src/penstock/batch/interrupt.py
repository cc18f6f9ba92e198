"""Ctrl-C and SIGTERM as a question that a loop asks between two steps, so that no write is cut in the middle."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """While it is entered, the first signal only sets `asked`; a second one interrupts at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, object] = {}
        self._signals: tuple[signal.Signals, ...] = SIGNALS

    @classmethod
    def where_possible(cls) -> Interrupt:
        """One that never asks outside the main thread, where Python does not let signals be caught."""
        made = cls()
        if threading.current_thread() is not threading.main_thread():
            made._signals = ()
        return made

    def __enter__(self) -> Interrupt:
        for number in self._signals:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
