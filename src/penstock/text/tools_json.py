"""JSON as a model writes it, read a piece at a time: one value, and the object that is a tool call.

Work is linear in the text, however it is cut; what is kept does not grow with it (a call's arguments are handed on).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any, Literal

MAX_DEPTH = 128
MAX_NUMBER = 400  # characters
_PLAIN = re.compile(r'(?:[^"\\\x00-\x1f]++|\\["\\/bfnrt])*+')  # within a string
_SPACE = re.compile(r"[ \t\r\n]*")
_NUMBER_PART = re.compile(r"[-+.0-9eE]*")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_LITERALS = {"t": "true", "f": "false", "n": "null"}

Progress = Literal["open", "done", "bad"]


class JsonValue:
    """Follows one JSON value. `read` takes text from a position on and returns the position where it stopped.

    It stops at the end of the text while `progress` is "open", after the value's last character when it is "done", and
    at the character that cannot be JSON when it is "bad". A number without a delimiter behind it stays open. A raw
    control character in a string, which models write for a line break, is mended: `read` adds what it took to `out`,
    with such characters escaped.
    """

    def __init__(self) -> None:
        self.progress: Progress = "open"
        self._stack: list[str] = []  # the brackets that are open
        self._at = "value"  # what comes next
        self._key = False  # whether the string being read is a key
        self._part = ""  # of a number or literal; of an escape: its hexadecimal digits

    def read(self, text: str, at: int, out: list[str]) -> int:
        """See the class."""
        began = at
        while at < len(text) and self.progress == "open":
            if self._at == "string":
                at = _end(_PLAIN, text, at)
                if at < len(text) and text[at] < " ":
                    out += (text[began:at], json.dumps(text[at])[1:-1])
                    at = began = at + 1
                    continue
            if at < len(text):
                at = self._step(text, at)
        out.append(text[began:at])
        return at

    def _step(self, text: str, at: int) -> int:
        """Reads one token, or one character of a string; the position after it."""
        char, state = text[at], self._at
        if state == "string":
            if char == "\\":
                self._at = "escape"
            else:  # the quote that ends it
                self._at = "colon" if self._key else "after"
                if not self._key:
                    self._close_value()
            return at + 1
        if state in ("escape", "unicode"):
            return self._escape(char, at)
        if state in ("number", "literal"):
            return self._scalar(text, at)
        if char in " \t\r\n":
            return _end(_SPACE, text, at)
        return self._mark(char, at)

    def _mark(self, char: str, at: int) -> int:
        """A character outside strings and scalars."""
        state, inside = self._at, self._stack[-1] if self._stack else ""
        if state == "colon" and char == ":":
            self._at = "value"
        elif state in ("key", "key or end") and char == '"':
            self._at, self._key = "string", True
        elif state == "after" and char == "," and inside:
            self._at = "key" if inside == "{" else "value"
        elif (state in ("after", "key or end") and inside == "{" and char == "}") or (
            state in ("after", "value or end") and inside == "[" and char == "]"
        ):
            self._stack.pop()
            self._close_value()
        elif state in ("value", "value or end"):
            return self._begin(char, at)
        else:
            self.progress = "bad"
            return at
        return at + 1

    def _begin(self, char: str, at: int) -> int:
        """The first character of a value."""
        if char in "{[" and len(self._stack) < MAX_DEPTH:
            self._stack.append(char)
            self._at = "key or end" if char == "{" else "value or end"
        elif char == '"':
            self._at, self._key = "string", False
        elif char in "-0123456789":
            self._at, self._part = "number", char
        elif char in _LITERALS:
            self._at, self._part = "literal", char
        else:
            self.progress = "bad"
            return at
        return at + 1

    def _escape(self, char: str, at: int) -> int:
        if self._at == "unicode" and char in "0123456789abcdefABCDEF":
            self._part += char
            if len(self._part) == 4:
                self._at = "string"
        elif self._at == "escape" and char == "u":
            self._at, self._part = "unicode", ""
        elif self._at == "escape" and char in '"\\/bfnrt':
            self._at = "string"
        else:
            self.progress = "bad"
            return at
        return at + 1

    def _scalar(self, text: str, at: int) -> int:
        if self._at == "literal":
            word = _LITERALS[self._part[0]]
            if text[at] != word[len(self._part)]:
                self.progress = "bad"
                return at
            self._part += text[at]
            if self._part == word:
                self._close_value()
            return at + 1
        end = _end(_NUMBER_PART, text, at)
        self._part += text[at : min(end, at + MAX_NUMBER)]
        if len(self._part) > MAX_NUMBER or (end < len(text) and not _NUMBER.fullmatch(self._part)):
            self.progress = "bad"
        elif end < len(text):
            self._close_value()
        return end

    def _close_value(self) -> None:
        self._at = "after"
        if not self._stack:
            self.progress = "done"


class CallObject:
    """Follows the object that is a call: `{"name": ..., "arguments": {...}}`, keys in any order, others ignored.

    `read` as in JsonValue. `name` is set when it is known; `arguments` collects the JSON text of the arguments, for
    the caller to take. Arguments may also be called "parameters", may be a string that holds the object's JSON, and
    where they are missing or null they are `{}`. With `names`, for places where other JSON may stand, the name must be
    one of them, only the keys that calls have are taken, and arguments must be there.
    """

    KEYS = frozenset(["name", "function", "tool_name", "arguments", "parameters", "type", "id", "tool_call_id"])

    def __init__(self, names: Collection[str] | None) -> None:
        self.progress: Progress = "open"
        self.name: str | None = None
        self.arguments: list[str] = []
        self.complete = False  # the arguments are there, whatever becomes of the rest of the object
        self._names = names
        self._at = "brace"
        self._value: JsonValue | None = None
        self._raw: list[str] = []
        self._key = ""
        self._has_arguments = False

    def read(self, text: str, at: int) -> int:
        """See the class."""
        while at < len(text) and self.progress == "open":
            if self._value is not None:
                at = self._read_value(self._value, text, at)
            elif text[at] in " \t\r\n":
                at = _end(_SPACE, text, at)
            else:
                at = self._mark(text[at], at)
        return at

    def _mark(self, char: str, at: int) -> int:
        if (self._at, char) == ("brace", "{"):
            self._at = "key"
        elif self._at == "key" and char == '"':
            self._value, self._raw = JsonValue(), []
            return at
        elif (self._at, char) == ("colon", ":"):
            self._at = "value"
        elif self._at == "value":
            return self._begin_value(char, at)
        elif (self._at, char) == ("comma", ","):
            self._at = "key"
        elif (self._at, char) == ("comma", "}"):
            self._close()
            return at if self.progress == "bad" else at + 1
        else:
            self.progress = "bad"
            return at
        return at + 1

    def _begin_value(self, char: str, at: int) -> int:
        self._value, self._raw = JsonValue(), []
        if self._key in ("arguments", "parameters"):
            if self._has_arguments or char not in '{"n':
                self.progress = "bad"
            self._has_arguments = True
            if char == "{":
                self._raw = self.arguments  # handed on as it comes
        return at

    def _read_value(self, value: JsonValue, text: str, at: int) -> int:
        at = value.read(text, at, self._raw)
        if self._at == "value" and self._key not in self.KEYS:
            self._raw.clear()
        if value.progress == "bad":
            self.progress = "bad"
        elif value.progress == "done":
            self._value = None
            self._take()
        return at

    def _take(self) -> None:
        """A key or a value is complete."""
        raw = "" if self._raw is self.arguments else "".join(self._raw)
        if self._at == "key":
            self._key = json.loads(raw)
            self._at = "colon"
            if self._names is not None and self._key not in self.KEYS:
                self.progress = "bad"
            return
        self._at = "comma"
        if self._key in ("name", "function", "tool_name"):
            name: Any = json.loads(raw)
            wanted = isinstance(name, str) and name and (self._names is None or name in self._names)
            if wanted and self.name is None:
                self.name = name
            else:
                self.progress = "bad"
        elif self._key in ("arguments", "parameters"):
            arguments = _object_text(json.loads(raw)) if raw else ""
            if arguments is None:
                self.progress = "bad"
            else:
                self.complete = True
                self.arguments += [arguments] if arguments else []

    def _close(self) -> None:
        if self.name is None or (self._names is not None and not self._has_arguments):
            self.progress = "bad"
            return
        if not self._has_arguments:
            self.arguments.append("{}")
        self.progress = "done"


def _object_text(value: Any) -> str | None:
    """The JSON text of the arguments where they are null or a string; None when it is no object."""
    if value in (None, ""):
        return "{}"
    try:
        if isinstance(value, str) and isinstance(json.loads(value), dict):
            return value
    except (ValueError, RecursionError):
        pass
    return None


def _end(pattern: re.Pattern[str], text: str, at: int) -> int:
    match = pattern.match(text, at)
    return at if match is None else match.end()
