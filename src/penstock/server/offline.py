"""The routes without a door: requests from a file, answered by an engine of our own, no port, no key."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Iterable

from penstock.batch.openai import AnswerLine, BatchLine
from penstock.engine.client import EngineClient
from penstock.engine.messages import Stage
from penstock.hub.snapshot import Snapshot
from penstock.server.config import ServeConfig
from penstock.server.house import House
from penstock.server.launch import load_text
from penstock.server.openai.lines import LineAnswerer

AHEAD = 2  # requests on their way for each place in the engine's batch
_TOGETHER = 0.05  # seconds for which finished answers are collected


async def answer_file(
    config: ServeConfig,
    snapshot: Snapshot,
    lines: Iterable[BatchLine],
    on_stage: Callable[[Stage], None],
    on_ready: Callable[[], None],
    on_answers: Callable[[list[AnswerLine]], None],
) -> bool:
    """Answer all lines, in the order of completion. Returns whether a signal ended it early.

    on_ready is called when the model is loaded; on_answers may raise, which ends it all. Raises PenstockError.
    """
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    engine = EngineClient(config.engine, on_stage)
    house: House | None = None
    tasks: set[asyncio.Task[AnswerLine]] = set()
    try:
        tokenizer, template, images = await asyncio.to_thread(load_text, snapshot.path, config)
        if not await _start(engine, stopped):
            return True
        on_ready()
        house = House(config, engine, tokenizer, template, images, snapshot.revision)
        answerer = LineAnswerer(house.aside(0, permits=2**31))
        waiting, room = iter(lines), AHEAD * engine.limits.max_batch_size
        more = True
        while more or tasks:
            while more and len(tasks) < room:
                line = next(waiting, None)
                more = line is not None
                if line is not None:
                    tasks.add(asyncio.create_task(answerer.answer(line, b"")))
            if engine.failure is not None:
                raise engine.failure
            on_answers(await _finished(tasks))
            if stopped.is_set():
                return bool(more or tasks)
        return False
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await engine.stop()
        if house is not None:
            house.close()


async def _start(engine: EngineClient, stopped: asyncio.Event) -> bool:
    """Load the model; False when a signal came before it was there."""
    starting, stopping = asyncio.create_task(engine.start()), asyncio.create_task(stopped.wait())
    await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not starting.done():
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        return False
    await starting
    return True


async def _finished(tasks: set[asyncio.Task[AnswerLine]]) -> list[AnswerLine]:
    """Wait for answers, and give those that come close together as one; takes them out of `tasks`."""
    if not tasks:
        return []
    until = time.monotonic() + _TOGETHER
    done, _ = await asyncio.wait(tasks, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
    rest = until - time.monotonic()
    if done and rest > 0 and len(done) < len(tasks):
        await asyncio.sleep(rest)
        done = {task for task in tasks if task.done()}
    tasks -= done
    return [task.result() for task in done]
