"""The engine in this process, for commands that need no server."""

from __future__ import annotations

import logging
import os
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import click

from penstock.cli.main import INTERRUPTED
from penstock.cli.options import engine_config

if TYPE_CHECKING:
    from penstock.engine.loop import EngineLoop
    from penstock.engine.messages import Stage
    from penstock.hub.snapshot import Snapshot


def start_engine(
    snapshot: Snapshot, options: dict[str, Any], *, quiet: bool = False, stages: list[Stage] | None = None
) -> EngineLoop:
    """Load the model with the engine options; says each stage with its seconds unless `quiet`, and adds it to
    `stages`."""
    from penstock.devices.threads import bind_threads
    from penstock.text.tokenizer import start_threads

    _log_for_people()
    start_threads()  # before OpenMP takes a core for this thread: those that it starts then would share that core
    bind_threads(options.get("threads"))  # before torch is imported: it reads the variables once
    before = signal.signal(signal.SIGINT, _leave)
    try:
        from penstock.engine.loop import EngineLoop

        def finished(stage: Stage) -> None:
            if stages is not None:
                stages.append(stage)
            if not quiet:
                say_stage(stage)

        return EngineLoop.load(engine_config(snapshot, options), finished)
    finally:
        signal.signal(signal.SIGINT, before)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    """Ctrl-C while the model loads: nothing is begun that could be damaged, and torch's import swallows exceptions."""
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)


class _NoTraces(logging.Formatter):
    """A log line without the traceback that may come with it."""

    def formatException(self, ei: Any) -> str:
        return ""


def _log_for_people() -> None:
    """The engine's log on stderr, tracebacks only with --debug."""
    handler = logging.StreamHandler()
    debug = click.get_current_context().find_root().meta.get("penstock.debug")
    handler.setFormatter((logging.Formatter if debug else _NoTraces)("%(levelname)s %(name)s: %(message)s"))
    logging.getLogger("penstock").handlers = [handler]


def say_stage(stage: Stage) -> None:
    """One line on stderr for a finished stage of the start."""
    print(f"{stage.name:<10} {stage.seconds:6.2f} s  {stage.text}", file=sys.stderr, flush=True)
