"""The process that tries grammars out: `python -m penstock.engine.forge FD`, on one end of a socket pair.

The first frame is a ForgeConfig; then a Trial for each grammar comes in and a Verdict goes out. Each trial is a forked
child that does what the engine will do with the grammar, and is killed when it takes too long or too much; nothing
remains of it. While more grammars wait than children may run, the API keys take turns, the newest of a key's grammars
comes first, and a child that had its fair share has to go, but never for a key that has as many: a flood of hostile
grammars delays an honest one by little more than that share, and does not end one of another key.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import socket
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from penstock.engine.child import settle_in
from penstock.engine.matcher import Vocabulary
from penstock.errors import InvalidRequest

HEADER = 4
_NICENESS = 10
_TOKENS = 12  # of a random text that the grammar is followed along
_TOO_LONG = "grammar is not valid: it takes too long to prepare"
_TOO_BUSY = "too many grammars wait to be prepared; please try again"


class ForgeConfig(msgspec.Struct, frozen=True):
    """folder, width, eos_ids: of the model, see Vocabulary. seconds: of a trial with its waiting, at most.

    share: seconds that a child has where others wait. cpu_seconds: that making a matcher may cost, because the engine
    pays them again. memory: bytes beyond the vocabulary. children: that run at once.
    """

    folder: str
    width: int
    eos_ids: list[int]
    seconds: float = 5.0
    share: float = 0.25
    cpu_seconds: float = 0.75
    memory: int = 2**28
    children: int = 2


class Trial(msgspec.Struct, frozen=True):
    """A grammar in llguidance's form. who: stands for the API key."""

    id: int
    source: str
    who: str = ""


class Verdict(msgspec.Struct, frozen=True):
    """error: "" for a good grammar. lasting: the same grammar would fail again."""

    id: int
    error: str = ""
    lasting: bool = True


@dataclass
class _Child:
    trial: Trial
    pid: int
    pipe: int
    began: float
    seconds: float  # that it may take


def main() -> int:
    """Serve until the other end closes."""
    settle_in()
    with suppress(OSError):
        os.nice(_NICENESS)
    sock = socket.socket(fileno=int(sys.argv[1]))
    first = read_frame(sock)
    if first is None:
        return 0
    config = msgspec.msgpack.decode(first, type=ForgeConfig)
    try:
        vocabulary = Vocabulary(Path(config.folder), config.width, config.eos_ids)
    except InvalidRequest as error:
        while (frame := read_frame(sock)) is not None:
            trial = msgspec.msgpack.decode(frame, type=Trial)
            sock.sendall(as_frame(Verdict(trial.id, error.what)))
        return 0
    Forge(config, vocabulary, sock).run()
    return 0


