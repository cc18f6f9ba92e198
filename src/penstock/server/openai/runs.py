"""The answers of one request, running side by side: several to a prompt (`n`), to several prompts, or both."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from penstock.server.generation import Generation, TokenEvent
from penstock.server.house import House
from penstock.server.refusal import unhealthy

Step = list[tuple[int, list[TokenEvent]]]  # (index of the answer, its new tokens)


class Runs:
    """Generations in groups of one prompt each. Inside `async with runs:`, iterate it for what each engine step made.

    The first of a group goes ahead: its prompt is then in the prefix cache for the others. Entering raises Refusal 503
    when the engine is down, iterating what a generation raises; leaving aborts what still runs.
    """

    def __init__(self, house: House, groups: Sequence[Sequence[Generation]]) -> None:
        self._house, self._groups = house, groups
        self.all = [generation for group in groups for generation in group]
        self._tasks: list[asyncio.Task[None]] = []
        self._wake = asyncio.Event()
        self._step: Step = []
        self._running = 0
        self._failure: Exception | None = None

    async def __aenter__(self) -> Runs:
        if len(self.all) == 1:
            self.all[0].__enter__()
            return self
        if not self._house.engine.healthy:
            raise unhealthy()
        self._running = len(self.all)
        index = 0
        for group in self._groups:
            cached = asyncio.Event()
            if not self._shares(group):
                cached.set()
            for place, generation in enumerate(group):
                gate = cached if place else None
                self._tasks.append(asyncio.create_task(self._run(index, generation, gate, cached)))
                index += 1
        return self

    async def __aexit__(self, *details: object) -> None:
        if len(self.all) == 1:
            self.all[0].__exit__(*details)
            return
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def __aiter__(self) -> AsyncIterator[Step]:
        return self

    async def __anext__(self) -> Step:
        if len(self.all) == 1:
            return [(0, await anext(self.all[0]))]
        while not self._step and self._failure is None:
            if not self._running:
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()
        if self._failure is not None:
            raise self._failure
        # The engine's outputs of a step arrive together, so all who got one have run by now.
        step, self._step = self._step, []
        return step

    async def collect(self) -> list[list[TokenEvent]]:
        """Every answer's tokens, by index."""
        found: list[list[TokenEvent]] = [[] for _ in self.all]
        async with self:
            async for step in self:
                for index, events in step:
                    found[index] += events
        return found

    def _shares(self, group: Sequence[Generation]) -> bool:
        """Whether the others gain anything by waiting for the first."""
        if not self._house.config.engine.prefix_caching or self._house.limits.start_id is not None:
            return False
        return len(group[0].request.prompt_ids) > self._house.limits.block_size

    async def _run(self, index: int, generation: Generation, gate: asyncio.Event | None, cached: asyncio.Event) -> None:
        try:
            if gate is not None:
                await gate.wait()
            with generation:
                async for events in generation:
                    self._step.append((index, events))
                    self._wake.set()
                    cached.set()
        except Exception as error:  # the reader of the steps raises it
            self._failure = error
        finally:
            self._running -= 1
            cached.set()
            self._wake.set()
