"""The API process's word on adapters: which there are, and what the engine was asked to load or forget."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

from penstock.engine.messages import AdapterReply, Failed, LoadAdapter, UnloadAdapter

log = logging.getLogger("penstock.engine")

Call = LoadAdapter | UnloadAdapter


class AdapterCalls:
    """folders: of the adapters that requests may ask for, by name."""

    def __init__(self, folders: Mapping[str, str]) -> None:
        self.folders = dict(folders)
        self._open: dict[int, tuple[Call, asyncio.Future[Failed | None] | None]] = {}

    def begin(self, call: Call) -> asyncio.Future[Failed | None]:
        """Note a call that goes to the engine. The future is why it failed, or None; what comes of the call counts even
        where nobody waits for that any more."""
        future: asyncio.Future[Failed | None] = asyncio.get_running_loop().create_future()
        self._open[call.id] = call, future
        return future

    def end(self, reply: AdapterReply) -> None:
        """The engine has answered."""
        call, future = self._open.pop(reply.id)
        if isinstance(call, LoadAdapter) and reply.failure is None:
            self.folders[call.name] = call.folder
        elif isinstance(call, UnloadAdapter) and reply.failure is None:
            self.folders.pop(call.name, None)
        elif future is None and reply.failure is not None:
            log.error("the adapter %s is lost: %s", call.name, reply.failure.what)
            self.folders.pop(call.name, None)
        if future is not None and not future.done():
            future.set_result(reply.failure)

    def fail(self, text: str) -> None:
        """The engine is gone, and will not answer."""
        for _, future in self._open.values():
            if future is not None and not future.done():
                future.set_result(Failed(1, text))
        self._open.clear()

    def kept(self, given: Mapping[str, str]) -> dict[str, str]:
        """Of the adapters that the last process was started with those that are still wanted and still there."""
        return {name: folder for name, folder in given.items() & self.folders.items() if Path(folder).is_dir()}

    def again(self, given: Mapping[str, str], ids: Iterable[int]) -> list[LoadAdapter]:
        """Calls that give a process, started with `given`, the others too. One that fails is then forgotten."""
        missing = self.folders.items() - given.items()
        calls = [LoadAdapter(number, name, folder) for (name, folder), number in zip(missing, ids, strict=False)]
        self._open |= {call.id: (call, None) for call in calls}
        return calls
