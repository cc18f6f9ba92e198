"""The engine process: `python -m penstock.engine.process FD`, started by EngineClient on one end of a socket pair.

The first frame is the EngineConfig; then requests and aborts come in, step outputs go out. It ends when the other
end closes, and with its parent.
"""

from __future__ import annotations

import logging
import select
import socket
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from penstock import logs
from penstock.devices.threads import bind_threads
from penstock.engine import wire
from penstock.engine.child import settle_in
from penstock.engine.messages import (
    Abort,
    AdapterReply,
    Failed,
    FromEngine,
    LoadAdapter,
    Ready,
    Stage,
    UnloadAdapter,
)
from penstock.engine.output import SequenceOutput, StepOutput
from penstock.errors import InvalidRequest, PenstockError

if TYPE_CHECKING:  # importing it imports torch, whose threads must be set first
    from penstock.engine.loop import EngineLoop

log = logging.getLogger("penstock.engine")

BEAT_SECONDS = 3.0


class Channel:
    """Our end of the socket pair. Reads without waiting while there is work; writes whole frames."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._poll = select.poll()  # select.select cannot watch descriptors above 1023
        self._poll.register(sock, select.POLLIN)
        self._buffer = bytearray()
        self._write = threading.Lock()  # step outputs and beats come from two threads
        self.closed = False

    def send(self, message: FromEngine) -> None:
        self.send_bytes(wire.frame(message))

    def send_bytes(self, data: bytes) -> None:
        """Raises OSError when the other end is gone."""
        with self._write:
            self._sock.sendall(data)

    def receive(self, timeout: float | None) -> list[bytes]:
        """Whole bodies that have arrived, waiting up to `timeout` seconds (None: until something does)."""
        if self._poll.poll(None if timeout is None else timeout * 1000):
            data = self._sock.recv(1 << 20)
            self.closed = not data
            self._buffer += data
        bodies = []
        while len(self._buffer) >= wire.HEADER:
            end = wire.HEADER + wire.body_length(self._buffer)
            if len(self._buffer) < end:
                break
            bodies.append(bytes(self._buffer[wire.HEADER : end]))
            del self._buffer[:end]
        return bodies


def main() -> int:
    """Load what the first frame says and serve until the other end closes. Returns the exit code."""
    settle_in()
    logs.configure()
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    bodies: list[bytes] = []
    while not bodies and not channel.closed:
        bodies = channel.receive(None)
    if channel.closed:
        return 0
    config = wire.config(bodies[0])
    bind_threads(config.threads)
    began = time.perf_counter()
    threading.Thread(target=_beat, args=(channel,), daemon=True).start()
    try:
        from penstock.engine.loop import EngineLoop

        channel.send(Stage("engine", "a process with PyTorch", time.perf_counter() - began))
        engine = EngineLoop.load(config, channel.send)
    except PenstockError as error:
        channel.send(Failed(error.exit_code, error.what, error.why, error.hint))
        return error.exit_code
    except (BrokenPipeError, ConnectionResetError):
        raise  # the parent went away
    except MemoryError:
        channel.send(Failed(5, "out of memory while loading the model", hint="try --dtype bfloat16 or a smaller model"))
        return 5
    except Exception as error:
        log.exception("the engine could not start")
        channel.send(Failed(1, "the engine could not start", f"{type(error).__name__}: {error}"[:300]))
        return 1
    channel.send(Ready(engine.limits))
    _serve(engine, channel, bodies[1:])
    return 0


def _serve(engine: EngineLoop, channel: Channel, bodies: list[bytes]) -> None:
    """Take what has come, run a step, send what it made; sleep while there is nothing to do."""
    while not channel.closed:
        if bodies:
            for body in bodies:
                _take(engine, channel, body)
            if not engine.has_work:  # aborts changed the counters and no step will tell
                channel.send(StepOutput([], engine.current_stats()))
        if engine.has_work:
            channel.send(engine.step())
        bodies = channel.receive(0 if engine.has_work or engine.prepare() else None)


def _take(engine: EngineLoop, channel: Channel, body: bytes) -> None:
    """One message for the engine. One that is not well-formed is refused like any other bad request."""
    try:
        message = wire.to_engine(body)
    except msgspec.ValidationError:
        _refuse(engine, channel, wire.id_of(body), "the request has a field of the wrong type")
        return
    if isinstance(message, Abort):
        engine.abort(message.id)
        return
    if isinstance(message, LoadAdapter | UnloadAdapter):
        channel.send(AdapterReply(message.id, _adapt(engine, message)))
        return
    try:
        engine.add(message)
    except InvalidRequest as error:
        _refuse(engine, channel, message.id, error.what)


def _adapt(engine: EngineLoop, message: LoadAdapter | UnloadAdapter) -> Failed | None:
    """Load or unload an adapter, between two steps. Returns why it cannot be."""
    try:
        if isinstance(message, UnloadAdapter):
            engine.adapters.unload(message.name)
        else:
            engine.adapters.load(message.name, Path(message.folder), replace=message.replace)
    except PenstockError as error:
        return Failed(error.exit_code, error.what, error.why, error.hint)
    except MemoryError:
        return Failed(5, f"there is too little memory for the adapter {message.name}")
    except Exception:
        log.exception("the adapter %r failed", message.name)
        return Failed(1, f"the adapter {message.name} could not be loaded")
    return None


def _refuse(engine: EngineLoop, channel: Channel, request_id: int, text: str) -> None:
    refusal = SequenceOutput(request_id, finish="error", error=text, invalid=True)
    channel.send(StepOutput([refusal], engine.current_stats()))


def _beat(channel: Channel) -> None:
    """Say that the process lives, so that the other end can tell a long step from a stopped process."""
    pause = threading.Event()
    while not pause.wait(BEAT_SECONDS):
        try:
            channel.send_bytes(wire.BEAT)
        except OSError:
            return


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (BrokenPipeError, ConnectionResetError):
        sys.exit(0)  # the parent went away