class Forge:
    """The loop between the socket and the children."""

    def __init__(self, config: ForgeConfig, vocabulary: Vocabulary, sock: socket.socket) -> None:
        self._config, self._vocabulary, self._sock = config, vocabulary, sock
        self._waiting: list[tuple[Trial, float]] = []  # with the moment of arrival, newest last
        self._children: dict[int, _Child] = {}  # by pipe
        self._served: dict[str, float] = {}  # by who: the moment when a trial of theirs began last
        self._buffer = bytearray()

    def run(self) -> None:
        """Until the socket closes; then the children go too."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        while True:
            self._refuse_late()
            self._start(poll)
            for descriptor, _event in poll.poll(self._pause()):
                if descriptor in self._children:
                    poll.unregister(descriptor)
                    self._end(self._children.pop(descriptor))
                elif not self._take():
                    for child in self._children.values():
                        os.kill(child.pid, signal.SIGKILL)
                    return

    def _take(self) -> bool:
        """Read what the socket has; False when it is closed."""
        data = self._sock.recv(1 << 20)
        self._buffer += data
        while len(self._buffer) >= HEADER:
            end = HEADER + int.from_bytes(self._buffer[:HEADER], "little")
            if len(self._buffer) < end:
                break
            trial = msgspec.msgpack.decode(bytes(self._buffer[HEADER:end]), type=Trial)
            del self._buffer[:end]
            self._waiting.append((trial, time.monotonic()))
        return bool(data)

    def _refuse_late(self) -> None:
        """Nobody waits longer than for a trial."""
        limit = time.monotonic() - self._config.seconds
        for trial, _arrival in [item for item in self._waiting if item[1] < limit]:
            self._sock.sendall(as_frame(Verdict(trial.id, _TOO_BUSY, lasting=False)))
        self._waiting = [item for item in self._waiting if item[1] >= limit]

    def _start(self, poll: select.poll) -> None:
        """Begin trials where there is room, and make room where a child had its share."""
        now = time.monotonic()
        while self._waiting and len(self._children) < self._config.children:
            trial, arrival = self._waiting.pop(self._next())
            self._served[trial.who] = now
            child = self._fork(trial, max(0.01, self._config.seconds - (now - arrival)))
            self._children[child.pipe] = child
            poll.register(child.pipe, select.POLLIN)
        if self._waiting:
            running, who = self._running(), self._waiting[self._next()][0].who
            rivals = [c for c in self._children.values() if c.trial.who == who or running[c.trial.who] > running[who]]
            oldest = min(rivals, key=lambda child: child.began, default=None)
            if oldest is not None and now - oldest.began > self._config.share:
                os.kill(oldest.pid, signal.SIGKILL)  # its pipe closes, which ends it as usual

    def _running(self) -> Counter[str]:
        """How many children each key has."""
        return Counter(child.trial.who for child in self._children.values())

    def _next(self) -> int:
        """The place of the trial whose turn it is: of the key with the fewest children, served longest ago."""
        running = self._running()

        def turn(place: int) -> tuple[int, float, int]:
            who = self._waiting[place][0].who
            return running[who], self._served.get(who, 0.0), -place

        return min(range(len(self._waiting)), key=turn)

    def _pause(self) -> float | None:
        """Milliseconds to sleep at most."""
        return self._config.share * 250 if self._waiting else None

    def _fork(self, trial: Trial, seconds: float) -> _Child:
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            self._sock.close()
            _try_out(self._vocabulary, trial.source, self._config, seconds, writing)
        os.close(writing)
        return _Child(trial, pid, reading, time.monotonic(), seconds)

    def _end(self, child: _Child) -> None:
        """A child has spoken or died: pass on its verdict."""
        answer = b""
        while data := os.read(child.pipe, 1 << 16):
            answer += data
        os.close(child.pipe)
        _pid, status = os.waitpid(child.pid, 0)
        number = child.trial.id
        signalled = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        if answer and status == 0:
            verdict = Verdict(number, answer[1:].decode("utf-8", "replace"))
        elif signalled == signal.SIGALRM:
            verdict = Verdict(number, _TOO_LONG, lasting=child.seconds > self._config.seconds / 2)
        elif signalled == signal.SIGKILL:
            verdict = Verdict(number, _TOO_BUSY, lasting=False)
        else:
            verdict = Verdict(number, "grammar is not valid: it takes too much memory or is nested too deeply")
        self._sock.sendall(as_frame(verdict))


def _try_out(vocabulary: Vocabulary, source: str, config: ForgeConfig, seconds: float, pipe: int) -> None:
    """The child: make the matcher within limits and follow it a little. Answers a byte and the error, and exits."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # kills, also in the midst of native code
    signal.setitimer(signal.ITIMER_REAL, seconds)
    with suppress(OSError, ValueError):  # not every system has the limits
        used = int(Path("/proc/self/statm").read_bytes().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + config.memory, used + config.memory))
    for descriptor in (1, 2):  # the library's last words about a grammar are nobody's business
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    error = ""
    try:
        began = time.process_time()
        matcher = vocabulary.matcher(source)
        if time.process_time() - began > config.cpu_seconds:
            error = _TOO_LONG
        elif not follow(matcher, _TOKENS):
            error = "grammar is not valid: it is too complex to follow"
    except InvalidRequest as refused:
        error = refused.what
    except BaseException:  # a panic of the library is no Exception
        os._exit(1)
    os.write(pipe, b"." + error.encode("utf-8", "replace")[:4096])
    os._exit(0)


def follow(matcher: Any, tokens: int) -> bool:
    """Go along a text that the grammar allows. False when that is beyond the limits.

    At each step it takes the first allowed token from some place in the vocabulary on, the same in every run.
    """
    for step in range(tokens):
        mask = matcher.compute_bitmask()
        if matcher.is_error():
            return False
        if matcher.is_stopped():
            return True
        start = step * 7919 % len(mask)
        place = next((i for i in (*range(start, len(mask)), *range(start)) if mask[i]), None)
        if place is None:
            return True
        token = place * 8 + (mask[place] & -mask[place]).bit_length() - 1
        if not matcher.consume_token(token):
            return False
    return True


def as_frame(message: ForgeConfig | Trial | Verdict) -> bytes:
    """A message as it travels: four bytes of length, then msgpack."""
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(HEADER, "little") + body


def read_frame(sock: socket.socket) -> bytes | None:
    """The next body, None at the end."""
    header = sock.recv(HEADER, socket.MSG_WAITALL)
    return sock.recv(int.from_bytes(header, "little"), socket.MSG_WAITALL) if len(header) == HEADER else None


if __name__ == "__main__":
    sys.exit(main())
