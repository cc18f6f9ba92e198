"""JSON bodies into typed structs; what does not fit is refused in serde's words, which clients of TGI know."""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec

from penstock.server.refusal import Refusal
from penstock.server.serde import INTEGERS, RANGES, Complaint, complaint, judge

Body = TypeVar("Body")

_DECODERS: dict[type, tuple[msgspec.json.Decoder[Any], frozenset[bytes]]] = {}  # with the names of the fields, quoted
_ODD_INTEGER = re.compile(rb"\d{20}|-0[^.eE\d]")  # serde reads these as floats
_PATH = re.compile(r" - at `\$\.?(?P<path>[^`]+)`$")


def parse(raw: bytes, kind: type[Body]) -> Body:
    """The body as a struct. Raises Refusal: 400 where it is not JSON, 422 where it does not fit."""
    decoder, names = _decoder(kind)
    try:
        value: Body = decoder.decode(raw)
    except msgspec.ValidationError as error:
        path = _PATH.search(str(error))
        unfit = complaint(raw, "invalid value", len(raw), path["path"] if path else "")
        raise refusal(judge(raw, kind) or unfit) from None
    except RecursionError:
        raise refusal(complaint(raw, "recursion limit exceeded", 0, syntax=True)) from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        found = judge(raw, kind)
        if found is None or not found.syntax:
            found = complaint(raw, "expected value", min(len(raw), 1), syntax=True)
        raise refusal(found) from None
    # What serde refuses and our decoder takes: a field given twice, integers of more than 64 bits, and `-0`.
    if any(raw.count(name) > 1 for name in names) or _ODD_INTEGER.search(raw):
        found = judge(raw, kind)
        if found is not None and found.message.startswith(("duplicate field", "invalid type: floating", "number out")):
            raise refusal(found)
    return value


def check_syntax(raw: bytes) -> None:
    """Raises Refusal 400 for what is not JSON."""
    try:
        msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        parse(raw, _Anything)


class _Anything(msgspec.Struct):
    """Any JSON object."""


def fits(raw: bytes, kind: type[Body]) -> bool:
    """Whether `parse` would take the body."""
    try:
        parse(raw, kind)
    except Refusal:
        return False
    return True


def refusal(found: Complaint) -> Refusal:
    """The refusal that tells of a complaint."""
    if found.syntax:
        return Refusal(400, f"Failed to parse the request body as JSON: {found}", plain=True)
    text = f"Failed to deserialize the JSON body into the target type: {found}"
    return Refusal(422, text, plain=True, param=found.path or None)


def check_range(name: str, value: int | None, path: str, raw: bytes) -> None:
    """Integers of a field that is not typed with its bounds. path: `$.name`. Raises Refusal 422."""
    kind = INTEGERS.get(name, "u32")
    low, high = RANGES[kind]
    if value is not None and not low <= value <= high:
        message = f"invalid value: integer `{value}`, expected {kind}"
        raise refusal(complaint(raw, message, len(raw), path.removeprefix("$.")))


def _decoder(kind: type) -> tuple[msgspec.json.Decoder[Any], frozenset[bytes]]:
    if kind not in _DECODERS:
        names = frozenset(b'"%b"' % name.encode() for name in _field_names(kind))
        _DECODERS[kind] = msgspec.json.Decoder(kind), names
    return _DECODERS[kind]


def _field_names(kind: type) -> set[str]:
    """The fields of a body and of the structs right inside it."""
    names: set[str] = set()
    for field in msgspec.structs.fields(kind):
        names.add(field.encode_name)
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            names |= _field_names(field.type)
    return names
