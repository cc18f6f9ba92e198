"""An answer told as events of growing items: what /v1/responses and /v1/messages have in common."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from penstock.server.exchange import Exchange
from penstock.server.generation import TokenEvent
from penstock.server.house import House
from penstock.server.openai.turn import Turn
from penstock.server.refusal import Refusal
from penstock.text.answer_events import Event


class Narrator(Protocol):
    """Keeps an answer true while it comes; each method returns the frames of its events."""

    def begin(self) -> bytes:
        """Before the first token."""

    def tell(self, events: Iterable[Event], tokens: list[TokenEvent]) -> bytes:
        """What new tokens brought."""

    def end(self) -> bytes:
        """The answer is over."""

    def fail(self, refusal: Refusal) -> bytes:
        """The answer breaks off."""


async def narrate(exchange: Exchange, house: House, turn: Turn, narrator: Narrator, stream: bool) -> None:
    """Run the one answer of a turn to its end; stream: and send the events as they happen."""
    voice = turn.voices[0]
    async with turn.runs:
        if not stream:
            async for ((_, tokens),) in turn.runs:
                narrator.tell(voice.read(tokens), tokens)
            narrator.end()
            return
        await exchange.start_events([])
        await exchange.write(narrator.begin())
        try:
            with exchange.kept_alive(house.config.keep_alive_seconds):
                async for ((_, tokens),) in turn.runs:
                    frames = narrator.tell(voice.read(tokens), tokens)
                    if frames:
                        await exchange.write(frames)
        except Refusal as refusal:
            await exchange.write(narrator.fail(refusal))
            await exchange.end()
            raise
    await exchange.write(narrator.end())
    await exchange.end()
