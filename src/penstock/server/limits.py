"""How much the server takes on at once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from penstock.server.refusal import overloaded


class Permits:
    """A bounded number of generations, queued and running together. Nobody waits for one: full is full."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.free = total

    @contextmanager
    def take(self, count: int = 1) -> Iterator[None]:
        """Hold permits. Raises Refusal 429 when there are too few."""
        if count > self.free:
            raise overloaded()
        self.free -= count
        try:
            yield
        finally:
            self.free += count


class Presence:
    """Counts the requests in the house, and tells when the last one has left."""

    def __init__(self) -> None:
        self.count = 0
        self._empty = asyncio.Event()
        self._empty.set()

    @contextmanager
    def enter(self) -> Iterator[None]:
        """One request, from its first byte to its last."""
        self.count += 1
        self._empty.clear()
        try:
            yield
        finally:
            self.count -= 1
            if self.count == 0:
                self._empty.set()

    async def empty(self) -> None:
        """Wait until nobody is in."""
        await self._empty.wait()
