"""serde_json's verdict on a body: TGI reads JSON with it, and clients know its words.

Called only for bodies that are refused, so it may take its time. It walks the bytes as serde_json does: where it
stops is the line and column of the message, and the path is that of the value it was reading. The types are msgspec's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NoReturn

from msgspec import inspect

from penstock.server.scanner import Scanner, Stop

# What Rust calls the integers of our fields; anything else is a u32.
INTEGERS = {"best_of": "usize", "truncate": "usize", "top_k": "i32", "seed": "u64"}
RANGES = {"u32": (0, 2**32 - 1), "i32": (-(2**31), 2**31 - 1), "u64": (0, 2**64 - 1), "usize": (0, 2**64 - 1)}
MAX_SHOWN = 200  # characters of a client's string in our answer
_LF = b"\n"


@dataclass(frozen=True)
class Complaint:
    """Why a body does not fit. syntax: it is not JSON (status 400), else JSON of another shape (422).

    line: 0 where serde_json knows no place.
    """

    message: str
    path: str
    line: int
    column: int
    syntax: bool

    def __str__(self) -> str:
        prefix = f"{self.path}: " if self.path else ""
        place = f" at line {self.line} column {self.column}" if self.line else ""
        return f"{prefix}{self.message}{place}"


def judge(raw: bytes, kind: Any) -> Complaint | None:
    """What serde_json would say about a body of that type; None when it would take it."""
    reader = _Reader(raw)
    try:
        reader.value(inspect.type_info(kind), "")
        reader.end()
    except Stop as stop:
        return complaint(raw, stop.message, stop.at, "".join(reader.path).removeprefix("."), stop.syntax)
    return None


def complaint(raw: bytes, message: str, at: int, path: str = "", syntax: bool = False) -> Complaint:
    """A complaint about the byte before offset `at`."""
    before = raw[:at]
    return Complaint(message, path, before.count(_LF) + 1, at - (before.rfind(_LF) + 1), syntax)


class _Reader(Scanner):
    """Reads one body. `path` is that of the current value, in steps."""

    def __init__(self, raw: bytes) -> None:
        super().__init__(raw)
        self.path: list[str] = []

    def value(self, kind: inspect.Type, name: str) -> None:
        """Read a value that must be of a type; name: of its field."""
        first = self.start()
        match kind:
            case inspect.Metadata():
                self.value(kind.type, name)
            case inspect.UnionType():
                self._union(kind, first, name)
            case inspect.StrType() if first == b'"':
                self.string()
            case inspect.BoolType() if first in (b"t", b"f"):
                self.ident(b"true" if first == b"t" else b"false")
            case inspect.NoneType() if first == b"n":
                self.ident(b"null")
            case inspect.FloatType() | inspect.IntType() if first in b"-0123456789":
                self._typed_number(kind, name)
            case inspect.ListType() if first == b"[":
                self._list(kind.item_type, name)
            case inspect.StructType() if first == b"{":
                self._struct(kind)
            case inspect.DictType() if first == b"{":
                self.skip()
            case inspect.LiteralType() if first == b'"':
                self._variant([str(value) for value in kind.values])
            case inspect.StrType() | inspect.BoolType() | inspect.NoneType() | inspect.FloatType() | inspect.IntType():
                self._misfit(_expected(kind, name))
            case inspect.ListType() | inspect.StructType() | inspect.DictType() | inspect.LiteralType():
                self._misfit(_expected(kind, name))
            case _:
                self.skip()

    def _union(self, kind: inspect.UnionType, first: bytes, name: str) -> None:
        others = [member for member in kind.types if not isinstance(member, inspect.NoneType)]
        if first == b"n" and len(others) < len(kind.types):
            self.ident(b"null")
        elif all(isinstance(member, inspect.StructType) and member.tag for member in others) and first == b"{":
            self._tagged({str(m.tag): m for m in others if isinstance(m, inspect.StructType)})
        else:
            fitting = next((member for member in others if first in _STARTS.get(type(member), b"")), None)
            if fitting is None and len(others) > 1:
                self._misfit(" or ".join(_expected(member, name) for member in others))
            self.value(fitting or others[0], name)

    def _tagged(self, members: dict[str, inspect.StructType]) -> None:
        """An object whose tag says which of several it is; the tag is looked for first, wherever it stands."""
        field = next(iter(members.values())).tag_field or "type"
        began, tag = self.at, None
        self.at += 1
        fresh = True
        while (key := self.key(fresh)) is not None:
            fresh = False
            self.colon()
            if key == field:
                self.path.append(f".{field}")
                tag = self._variant(list(members))
                self.path.pop()
            else:
                self.skip()
        if tag is None:
            self.unfit(f"missing field `{field}`")
        self.at = began
        self._struct(members[tag])

    def _struct(self, kind: inspect.StructType) -> None:
        fields = {field.encode_name: field for field in kind.fields}
        self.at += 1
        seen: set[str] = set()
        while (key := self.key(not seen)) is not None:
            if key in seen and key in fields:
                self.peek()
                self.unfit(f"duplicate field `{key}`")
            seen.add(key)
            self.colon()
            self.path.append(f".{key}")
            if key in fields:
                self.value(fields[key].type, key)
            else:
                self.skip()
            self.path.pop()
        for name, field in fields.items():
            if field.required and name not in seen:
                self.unfit(f"missing field `{name}`")

    def _list(self, kind: inspect.Type, name: str) -> None:
        self.at += 1
        count = 0
        while self.element(count == 0):
            self.path.append(f"[{count}]")
            self.value(kind, name)
            self.path.pop()
            count += 1

    def _typed_number(self, kind: inspect.Type, name: str) -> None:
        number = self.number()
        if isinstance(kind, inspect.FloatType):
            return
        integer = INTEGERS.get(name, "u32")
        if isinstance(number, float):
            self.unfit(f"invalid type: floating point `{_decimal(number)}`, expected {integer}")
        low, high = RANGES[integer]
        if not low <= number <= high:
            self.unfit(f"invalid value: integer `{number}`, expected {integer}")

    def _variant(self, known: list[str]) -> str:
        if self.start() != b'"':
            self._misfit("variant identifier")
        given = self.string()
        if given not in known:
            names = ", ".join(f"`{name}`" for name in known)
            of = "one of " if len(known) > 2 else ""
            self.unfit(f"unknown variant `{given[:MAX_SHOWN]}`, expected {of}{names}")
        return given

    def _misfit(self, expected: str) -> NoReturn:
        """A value of a wrong type. serde_json reads scalars before it complains, and stops before brackets."""
        first = self.start()
        if first in (b"[", b"{"):
            found = "sequence" if first == b"[" else "map"
        else:
            value = self.scalar(first)
            if value is None:
                found = "null"
            elif isinstance(value, bool):
                found = f"boolean `{str(value).lower()}`"
            elif isinstance(value, str):
                found = f"string {json.dumps(value[:MAX_SHOWN], ensure_ascii=False)}"
            else:
                found = f"integer `{value}`" if isinstance(value, int) else f"floating point `{_decimal(value)}`"
        self.unfit(f"invalid type: {found}, expected {expected}")


_STARTS: dict[type, bytes] = {
    inspect.StrType: b'"',
    inspect.LiteralType: b'"',
    inspect.BoolType: b"tf",
    inspect.IntType: b"-0123456789",
    inspect.FloatType: b"-0123456789",
    inspect.ListType: b"[",
    inspect.StructType: b"{",
    inspect.DictType: b"{",
    inspect.AnyType: b'"tfn-0123456789[{',
}


def _expected(kind: inspect.Type, name: str) -> str:
    match kind:
        case inspect.StructType():
            return f"struct {kind.cls.__name__}"
        case inspect.IntType():
            return INTEGERS.get(name, "u32")
        case inspect.Metadata():
            return _expected(kind.type, name)
    words: dict[type, str] = {
        inspect.StrType: "a string",
        inspect.LiteralType: "a string",
        inspect.BoolType: "a boolean",
        inspect.FloatType: "f32",
        inspect.ListType: "a sequence",
        inspect.DictType: "a map",
        inspect.NoneType: "null",
    }
    return words.get(type(kind), "another type")


def _decimal(number: float) -> str:
    """A float as Rust prints it: never with an exponent, always with a point."""
    text = format(Decimal(repr(number)), "f")
    return text if "." in text else f"{text}.0"
