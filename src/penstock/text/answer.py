"""What a model's answer consists of: text, reasoning and tool calls, found in the text while it comes.

The same code serves streams and whole answers: the events do not depend on how the text was cut into pieces, once
neighbouring deltas of one kind are joined (`joined`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from penstock.text.answer_events import CallArguments, CallStart, Content, Event, Reasoning
from penstock.text.reasoning import ReasoningSplitter
from penstock.text.tools_parser import ToolParser


@dataclass(frozen=True, slots=True)
class Call:
    """A whole call; `arguments` is JSON text, cut short where the answer was."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Whole:
    """A whole answer. content and reasoning are None where there is none beside the other parts."""

    content: str | None
    reasoning: str | None
    calls: list[Call]


class AnswerParser:
    """Splits an answer: first the reasoning off, then the calls. Either may be absent."""

    def __init__(self, reasoning: ReasoningSplitter | None = None, tools: ToolParser | None = None) -> None:
        self._reasoning, self._tools = reasoning, tools

    @property
    def calls(self) -> int:
        """Tool calls so far."""
        return 0 if self._tools is None else self._tools.calls

    @property
    def done(self) -> bool:
        """Whether the one call that is allowed is complete: the generation can be ended."""
        return self._tools is not None and self._tools.done

    @property
    def thinking(self) -> bool:
        """Whether the answer is in its reasoning."""
        return self._reasoning is not None and self._reasoning.thinking

    def push(self, text: str) -> list[Event]:
        """The events that some more text brings."""
        events: list[Event] = [Content(text)] if text else []
        if self._reasoning is not None:
            events = self._reasoning.push(text)
        return self._calls(events)

    def finish(self) -> list[Event]:
        """The events that are left when the text has ended."""
        events = [] if self._reasoning is None else self._calls(self._reasoning.finish())
        if self._tools is not None:
            events += self._tools.finish()
        return events

    def _calls(self, events: list[Event]) -> list[Event]:
        if self._tools is None:
            return events
        found: list[Event] = []
        for event in events:
            if isinstance(event, Content):
                found += self._tools.push(event.text)
            else:
                found.append(event)
        return found


def joined(events: Iterable[Event]) -> list[Event]:
    """The events with neighbouring deltas of one kind made one."""
    runs: list[tuple[Event, list[str]]] = []
    for event in events:
        text = "" if isinstance(event, CallStart) else event.text
        if runs and not isinstance(event, CallStart) and _kind(runs[-1][0]) == _kind(event):
            runs[-1][1].append(text)
        else:
            runs.append((event, [text]))
    return [_with_text(event, "".join(texts)) for event, texts in runs]


def whole(events: Iterable[Event]) -> Whole:
    """The answer that the events make up."""
    content: list[str] = []
    reasoning: list[str] = []
    calls: dict[int, tuple[CallStart, list[str]]] = {}
    for event in events:
        if isinstance(event, Content):
            content.append(event.text)
        elif isinstance(event, Reasoning):
            reasoning.append(event.text)
        elif isinstance(event, CallStart):
            calls[event.index] = (event, [])
        else:
            calls[event.index][1].append(event.text)
    made = [Call(start.id, start.name, "".join(arguments)) for start, arguments in calls.values()]
    text = "".join(content)
    return Whole(text if text or not made else None, "".join(reasoning) or None, made)


def _kind(event: Event) -> tuple[type[Event], int]:
    return type(event), event.index if isinstance(event, CallArguments) else 0


def _with_text(event: Event, text: str) -> Event:
    if isinstance(event, CallStart):
        return event
    if isinstance(event, CallArguments):
        return CallArguments(event.index, text)
    return type(event)(text)
