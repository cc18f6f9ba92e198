"""Tool calls in a model's answer, found while it comes."""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Callable, Collection

from penstock.text.answer_events import CallArguments, CallStart, Content, Event
from penstock.text.reasoning import overlap
from penstock.text.tools_format import ToolFormat
from penstock.text.tools_json import CallObject, JsonValue

MAX_HELD = 64 * 1024  # characters of a call before its name and the beginning of its arguments are known
MAX_NAME = 128
_SPACE = " \t\r\n"
_SPACES = re.compile(r"[ \t\r\n]*")
_WORD = re.compile(r"[A-Za-z0-9_.\-]+")
_SHORT = string.ascii_letters + string.digits


class ToolParser:
    """Incremental: `push` text, `finish` at its end; the events do not depend on how the text was cut.

    What might be a call is held until its name and the beginning of its arguments are there; from then on the
    arguments stream. What turns out to be no call comes out as content, all of it, as does what follows a fault in a
    call that has begun. White space around calls is dropped.

    Without a trigger (`format.bare`) only the names of the tools make a call; after a trigger any name does, so that
    the client can tell the model that there is no such tool.
    """

    def __init__(
        self,
        format: ToolFormat,
        names: Collection[str],
        parallel: bool = True,
        forced: bool = False,
        new_id: Callable[[], str] | None = None,
    ) -> None:
        """parallel: more than one call is wanted; otherwise all that follows the first is dropped.

        forced: a grammar lets out nothing but calls, so that the beginning of another one, cut short, is no content.
        """
        self._format, self._names, self._parallel, self._forced = format, frozenset(names), parallel, forced
        self._new_id = new_id or (short_id if format.short_ids else long_id)
        marks = {format.trigger, *format.separators, *format.closers} - {""}
        self._marks = sorted(marks, key=len, reverse=True)
        self.calls = 0
        self.done = False  # the one call that is wanted is complete
        self._read = self._between if format.bare else self._text
        self._bare = format.bare  # these calls began without a trigger
        self._before = 0  # calls before these
        self._tail = ""  # unread: it may be the beginning of a mark
        self._final = False  # nothing follows the tail
        self._held: list[str] = []  # read, but not decided
        self._space: list[str] = []  # white space after the content so far
        self._spoken = False
        self._object = CallObject(None)
        self._room = 0  # how much more of the object may be held
        self._value = JsonValue()
        self._words: list[str] = []  # NAME, NAME and ID, or KIND and NAME, of a call whose name stands before it
        self._word_open = False
        self._events: list[Event] = []

    def push(self, text: str) -> list[Event]:
        """The events that some more text brings."""
        text, self._tail = self._tail + text, ""
        at = 0
        while at < len(text) and not self.done:
            at = self._read(text, at)
        events, self._events = self._events, []
        return events

    def finish(self) -> list[Event]:
        """The events that are left when the text has ended."""
        self._final = True
        self._events = self.push("")
        among_calls = self._read == self._between and self.calls > self._before
        if not among_calls and not (self._forced and self.calls):
            self._say("".join(self._held))
        if not self.calls and self._space:
            self._events.append(Content("".join(self._space)))
        self._held, self._space = [], []
        events, self._events = self._events, []
        return events

    # Each of these reads text from a position on and returns the position up to which it is done. They may change
    # self._read, which reads on from there.

    def _text(self, text: str, at: int) -> int:
        """Content, until a trigger."""
        trigger = self._format.trigger
        found = text.find(trigger, at) if trigger else -1
        if found >= 0:
            self._say(text[at:found])
            self._begin(trigger)
            return found + len(trigger)
        keep = 0 if self._final or not trigger else overlap(text[at:], trigger)
        self._say(text[at : len(text) - keep])
        self._tail = text[len(text) - keep :]
        return len(text)

    def _begin(self, trigger: str) -> None:
        """A trigger was read: calls follow."""
        self._read, self._bare, self._before, self._held = self._between, False, self.calls, [trigger]

    def _between(self, text: str, at: int) -> int:
        """Before a call, or after one."""
        if text[at] in _SPACE:
            return self._hold(text, at, _end(_SPACES, text, at))
        if text[at] == "{":
            self._read, self._room = self._call, MAX_HELD
            self._object = CallObject(self._names if self._bare else None)
            return at
        mark = self._mark(text, at)
        if mark is None:
            self._tail = text[at:]
            return len(text)
        after_call = self.calls > self._before
        if mark and mark == self._format.trigger and (after_call or self._bare):
            if not after_call:
                self._say("".join(self._held))
            self._begin(mark)
        elif mark in self._format.closers and after_call:
            self._held = []
            if not self._bare:
                self._read = self._text
        elif mark in self._format.separators or (self._bare and mark in self._format.closers):
            self._held.append(mark)
        elif self._format.args_mark and not self._bare and _WORD.match(text, at):
            self._read, self._words, self._word_open = self._header, [""], True
        else:
            return self._fail(at)
        return at + len(mark)

    def _mark(self, text: str, at: int) -> str | None:
        """The longest mark that stands here, "" for none, None when more text must decide."""
        for mark in self._marks:
            if text.startswith(mark, at):
                return mark
            if not self._final and mark.startswith(text[at : at + len(mark)]):
                return None
        return ""

    def _call(self, text: str, at: int) -> int:
        """A call as one JSON object, before it has begun to stream."""
        window = text[at : at + self._room]
        call = self._object
        size = call.read(window, 0)
        self._room -= size
        self._hold(window, 0, size)
        at += size
        if call.name is not None and call.arguments:
            self._start(call.name)
            self._read = self._rest
            return self._rest(text, at)
        return self._fail(at) if call.progress == "bad" or not self._room else at

    def _rest(self, text: str, at: int) -> int:
        """A call as one JSON object, which streams."""
        call = self._object
        if at < len(text):
            at = call.read(text, at)
        self._argue(call.arguments)
        call.arguments.clear()
        # A brace too few is what models get wrong most often: the call is there all the same.
        return self._after("done" if call.progress == "bad" and call.complete else call.progress, at)

    def _header(self, text: str, at: int) -> int:
        """NAME, perhaps a mark and another word, perhaps a mark, before the arguments."""
        format, marks = self._format, [self._format.args_mark]
        if len(self._words) == 1:
            marks += filter(None, (format.id_mark, format.name_mark))
        if self._word_open:
            word = _WORD.match(text, at, min(len(text), at + MAX_NAME - len(self._words[-1])))
            if word:
                self._words[-1] += word.group()
                return self._hold(text, at, word.end())
            self._word_open = not self._words[-1]
        if text[at] in _SPACE:
            return self._hold(text, at, _end(_SPACES, text, at))
        if text[at] == "{" and (not self._word_open or (format.name_mark and len(self._words) == 2)):
            name, *more = self._words
            self._start(*((more[0] or name,) if more and format.name_mark else self._words))
            self._read, self._value = self._arguments, JsonValue()
            return at
        for mark in marks:
            if text.startswith(mark, at):
                if mark != format.args_mark:
                    self._words.append("")
                    self._word_open = True
                return self._hold(text, at, at + len(mark))
            if not self._final and mark.startswith(text[at : at + len(mark)]):
                self._tail = text[at:]
                return len(text)
        return self._fail(at)

    def _arguments(self, text: str, at: int) -> int:
        """The arguments of a call whose name stood before."""
        out: list[str] = []
        at = self._value.read(text, at, out)
        self._argue(out)
        return self._after(self._value.progress, at)

    def _after(self, progress: str, at: int) -> int:
        """Goes on when a call that streams is complete or broken."""
        if progress == "bad":
            return self._fail(at)
        if progress == "done":
            self._read = self._between
            self.done = not self._parallel
        return at

    def _hold(self, text: str, at: int, end: int) -> int:
        self._held.append(text[at:end])
        return end

    def _fail(self, at: int) -> int:
        """These are no calls: what was held is content, and reading goes on as text."""
        held, self._held = "".join(self._held), []
        self._say(held)
        self._read = self._text
        return at

    def _start(self, name: str, call_id: str = "") -> None:
        self._held, self._space = [], []
        self._events.append(CallStart(self.calls, call_id or self._new_id(), name))
        self.calls += 1

    def _argue(self, parts: list[str]) -> None:
        text = "".join(parts)
        if text:
            self._events.append(CallArguments(self.calls - 1, text))

    def _say(self, text: str) -> None:
        """Content, but for white space that a call may follow."""
        body = text.rstrip(_SPACE)
        if body:
            space = "".join(self._space)
            if self._spoken or not self.calls:
                body_out = space + body
            else:
                body_out = body.lstrip(_SPACE)
            self._events.append(Content(body_out))
            self._spoken, self._space = True, []
        if len(body) < len(text):
            self._space.append(text[len(body) :])


def long_id() -> str:
    """A new id for a call."""
    return f"call_{secrets.token_hex(12)}"


def short_id() -> str:
    """One of nine letters and digits, as Mistral's templates want them."""
    return "".join(secrets.choice(_SHORT) for _ in range(9))


def _end(pattern: re.Pattern[str], text: str, at: int) -> int:
    match = pattern.match(text, at)
    return at if match is None else match.end()
