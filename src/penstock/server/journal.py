"""One record for every request: what was asked, how it ended, how long its parts took. Never what it said."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from penstock.server.exchange import Exchange
from penstock.server.timings import Timings

log = logging.getLogger("penstock.request")
MAX_PATH = 200  # characters of a path in the log
QUIET = ("/", "/health", "/ping", "/metrics")  # asked for every few seconds by machines


@dataclass(slots=True)
class Run:
    """A finished generation of a request."""

    timings: Timings
    tokens: int


@dataclass(slots=True)
class Entry:
    """A request in the making. Moments are on the monotonic clock, in seconds."""

    exchange: Exchange
    key_name: str
    began: float = field(default_factory=time.monotonic)
    ended: float = 0.0
    prompt_tokens: int = 0
    runs: list[Run] = field(default_factory=list)

    def fields(self) -> dict[str, Any]:
        """What the log line holds beside its message; times in seconds."""
        exchange = self.exchange
        found: dict[str, Any] = {
            "method": exchange.method[:20],
            "path": exchange.path[:MAX_PATH],
            "status": exchange.status or "left",  # the client did not wait for an answer
            "total_time": round(self.ended - self.began, 6),
            "request_id": exchange.request_id.decode("latin-1"),
        }
        if exchange.failure:
            found["error"] = exchange.failure
        if self.key_name:
            found["key"] = self.key_name
        if self.prompt_tokens:
            found["prompt_tokens"] = self.prompt_tokens
            found["generated_tokens"] = sum(run.tokens for run in self.runs)
        if self.runs:
            parts = [phases(run) for run in self.runs]
            found |= {name: round(max(part[name] for part in parts), 6) for name in parts[0]}
        return found


def phases(run: Run) -> dict[str, float]:
    """Seconds that a generation took for each of its phases."""
    timings = run.timings
    submitted = timings.submitted or timings.arrived
    started = timings.started or submitted
    first = timings.first or started
    return {
        "validation_time": submitted - timings.arrived,
        "queue_time": started - submitted,
        "prefill_time": first - started,
        "decode_time": (timings.last or first) - first,
    }


_current: ContextVar[Entry | None] = ContextVar("entry", default=None)


@contextmanager
def entry(exchange: Exchange, key_name: str = "", keep: Callable[[Entry], None] | None = None) -> Iterator[None]:
    """Make a request's record, and write it when the request is over; `keep` gets it too."""
    made = Entry(exchange, key_name)
    token = _current.set(made)
    try:
        yield
    finally:
        _current.reset(token)
        made.ended = time.monotonic()
        fault = exchange.status >= 500 and exchange.status != 503
        quiet = exchange.path in QUIET and exchange.method in ("GET", "HEAD")
        level = logging.ERROR if fault else logging.DEBUG if quiet else logging.INFO
        if log.isEnabledFor(level):
            message = "Failure" if exchange.status >= 400 or exchange.failure else "Success"
            log.log(level, message, extra={"fields": made.fields()})
        if keep is not None and not quiet:
            keep(made)


def submitted(prompt_tokens: int) -> None:
    """A generation of the current request goes to the engine."""
    current = _current.get()
    if current is not None:
        current.prompt_tokens += prompt_tokens


def finished(timings: Timings, tokens: int) -> None:
    """A generation of the current request is complete."""
    current = _current.get()
    if current is not None:
        current.runs.append(Run(timings, tokens))
