"""A server of our own for the time of a load test."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from penstock.errors import EnvironmentFault, by_exit_code

_STOP_SECONDS = 40.0


class OwnServer:
    """`penstock serve MODEL` on a free port; its log goes to our stderr. A context manager, ended with it."""

    def __init__(self, model: str, options: Sequence[str]) -> None:
        command = [sys.executable, "-m", "penstock.cli.main", "serve", model, "--port", "0", "--json", *options]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            env={"LOG_LEVEL": "warn", **os.environ},  # a line a request would drown the results
            start_new_session=True,  # Ctrl-C is for the load test, which then ends the server in order
        )
        assert self._process.stdout is not None  # noqa: S101 (a pipe was asked for)
        try:
            line = self._process.stdout.readline()
            ready = json.loads(line) if line else None
        except BaseException:
            self._end()
            raise
        if ready is None:
            code = self._process.wait()
            raise by_exit_code(code, "The server did not start.", "It said why above.")
        self.url: str = ready["url"]
        self.key: str | None = None
        if ready["key_file"] is not None:
            self.key = Path(ready["key_file"]).read_text(encoding="ascii").split()[0]

    def __enter__(self) -> OwnServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise EnvironmentFault("The server did not end in time and was killed.") from None
        finally:
            if self._process.stdout is not None:
                self._process.stdout.close()
