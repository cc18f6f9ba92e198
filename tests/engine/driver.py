"""Runs requests through an engine in this process."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from penstock.engine.config import EngineConfig
from penstock.engine.loop import EngineLoop
from penstock.engine.request import EngineRequest


@dataclass
class Generated:
    """What came back for one request."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list)
    prompt_logprobs: list[float | None] | None = None
    finish: str | None = None
    error: str | None = None


def started(folder: Path, **options: Any) -> tuple[EngineLoop, dict[str, str]]:
    """The engine, and what it said of each stage of its start."""
    stages: dict[str, str] = {}
    config = EngineConfig(str(folder), **{"dtype": "float32", **options})
    return EngineLoop.load(config, lambda stage: stages.update({stage.name: stage.text})), stages


def generate(engine: EngineLoop, requests: Iterable[EngineRequest]) -> dict[int, Generated]:
    """Add every request, step until nothing is left."""
    results: dict[int, Generated] = {}
    for request in requests:
        results[request.id] = Generated()
        engine.add(request)
    while engine.has_work:
        for output in engine.step().outputs:
            result = results[output.id]
            result.ids += [t.id for t in output.tokens]
            result.logprobs += [t.logprob for t in output.tokens]
            result.top += [t.top for t in output.tokens]
            result.prompt_logprobs = output.prompt_logprobs or result.prompt_logprobs
            result.finish = output.finish or result.finish
            result.error = output.error or result.error
    return results
