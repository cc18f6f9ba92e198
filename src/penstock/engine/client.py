"""The API process's end of the engine: starts the engine process, sends requests, hands out results.

Imports no torch. One EngineClient supervises one engine process: when it dies, every waiting request gets an error at
once and a new process is started; when it keeps dying, the client gives up.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable

import msgspec

from penstock.engine import wire
from penstock.engine.adapter_calls import AdapterCalls
from penstock.engine.child import environment
from penstock.engine.config import EngineConfig
from penstock.engine.limits import Limits
from penstock.engine.messages import (
    Abort,
    AdapterReply,
    Beat,
    Failed,
    FromEngine,
    LoadAdapter,
    Ready,
    Stage,
    UnloadAdapter,
)
from penstock.engine.output import EngineStats, SequenceOutput, StepOutput
from penstock.engine.request import EngineRequest
from penstock.errors import PenstockError, by_exit_code

log = logging.getLogger("penstock.engine")

CRASHES, WITHIN_SECONDS = 4, 300.0  # so many crashes within so long end the server
SILENCE_SECONDS = 9.0  # three beats missed: the process is stopped or stuck
STUCK_SECONDS = 150.0  # so long without a beat, and it is replaced


class EngineUnavailable(PenstockError):
    """The engine is down or restarting; the request was not taken."""


class Results:
    """What the engine sends for one request: iterate until an output has `finish` set."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[SequenceOutput] = asyncio.Queue()
        self._ended = False

    def put(self, output: SequenceOutput) -> None:
        self._queue.put_nowait(output)

    def __aiter__(self) -> AsyncIterator[SequenceOutput]:
        return self

    async def __anext__(self) -> SequenceOutput:
        if self._ended:
            raise StopAsyncIteration
        output = await self._queue.get()
        self._ended = output.finish is not None
        return output


