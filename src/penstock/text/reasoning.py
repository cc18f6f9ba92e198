"""Splits a model's reasoning, between think tags, from its answer; a piece at a time."""

from __future__ import annotations

from dataclasses import dataclass

from penstock.text.answer_events import Content, Event, Reasoning

_SPACE = " \t\r\n"


@dataclass(frozen=True)
class ThinkTags:
    """The tags around a model's reasoning."""

    open: str
    close: str

    def opened_by(self, prompt: str) -> bool:
        """Whether the prompt ends inside the tags, as some templates leave it."""
        return prompt.rstrip(_SPACE).endswith(self.open)


_KNOWN = (
    ThinkTags("<think>", "</think>"),
    ThinkTags("[THINK]", "[/THINK]"),
    ThinkTags("<seed:think>", "</seed:think>"),
    ThinkTags("<|START_THINKING|>", "<|END_THINKING|>"),
)


def think_tags(source: str) -> ThinkTags | None:
    """The tags that a chat template shows its model to use."""
    for tags in _KNOWN:
        if tags.open in source or tags.close in source:
            return tags
    return None


class ReasoningSplitter:
    """Incremental: `push` text, `finish` at its end; the events do not depend on how the text was cut.

    An answer that begins with the open tag, or whose prompt ended with it (`opened`), is reasoning up to the close
    tag. White space around the tags belongs to neither part. Later tags are text.
    """

    def __init__(self, tags: ThinkTags, opened: bool = False) -> None:
        self._tags = tags
        self._state = "thinking" if opened else "start"
        self._held = ""  # may become a tag
        self._space: list[str] = []  # dropped if a tag or the end follows
        self._begun = False  # whether the part has text

    @property
    def thinking(self) -> bool:
        """Whether the text has come to the reasoning and not to its end."""
        return self._state == "thinking"

    def push(self, text: str) -> list[Event]:
        """The events that some more text brings."""
        events: list[Event] = []
        text, self._held = self._held + text, ""
        if text and self._state == "start":
            text = self._start(text)
        if text and self._state == "thinking":
            text = self._think(text, events)
        if text and self._state == "gap":
            text = text.lstrip(_SPACE)
            if text:
                self._state = "answer"
        if text and self._state == "answer":
            events.append(Content(text))
        return events

    def finish(self) -> list[Event]:
        """What was held back: it was no tag."""
        held, self._held = self._held, ""
        events: list[Event] = []
        if self._state == "thinking":
            if held:
                self._say(held, events)
        else:
            text = "".join(self._space) + held
            if text:
                events.append(Content(text))
        return events

    def _start(self, text: str) -> str:
        """Before the first word: is it the open tag? Returns what is left to read."""
        body = text.lstrip(_SPACE)
        self._space.append(text[: len(text) - len(body)])
        if body.startswith(self._tags.open):
            self._state, self._space = "thinking", []
            return body[len(self._tags.open) :]
        if self._tags.open.startswith(body):  # also when there is nothing but space
            self._held = body
            return ""
        self._state = "answer"
        text, self._space = "".join(self._space) + body, []
        return text

    def _think(self, text: str, events: list[Event]) -> str:
        """Within the tags. Returns what follows them."""
        close = self._tags.close
        end = text.find(close)
        if end >= 0:
            self._say(text[:end], events)
            self._state, self._space = "gap", []
            return text[end + len(close) :]
        keep = overlap(text, close)
        self._say(text[: len(text) - keep], events)
        self._held = text[len(text) - keep :]
        return ""

    def _say(self, text: str, events: list[Event]) -> None:
        body = text.rstrip(_SPACE)
        space = text[len(body) :]
        if body:
            if self._begun:
                body = "".join(self._space) + body
            else:
                body, self._begun = body.lstrip(_SPACE), True
            self._space = []
            events.append(Reasoning(body))
        if space and self._begun:
            self._space.append(space)


def overlap(text: str, mark: str) -> int:
    """How many characters at the end of the text may begin the mark."""
    for size in range(min(len(text), len(mark) - 1), 0, -1):
        if mark.startswith(text[-size:]):
            return size
    return 0
