"""When what happened to a generation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Timings:
    """Moments on the monotonic clock, in seconds; None until they come."""

    arrived: float
    submitted: float | None = None
    started: float | None = None  # first computed on, after the queue
    first: float | None = None
    last: float | None = None