class EngineClient:
    """Runs the engine process and talks to it. Every method is called from one event loop.

    on_stage is told each finished stage of a start. limits and stats are the engine's latest word. on_step is told each
    step: its stats, whether it failed, and the seconds that handing out its results took.
    """

    limits: Limits

    def __init__(self, config: EngineConfig, on_stage: Callable[[Stage], None]) -> None:
        self._config, self._on_stage = config, on_stage
        self.stats = EngineStats()
        self.on_step: Callable[[EngineStats, bool, float], None] | None = None
        self.restarts = 0
        self.gave_up = asyncio.Event()
        self.failure: PenstockError | None = None
        self._ids = itertools.count(1)
        self._results: dict[int, Results] = {}
        self._adapters = AdapterCalls(config.adapters)
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._serving = False
        self._heard = 0.0
        self._crashes: deque[float] = deque()

    @property
    def healthy(self) -> bool:
        """Whether requests are taken and the process has been heard of lately."""
        return self._serving and time.monotonic() - self._heard < SILENCE_SECONDS

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def next_id(self) -> int:
        return next(self._ids)

    async def start(self) -> Limits:
        """Start the process and wait until the model is ready. Raises PenstockError, with the process gone."""
        try:
            reader = await self._launch()
        except BaseException:
            self._kill()
            raise
        self._supervisor = asyncio.create_task(self._supervise(reader))
        return self.limits

    def submit(self, request: EngineRequest) -> Results:
        """Send a request; its outputs come through the returned iterator. Raises EngineUnavailable when down."""
        if not self.healthy or self._writer is None:
            raise EngineUnavailable("the engine is restarting", hint="try again in a moment")
        frame = wire.frame(request)
        results = self._results[request.id] = Results()
        self._writer.write(frame)
        return results

    def abort(self, request_id: int) -> None:
        """Forget a request, wherever it is. One that has finished is fine."""
        if self._results.pop(request_id, None) is not None and self._serving and self._writer is not None:
            self._writer.write(wire.frame(Abort(request_id)))

    @property
    def adapters(self) -> list[str]:
        """The names of the LoRA adapters that requests may ask for."""
        return list(self._adapters.folders)

    async def adapt(self, call: LoadAdapter | UnloadAdapter) -> None:
        """Have the engine load or forget an adapter. Raises PenstockError."""
        if not self.healthy or self._writer is None:
            raise EngineUnavailable("the engine is restarting", hint="try again in a moment")
        self._writer.write(wire.frame(call))
        failure = await self._adapters.begin(call)
        if failure is not None:
            raise by_exit_code(failure.exit_code, failure.what, failure.why, failure.hint)

    async def stop(self) -> None:
        """End the process; requests that still run end with an error."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait([self._supervisor])
        self._serving = False
        if self._writer is not None:
            self._writer.close()
        if self._process is not None:
            try:
                await asyncio.to_thread(self._process.wait, 2)
            except subprocess.TimeoutExpired:
                self._kill()
        self._fail_all("the server is stopping")

    async def _launch(self) -> asyncio.StreamReader:
        """Start one process and wait for its Ready."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "penstock.engine.process", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr.fileno(),
            )
        reader, self._writer = await asyncio.open_connection(sock=ours)
        self._writer.write(wire.frame(self._config))
        while True:
            message = await _receive(reader)
            if isinstance(message, Stage):
                self._on_stage(message)
            elif isinstance(message, Ready):
                self.limits = message.limits
                self._heard = time.monotonic()
                self._serving = True
                return reader
            elif isinstance(message, Failed):
                raise by_exit_code(message.exit_code, message.what, message.why, message.hint)
            elif message is None:
                cause = await asyncio.to_thread(self._obituary)
                raise PenstockError("the engine process ended while loading", cause)

    async def _supervise(self, reader: asyncio.StreamReader) -> None:
        """Deliver what the process sends; when it dies, start another, until it has died too often."""
        while True:
            await self._deliver(reader)
            self._serving = False
            cause = await asyncio.to_thread(self._obituary)
            self._fail_all("the engine stopped unexpectedly; please send the request again")
            log.error("the engine process died: %s; starting it again", cause)
            while True:
                now = time.monotonic()
                self._crashes.append(now)
                while now - self._crashes[0] > WITHIN_SECONDS:
                    self._crashes.popleft()
                if len(self._crashes) >= CRASHES:
                    self.failure = PenstockError(
                        f"the engine died {CRASHES} times within {WITHIN_SECONDS / 60:.0f} minutes",
                        f"last: {cause}",
                    )
                    self.gave_up.set()
                    return
                self.restarts += 1
                try:
                    given = self._adapters.kept(self._config.adapters)
                    self._config = msgspec.structs.replace(self._config, adapters=given)
                    reader = await self._launch()
                    if self._writer is not None:
                        self._writer.writelines(map(wire.frame, self._adapters.again(given, self._ids)))
                    break
                except Exception as error:  # also what the system refuses: processes, memory, descriptors
                    self._kill()
                    cause = str(error)
                    log.error("the engine did not start: %s", cause)
                    await asyncio.sleep(2 ** len(self._crashes))

    async def _deliver(self, reader: asyncio.StreamReader) -> None:
        """Hand outputs to their requests until the stream ends, or nothing has come for very long."""
        loop = asyncio.get_running_loop()
        while True:
            silence = loop.call_later(SILENCE_SECONDS, self._ask_for_stacks)
            try:
                async with asyncio.timeout(STUCK_SECONDS):
                    message = await _receive(reader)
            except (OSError, ValueError, TimeoutError, msgspec.MsgspecError):
                return
            finally:
                silence.cancel()
            if message is None:
                return
            self._heard = time.monotonic()
            if isinstance(message, StepOutput):
                stepped, self.stats = message.stats.steps != self.stats.steps, message.stats
                failed = False
                for output in message.outputs:
                    failed |= output.finish == "error" and not output.invalid
                    results = self._results.get(output.id)
                    if results is not None:
                        results.put(output)
                        if output.finish is not None:
                            del self._results[output.id]
                if stepped and self.on_step is not None:
                    self.on_step(self.stats, failed, time.monotonic() - self._heard)
            elif isinstance(message, AdapterReply):
                self._adapters.end(message)
            elif isinstance(message, Failed):
                log.error("the engine gave up: %s", message.what)
            elif not isinstance(message, Beat):
                log.warning("unexpected message from the engine: %s", type(message).__name__)

    def _ask_for_stacks(self) -> None:
        """Have the silent process write where its threads are; faulthandler does so even when Python cannot run."""
        if self._process is not None and self._process.poll() is None:
            log.error("the engine process has said nothing for %g s; its stacks follow", SILENCE_SECONDS)
            self._process.send_signal(signal.SIGUSR2)

    def _fail_all(self, text: str) -> None:
        for request_id, results in self._results.items():
            results.put(SequenceOutput(request_id, finish="error", error=text))
        self._results.clear()
        self._adapters.fail(text)
        self.stats = EngineStats()

    def _obituary(self) -> str:
        """Why the process ended, in words. Waits a moment for it, then ends it."""
        if self._process is None:
            return "it never started"
        try:
            code = self._process.wait(1)
        except subprocess.TimeoutExpired:
            self._kill()
            return "it stopped answering"
        if code == -9:
            return "killed (signal 9; out of memory is the usual cause)"
        return f"signal {-code}" if code < 0 else f"exit code {code}"

    def _kill(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()


async def _receive(reader: asyncio.StreamReader) -> FromEngine | None:
    """The next message, or None at the end of the stream."""
    try:
        header = await reader.readexactly(wire.HEADER)
        return wire.from_engine(await reader.readexactly(wire.body_length(header)))
    except (asyncio.IncompleteReadError, ConnectionResetError):
        return None
