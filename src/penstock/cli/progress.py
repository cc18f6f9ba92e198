"""How far a long job is: a bar on a terminal, one line every 15 seconds anywhere else. Always on stderr."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

LINE_SECONDS = 15.0
REFRESH_SECONDS = 0.2


class RowProgress:
    """Progress over rows with the rate in tokens per second and the time left.

    The time left is for the rows of this run: rows that an earlier run did count as done, not as speed.
    """

    def __init__(self, total: int, done: int = 0) -> None:
        """total: rows of the whole input; done: rows that are there already."""
        self.total, self.done, self.tokens = total, done, 0
        self._begun_with = done
        self._start = self._last = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> RowProgress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            self._bar = Progress(
                TextColumn("generating"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("rows  {task.fields[rate]} tokens/s  {task.fields[left]}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("rows", total=self.total, completed=self.done, rate="0", left="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._show_bar()
            self._bar.stop()

    def advance(self, rows: int, tokens: int) -> None:
        """Count finished rows and generated tokens of one step, and show them when it is time."""
        self.done += rows
        self.tokens += tokens
        now = time.monotonic()
        if now - self._last < (REFRESH_SECONDS if self._bar is not None else LINE_SECONDS):
            return
        self._last = now
        if self._bar is not None:
            self._show_bar()
        else:
            print(
                f"{self.done:,}/{self.total:,} rows, {self.rate():,.0f} tokens/s, {self.left()}",
                file=sys.stderr,
                flush=True,
            )

    def rate(self) -> float:
        """Generated tokens per second since the start."""
        return self.tokens / max(time.monotonic() - self._start, 1e-9)

    def left(self) -> str:
        """The time left in words, from the rows done so far."""
        fresh = self.done - self._begun_with
        if fresh == 0:
            return "time left not known yet"
        seconds = (time.monotonic() - self._start) / fresh * (self.total - self.done)
        return f"{duration(seconds)} left"

    def _show_bar(self) -> None:
        self._bar.update(self._task, completed=self.done, rate=f"{self.rate():,.0f}", left=self.left())


def duration(seconds: float) -> str:
    """Seconds as people say them: 8.2 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
