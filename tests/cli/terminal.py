"""A command on a real terminal (a pty), driven like by a person."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import time
from pathlib import Path

from tests.process import command, environment

SECONDS = 30.0


class Terminal:
    """A running command. `seen` is everything that it printed so far."""

    def __init__(self, *args: str | Path, home: Path) -> None:
        self._fd, child = pty.openpty()
        self.process = subprocess.Popen(
            command(*args),
            env=environment(home, TERM="xterm", COLUMNS="120"),
            stdin=child,
            stdout=child,
            stderr=child,
            start_new_session=True,
            preexec_fn=lambda: os.login_tty(child),
        )
        os.close(child)
        self.seen = ""
        self._at = 0

    def type(self, text: str) -> None:
        """Type characters; a line ends with \\n."""
        os.write(self._fd, text.encode())

    def wait_for(self, text: str) -> str:
        """Read until `text` appears after what was waited for before; returns everything up to it."""
        until = time.monotonic() + SECONDS
        while (found := self.seen.find(text, self._at)) < 0:
            assert time.monotonic() < until, f"{text!r} did not come: {self.seen!r}"
            if not self.read(0.1) and self.process.poll() is not None:
                raise AssertionError(f"ended before {text!r}: {self.seen!r}")
        before = self.seen[self._at : found]
        self._at = found + len(text)
        return before

    @property
    def unread(self) -> str:
        """What came since the text that was waited for last."""
        return self.seen[self._at :]

    def end(self) -> int:
        """Wait for the end; returns the exit code."""
        until = time.monotonic() + SECONDS
        while self.read(0.1) or self.process.poll() is None:
            assert time.monotonic() < until, self.seen
        os.close(self._fd)
        return self.process.wait()

    def read(self, seconds: float) -> bool:
        """Take what comes within some seconds; whether anything came."""
        if not select.select([self._fd], [], [], seconds)[0]:
            return False
        try:
            data = os.read(self._fd, 65536)
        except OSError:  # Linux's way to say that nobody has the other end any more
            return False
        self.seen += data.decode(errors="replace")
        return bool(data)
