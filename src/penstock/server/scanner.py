"""Reading JSON as serde_json does: the same stops at the same bytes, in the same words."""

from __future__ import annotations

import re
from typing import NoReturn

_PLAIN = re.compile(rb'[^"\\\x00-\x1f]*')
_BLANK = re.compile(rb"[ \t\r\n]*")
_DIGITS = re.compile(rb"[0-9]*")
_HEX = re.compile(rb"[0-9a-fA-F]{4}")
_QUOTE, _BACKSLASH = b'"', b"\\"
_ESCAPES = {bytes([k]): bytes([v]) for k, v in zip(b'"\\/bfnrt', b'"\\/\b\f\n\r\t', strict=True)}


class Stop(Exception):
    """Why reading ended, and how many bytes had been read. syntax: it is not JSON; else JSON of another shape."""

    def __init__(self, message: str, at: int, syntax: bool) -> None:
        super().__init__(message)
        self.message, self.at, self.syntax = message, at, syntax


class Scanner:
    """Reads one text; every method raises Stop."""

    def __init__(self, raw: bytes) -> None:
        self.raw, self.at = raw, 0

    def end(self) -> None:
        """Nothing but blanks may follow."""
        if self.peek():
            self._unexpected("trailing characters")

    def skip(self) -> None:
        """Read a value of any type, however deep."""
        open_brackets: list[bytes] = []
        more = True
        while more:
            first = self.start()
            opened = first in (b"[", b"{")
            if opened:
                self.at += 1
                open_brackets.append(first)
            else:
                self.scalar(first)
            more = False
            while open_brackets and not more:
                more = self.element(opened) if open_brackets[-1] == b"[" else self._member(opened)
                opened = False
                if not more:
                    open_brackets.pop()

    def scalar(self, first: bytes) -> str | float | bool | None:
        """Read a value without brackets."""
        if first == b'"':
            return self.string()
        if first in (b"t", b"f"):
            self.ident(b"true" if first == b"t" else b"false")
            return first == b"t"
        if first == b"n":
            self.ident(b"null")
            return None
        if first in b"-0123456789":
            return self.number()
        self._unexpected("expected value")

    def key(self, first: bool) -> str | None:
        """The next key of an object, None behind its end."""
        found = self.peek()
        if found == b"}":
            self.at += 1
            return None
        if found == b"," and not first:
            self.at += 1
            found = self.peek() or self._unexpected("EOF while parsing a value")
            if found == b"}":
                self._unexpected("trailing comma")
        elif not found:
            self._unexpected("EOF while parsing an object")
        elif not first:
            self._unexpected("expected `,` or `}`")
        if found != b'"':
            self._unexpected("key must be a string")
        return self.string()

    def _member(self, first: bool) -> bool:
        if self.key(first) is None:
            return False
        self.colon()
        return True

    def colon(self) -> None:
        """Read what stands between a key and its value."""
        found = self.peek() or self._unexpected("EOF while parsing an object")
        if found != b":":
            self._unexpected("expected `:`")
        self.at += 1

    def element(self, first: bool) -> bool:
        """Whether a list goes on; at its end the bracket is read."""
        found = self.peek() or self._unexpected("EOF while parsing a list")
        if found == b"]":
            self.at += 1
            return False
        if first:
            return True
        if found != b",":
            self._unexpected("expected `,` or `]`")
        self.at += 1
        if self.start() == b"]":
            self._unexpected("trailing comma")
        return True

    def string(self) -> str:
        """Read a string; its first quote comes next."""
        self.at += 1
        parts: list[bytes] = []
        while True:
            run = _PLAIN.match(self.raw, self.at)
            parts.append(run[0] if run else b"")
            self.at += len(parts[-1])
            stop = self._next("EOF while parsing a string")
            if stop == _QUOTE:
                break
            if stop != _BACKSLASH:
                self._broken("control character (\\u0000-\\u001F) found while parsing a string")
            parts.append(self._escape())
        try:
            return b"".join(parts).decode()
        except UnicodeDecodeError:
            self._broken("invalid unicode code point")

    def _escape(self) -> bytes:
        letter = self._next("EOF while parsing a string")
        if letter != b"u":
            known = {
                b'"': b'"',
                b"\\": b"\\",
                b"/": b"/",
                b"b": b"\b",
                b"f": b"\f",
                b"n": b"\n",
                b"r": b"\r",
                b"t": b"\t",
            }
            return known.get(letter) or self._broken("invalid escape")
        code = self._hex()
        if 0xD800 <= code < 0xDC00:
            if self.raw[self.at : self.at + 2] != b"\\u":
                self._broken("unexpected end of hex escape")
            self.at += 2
            low = self._hex()
            if not 0xDC00 <= low < 0xE000:
                self._broken("lone leading surrogate in hex escape")
            code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00)
        elif 0xDC00 <= code < 0xE000:
            self._broken("lone leading surrogate in hex escape")
        return chr(code).encode()

    def _hex(self) -> int:
        digits = _HEX.match(self.raw, self.at)
        cut = self.at + 4 > len(self.raw)
        self.at = min(self.at + 4, len(self.raw))
        if digits is None:
            self._broken("EOF while parsing a string" if cut else "invalid escape")
        return int(digits[0], 16)

    def number(self) -> int | float:
        """Read a number."""
        began = self.at
        if self.raw[self.at : self.at + 1] == b"-":
            self.at += 1
        lead = self._digits()
        if not lead:
            self._next("EOF while parsing a value")
            self._broken("invalid number")
        if lead[:1] == b"0" and len(lead) > 1:
            self.at -= len(lead) - 1
            self._unexpected("invalid number")
        whole = True
        if self.raw[self.at : self.at + 1] == b".":
            self.at += 1
            whole = False
            if not self._digits():
                self._unexpected("invalid number" if self.at < len(self.raw) else "EOF while parsing a value")
        if self.raw[self.at : self.at + 1] in (b"e", b"E"):
            self.at += 1
            whole = False
            if self.raw[self.at : self.at + 1] in (b"+", b"-"):
                self.at += 1
            if not self._digits():
                self._next("EOF while parsing a value")
                self._broken("invalid number")
        text = self.raw[began : self.at].decode()
        if whole and len(text) <= 20 and text != "-0" and -(2**63) <= int(text) < 2**64:
            return int(text)
        number = float(text)  # as serde_json reads larger integers
        if number in (float("inf"), float("-inf")):
            self._broken("number out of range")
        return number

    def _digits(self) -> bytes:
        run = _DIGITS.match(self.raw, self.at)
        found = run[0] if run else b""
        self.at += len(found)
        return found

    def ident(self, word: bytes) -> None:
        """Read true, false or null."""
        for letter in word:
            if self._next("EOF while parsing a value")[0] != letter:
                self._broken("expected ident")

    def start(self) -> bytes:
        """The first byte of the next value, unread."""
        return self.peek() or self._unexpected("EOF while parsing a value")

    def peek(self) -> bytes:
        """The next byte that is not blank, unread; empty at the end."""
        blank = _BLANK.match(self.raw, self.at)
        self.at = blank.end() if blank else self.at
        return self.raw[self.at : self.at + 1]

    def _next(self, at_end: str) -> bytes:
        if self.at >= len(self.raw):
            self._broken(at_end)
        self.at += 1
        return self.raw[self.at - 1 : self.at]

    def _unexpected(self, message: str) -> NoReturn:
        """A syntax error at the next byte."""
        raise Stop(message, min(self.at + 1, len(self.raw)), syntax=True)

    def _broken(self, message: str) -> NoReturn:
        """A syntax error at the last byte read."""
        raise Stop(message, self.at, syntax=True)

    def unfit(self, message: str) -> NoReturn:
        """JSON, but not what was expected."""
        raise Stop(message, self.at, syntax=False)
