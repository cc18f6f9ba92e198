"""The server's grammars: tried out in the forge, and kept for the next request that asks for the same."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
import socket
import subprocess
import sys
from collections import OrderedDict
from contextlib import suppress

import msgspec

from penstock.engine.child import environment
from penstock.engine.forge import HEADER, ForgeConfig, Trial, Verdict, as_frame
from penstock.engine.request import Grammar
from penstock.text.grammar import GrammarRefused, GrammarSpec, blame, source_of

_KEPT, _KEPT_CHARACTERS = 1024, 2**22
_INLINE = 2048  # bytes of a grammar that is put into llguidance's form without leaving the event loop
_STOPPED = "the process that prepares grammars stopped; please try again"


class Grammars:
    """Turns what clients ask for into what the engine follows. Held by the house; used from its event loop.

    The forge is started by the first grammar that needs it, and again when it has died.
    """

    def __init__(self, config: ForgeConfig) -> None:
        self._config = config
        self._known: OrderedDict[bytes, Grammar | GrammarRefused] = OrderedDict()  # least recently used first
        self._characters = 0
        self._under_way: dict[bytes, asyncio.Task[Grammar]] = {}
        self._verdicts: dict[int, asyncio.Future[Verdict]] = {}
        self._ids = itertools.count()
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._starting = asyncio.Lock()
        self._listening: asyncio.Task[None] | None = None

    @classmethod
    def of(cls, folder: str, width: int, eos_ids: list[int]) -> Grammars:
        """For the model that is served; half of the processors may try grammars out."""
        children = max(2, min(4, (os.cpu_count() or 1) // 2))
        return cls(ForgeConfig(folder, width, list(eos_ids), children=children))

    async def compile_grammar(self, spec: GrammarSpec, who: str = "") -> Grammar:
        """The engine's form of a grammar; who: stands for the API key that asks. Raises GrammarRefused."""
        key, size = _key(spec)
        known = self._known.get(key)
        if known is None:
            task = self._under_way.get(key)
            if task is None:
                task = self._under_way[key] = asyncio.create_task(self._compile(key, spec, size, who))
                task.add_done_callback(lambda done: self._done(key, done))
            return await asyncio.shield(task)  # who leaves does not spoil it for the others
        self._known.move_to_end(key)
        if isinstance(known, GrammarRefused):
            raise GrammarRefused(known.what, known.pointer)
        return known

    def close(self) -> None:
        """End the forge."""
        for task in (*self._under_way.values(), self._listening):
            if task is not None:
                task.cancel()
        if self._writer is not None:
            self._writer.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    async def _compile(self, key: bytes, spec: GrammarSpec, size: int, who: str) -> Grammar:
        try:
            source = source_of(spec) if size <= _INLINE else await asyncio.to_thread(source_of, spec)
            verdict = await self._try_out(source, who)
            if verdict.error:
                raise blame(spec, verdict.error) if verdict.lasting else GrammarRefused(verdict.error, lasting=False)
        except GrammarRefused as refused:
            if refused.lasting:
                self._keep(key, refused)
            raise
        grammar = Grammar(source)
        self._keep(key, grammar)
        return grammar

    def _done(self, key: bytes, task: asyncio.Task[Grammar]) -> None:
        del self._under_way[key]
        if not task.cancelled():
            task.exception()  # looked at, also where everybody has left

    def _keep(self, key: bytes, result: Grammar | GrammarRefused) -> None:
        self._known[key] = result
        self._characters += _size(result)
        while len(self._known) > _KEPT or self._characters > _KEPT_CHARACTERS:
            _key, oldest = self._known.popitem(last=False)
            self._characters -= _size(oldest)

    async def _try_out(self, source: str, who: str) -> Verdict:
        """The forge's word on a grammar."""
        async with self._starting:
            if self._writer is None:
                self._writer = await self._start()
        trial = Trial(next(self._ids), source, who)
        future = self._verdicts[trial.id] = asyncio.get_running_loop().create_future()
        try:
            self._writer.write(as_frame(trial))
            return await future
        finally:
            del self._verdicts[trial.id]

    async def _start(self) -> asyncio.StreamWriter:
        """Start the forge."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "penstock.engine.forge", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr.fileno(),
            )
        reader, writer = await asyncio.open_connection(sock=ours)
        writer.write(as_frame(self._config))
        self._listening = asyncio.create_task(self._listen(reader, writer, self._process))
        return writer

    async def _listen(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, process: subprocess.Popen[bytes]
    ) -> None:
        """Hand out verdicts until the forge is gone; then nobody shall wait for it."""
        with suppress(asyncio.IncompleteReadError, OSError, msgspec.MsgspecError):
            while True:
                header = await reader.readexactly(HEADER)
                body = await reader.readexactly(int.from_bytes(header, "little"))
                verdict = msgspec.msgpack.decode(body, type=Verdict)
                future = self._verdicts.get(verdict.id)
                if future is not None and not future.done():
                    future.set_result(verdict)
        self._writer = None
        for number, future in self._verdicts.items():
            if not future.done():
                future.set_result(Verdict(number, _STOPPED, lasting=False))
        writer.close()
        process.kill()
        await asyncio.to_thread(process.wait)


def _key(spec: GrammarSpec) -> tuple[bytes, int]:
    """What tells a grammar from others, and its size in bytes. Raises GrammarRefused."""
    try:
        text = msgspec.json.encode(spec)
    except (msgspec.MsgspecError, TypeError, ValueError, RecursionError):
        raise GrammarRefused("grammar is not valid: it is no JSON value") from None
    return hashlib.sha256(text).digest(), len(text)


def _size(result: Grammar | GrammarRefused) -> int:
    return len(result.source) if isinstance(result, Grammar) else len(result.what)
