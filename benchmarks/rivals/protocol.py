"""How `penstock bench compare` talks to a driver: one JSON line each way, over the driver's stdin and stdout.

A driver is started twice. `driver.py prepare` converts the model into the cache folder, once, and ends; `driver.py run`
loads it and answers jobs. The first line in is a Setup. `run` answers with what it has loaded, `{"ready": ENGINE AND
VERSION, "seconds": ..., "weight_bytes": ...}`, then each job `{"prompts": [[ids]], "new": N}` with a Timing; a job that
fails is answered with `{"error": ...}`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Setup:
    """What a driver works on. model: a checkpoint's folder; cache: this format's own; format: one of the driver's."""

    model: str
    cache: str
    format: str
    threads: int


@dataclass(frozen=True)
class Timing:
    """One job. `first`: seconds until every stream had a token; `first_tokens`: all the tokens made by then."""

    first: float
    first_tokens: int
    total: float
    tokens: int


class Stopwatch:
    """Times one job of some streams: start it, tell it the tokens of each step, ask for the Timing."""

    def __init__(self, streams: int) -> None:
        self._started: set[int] = set()
        self._streams, self._tokens, self._first_tokens = streams, 0, 0
        self._first = 0.0
        self._since = time.perf_counter()

    def step(self, streams: list[int] | range) -> None:
        """Each of these streams has got one more token."""
        self._tokens += len(streams)
        if len(self._started) < self._streams:
            self._started.update(streams)
            if len(self._started) == self._streams:
                self._first, self._first_tokens = time.perf_counter() - self._since, self._tokens

    def timing(self) -> Timing:
        return Timing(self._first, self._first_tokens, time.perf_counter() - self._since, self._tokens)


Run = Callable[[list[list[int]], int], Timing]


@dataclass(frozen=True)
class Loaded:
    """A model that is ready. engine: its name and version; run: does a job; weight_bytes: that a step of one token
    reads, where the driver knows."""

    engine: str
    run: Run
    weight_bytes: float | None = None


def serve(prepare: Callable[[Setup], None], load: Callable[[Setup], Loaded]) -> None:
    """Be a driver."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the libraries print is for people
    setup = Setup(**json.loads(sys.stdin.readline()))
    cache = Path(setup.cache)
    if sys.argv[1] == "prepare":
        if not (cache / "done").exists():
            cache.mkdir(parents=True, exist_ok=True)
            prepare(setup)
            (cache / "done").touch()
        return
    since = time.perf_counter()
    loaded = load(setup)
    ready = {"ready": loaded.engine, "seconds": time.perf_counter() - since, "weight_bytes": loaded.weight_bytes}
    print(json.dumps(ready), file=answers, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        try:
            answer = asdict(loaded.run(job["prompts"], job["new"]))
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)
