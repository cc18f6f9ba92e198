"""An engine in a child process, used from one thread as an EngineLoop is: requests in, one step's outputs at a time.

The model's memory, its threads and whatever may crash stay in the child; the caller never imports torch.
"""

from __future__ import annotations

import itertools
import select
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import msgspec

from penstock.engine import wire
from penstock.engine.child import environment
from penstock.engine.config import EngineConfig
from penstock.engine.limits import Limits, validate
from penstock.engine.messages import (
    Abort,
    AdapterReply,
    Failed,
    FromEngine,
    LoadAdapter,
    Ready,
    Stage,
    ToEngine,
    UnloadAdapter,
)
from penstock.engine.output import SequenceOutput, StepOutput
from penstock.engine.request import EngineRequest
from penstock.errors import PenstockError, by_exit_code

STUCK_SECONDS = 150.0  # so long without a sign of life, and the child is given up
_CHUNK = 1 << 18


class EngineEnded(Exception):
    """The child is gone, or does not answer."""


class EngineChild:
    """One engine process. Not thread-safe. `close` ends it, and so does the end of this process."""

    limits: Limits

    def __init__(self, config: EngineConfig, on_stage: Callable[[Stage], None] = lambda stage: None) -> None:
        """Start the process and wait until the model is ready. Raises PenstockError, with the process gone."""
        self._ids = itertools.count(1)
        self._live: dict[int, int] = {}  # the child's id of a request: the caller's
        self._numbers: dict[int, int] = {}  # and the other way round
        self._buffer = bytearray()
        self._early: deque[FromEngine] = deque()  # came while something else was waited for
        # The child dies with the thread that started it, so that thread lives as long as this object.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._sock, theirs = socket.socketpair()
        with theirs:
            self._process = self._starter.submit(_start, theirs.fileno()).result()
        self._sock.setblocking(False)
        try:
            self._send(config)
            self.limits = self._wait_until_ready(on_stage)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    def add(self, request: EngineRequest) -> None:
        """Queue a request. Raises InvalidRequest for one that cannot run, EngineEnded."""
        validate(request, self.limits)
        number = next(self._ids)
        self._send(msgspec.structs.replace(request, id=number))
        self._live[number], self._numbers[request.id] = request.id, number

    def abort(self, request_id: int) -> None:
        """Forget a request; one that is unknown or finished is fine, and so is a child that is gone."""
        number = self._numbers.pop(request_id, None)
        if number is not None:
            del self._live[number]
            try:
                self._send(Abort(number))
            except EngineEnded:
                pass

    def step(self) -> StepOutput:
        """What the next step makes. Raises EngineEnded."""
        while True:
            message = self._early.popleft() if self._early else self._receive()
            if isinstance(message, StepOutput):
                return StepOutput([o for o in map(self._ours, message.outputs) if o is not None], message.stats)
            if isinstance(message, Failed):
                raise EngineEnded(message.what)

    def load_adapter(self, name: str, folder: str) -> None:
        """Load a LoRA adapter. Raises PenstockError, EngineEnded."""
        self._adapt(LoadAdapter(next(self._ids), name, folder))

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter; requests that run on it finish with it. Raises PenstockError, EngineEnded."""
        self._adapt(UnloadAdapter(next(self._ids), name))

    def _adapt(self, message: LoadAdapter | UnloadAdapter) -> None:
        self._send(message)
        while not isinstance(reply := self._receive(), AdapterReply):
            self._early.append(reply)
        if reply.failure is not None:
            failure = reply.failure
            raise by_exit_code(failure.exit_code, failure.what, failure.why, failure.hint)

    def close(self) -> None:
        """End the process; its memory is free when this returns."""
        self._sock.close()
        try:
            self._process.wait(0.5)  # it ends by itself, between two steps
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._starter.shutdown(wait=False)

    def _ours(self, output: SequenceOutput) -> SequenceOutput | None:
        """An output under the caller's id; None where the request was aborted meanwhile."""
        caller = self._live.get(output.id)
        if caller is None:
            return None
        if output.finish is not None:
            del self._live[output.id], self._numbers[caller]
        output.id = caller
        return output

    def _wait_until_ready(self, on_stage: Callable[[Stage], None]) -> Limits:
        while True:
            try:
                message = self._receive()
            except EngineEnded as error:
                raise PenstockError("The engine process ended while loading.", f"{error}.") from None
            if isinstance(message, Stage):
                on_stage(message)
            elif isinstance(message, Ready):
                return message.limits
            elif isinstance(message, Failed):
                raise by_exit_code(message.exit_code, message.what, message.why, message.hint)

    def _send(self, message: ToEngine | EngineConfig) -> None:
        """Send a message, reading meanwhile: both ends could be full, and each wait for the other."""
        rest = memoryview(wire.frame(message))
        while rest:
            try:
                rest = rest[self._sock.send(rest[:_CHUNK]) :]
            except BlockingIOError:
                self._poll(select.POLLIN | select.POLLOUT)
            except OSError:
                raise EngineEnded(self._obituary()) from None

    def _receive(self) -> FromEngine:
        """The next message, waiting for it."""
        while True:
            if len(self._buffer) >= wire.HEADER:
                end = wire.HEADER + wire.body_length(self._buffer)
                if len(self._buffer) >= end:
                    body = bytes(self._buffer[wire.HEADER : end])
                    del self._buffer[:end]
                    return wire.from_engine(body)
            self._poll(select.POLLIN)

    def _poll(self, events: int) -> None:
        """Wait until the socket is ready, and take what it has."""
        poll = select.poll()
        poll.register(self._sock, events)
        until = time.monotonic() + STUCK_SECONDS
        found = poll.poll(STUCK_SECONDS * 1000)
        if not found and time.monotonic() >= until:
            raise EngineEnded("it stopped answering")
        if any(event & ~select.POLLOUT for _, event in found):
            try:
                data = self._sock.recv(_CHUNK)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                raise EngineEnded(self._obituary())
            self._buffer += data

    def _obituary(self) -> str:
        """Why the process ended, in words."""
        try:
            code = self._process.wait(1)
        except subprocess.TimeoutExpired:
            return "it closed its end"
        if code == -9:
            return "killed (signal 9; out of memory is the usual cause)"
        return f"signal {-code}" if code < 0 else f"exit code {code}"


def _start(descriptor: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "penstock.engine.process", str(descriptor)],
        pass_fds=[descriptor],
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=None,
    )
