"""When a life has to leave: it was asked to, its job's time is over, or the farm was cancelled."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
_LOOK_SECONDS = 2.0  # between two looks at the shared folder
_MARGIN = 5.0  # seconds that committing and leaving may take


class Leaving:
    """Signals, deadline and cancellation as one question, asked between two steps of the engine.

    A signal only asks, and so do those after it: whoever cannot wait sends KILL, which costs nothing that is done.
    """

    def __init__(self, cancelled: Callable[[], bool], deadline: float | None = None, grace: float = 0.0) -> None:
        """deadline: the time.monotonic() at which the job's time is over; grace: seconds for what is running."""
        self._cancelled, self._deadline, self._grace = cancelled, deadline, grace
        self._looked = -_LOOK_SECONDS
        self._since = 0.0
        self.signal: int | None = None
        self.reason = ""
        self.hurry: Callable[[], None] | None = None  # called by the first signal, for when nobody asks

    def __enter__(self) -> Leaving:
        for number in SIGNALS:
            signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def __bool__(self) -> bool:
        moment = time.monotonic()
        if not self.reason:
            if self.signal is not None:
                self._begin("asked", moment)
            elif self._deadline is not None and moment > self._deadline - self._grace - _MARGIN:
                self._begin("time", moment)
            elif moment - self._looked >= _LOOK_SECONDS:
                self._looked = moment
                if self._cancelled():
                    self._begin("cancelled", moment)
        return bool(self.reason)

    def at_once(self) -> bool:
        """Whether what is running must be given up now."""
        return bool(self) and time.monotonic() - self._since >= self._grace

    def fits(self, seconds: float) -> bool:
        """Whether something that takes so long would end before the deadline."""
        return self._deadline is None or time.monotonic() + seconds + self._grace + _MARGIN < self._deadline

    def _begin(self, reason: str, moment: float) -> None:
        self.reason, self._since = reason, moment

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = number
            if self.hurry is not None:
                self.hurry()
