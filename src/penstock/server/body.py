"""JSON bodies into typed structs, with the errors in serde's words, which clients of TGI know."""

from __future__ import annotations

import json
import re
from typing import Any, TypeVar

import msgspec

from penstock.server.refusal import Refusal

Body = TypeVar("Body")

_DECODERS: dict[type, tuple[msgspec.json.Decoder[Any], frozenset[str]]] = {}  # with the names of the fields
_EXPECTED = re.compile(r"Expected `(?P<expected>[^`]+)`, got `(?P<got>[^`]+)`(?: - at `(?P<path>[^`]+)`)?")
_MISSING = re.compile(r"Object missing required field `(?P<field>[^`]+)`(?: - at `(?P<path>[^`]+)`)?")
_VARIANT = re.compile(r"Invalid value '(?P<value>.*)' - at `(?P<path>[^`]+)`", re.DOTALL)
_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+|\.\.\.)\]")
_SPACE = " \t\r\n"
LF = b"\n"
_DECODER = json.JSONDecoder()

# What serde calls the types of our fields, where msgspec's name does not tell.
SERDE_TYPES = {
    "best_of": "usize",
    "truncate": "usize",
    "max_new_tokens": "u32",
    "top_n_tokens": "u32",
    "top_k": "i32",
    "seed": "u64",
    "max_tokens": "u32",
    "max_completion_tokens": "u32",
}
RANGES = {"u32": (0, 2**32 - 1), "i32": (-(2**31), 2**31 - 1), "u64": (0, 2**64 - 1), "usize": (0, 2**64 - 1)}
_KINDS = {"str": "a string", "bool": "a boolean", "float": "f32", "array": "a sequence", "int": "u32"}


def parse(raw: bytes, kind: type[Body]) -> Body:
    """The body as a struct. Raises Refusal: 400 where it is not JSON, 422 where it does not fit."""
    if kind not in _DECODERS:
        _DECODERS[kind] = msgspec.json.Decoder(kind), _field_names(kind)
    decoder, names = _DECODERS[kind]
    try:
        value: Body = decoder.decode(raw)
    except msgspec.ValidationError as error:
        raise _misfit(raw, str(error), kind) from None
    except RecursionError:
        raise _syntax("recursion limit exceeded", raw, 0) from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise _malformed(raw) from None
    _check_duplicates(raw, names)
    return value


def check_range(name: str, value: int | None, path: str, raw: bytes) -> None:
    """Integers are unbounded in JSON and not in TGI. Raises Refusal 422."""
    if value is None:
        return
    kind = SERDE_TYPES[name]
    low, high = RANGES[kind]
    if low <= value <= high:
        return
    if -(2**63) <= value < 2**64:
        raise _unfit(raw, path, f"invalid value: integer `{value}`, expected {kind}")
    try:
        shown = repr(float(value))  # serde reads larger integers as floats
    except OverflowError:
        raise _syntax("number out of range", raw, len(raw)) from None
    raise _unfit(raw, path, f"invalid type: floating point `{shown}`, expected {kind}")


def _field_names(kind: type) -> frozenset[str]:
    """The fields of a body and of its `parameters`."""
    names: set[str] = set()
    for field in msgspec.structs.fields(kind):
        names.add(field.name)
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            names |= _field_names(field.type)
    return frozenset(names)


def _check_duplicates(raw: bytes, names: frozenset[str]) -> None:
    """serde refuses a field that is given twice; our decoder takes the last.

    Looks closer only where it must.
    """
    if not any(raw.count(b'"%b"' % name.encode()) > 1 for name in names):
        return

    def pairs(found: list[tuple[str, Any]]) -> None:
        seen: set[str] = set()
        for name, _ in found:
            if name in seen and name in names:
                raise _unfit(raw, "$", f"duplicate field `{name}`")
            seen.add(name)

    try:
        json.loads(raw, object_pairs_hook=pairs)
    except (ValueError, RecursionError):
        return  # it was decoded once, so only something deep inside an unknown field can be at fault


def _malformed(raw: bytes) -> Refusal:
    if not raw.strip():
        return _syntax("EOF while parsing a value", raw, len(raw))
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        return _syntax("invalid unicode code point", raw, error.start + 1)
    try:
        json.loads(text, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        end = error.pos >= len(text.rstrip())
        return _syntax("EOF while parsing a value" if end else "expected value", raw, error.pos + (not end))
    except (ValueError, RecursionError):
        pass
    return _syntax("expected value", raw, 1)


def _no_constant(name: str) -> None:
    raise ValueError(name)


def _syntax(message: str, raw: bytes, offset: int) -> Refusal:
    place = _place(raw, offset)
    return Refusal(400, f"Failed to parse the request body as JSON: {message} at {place}", plain=True)


def _misfit(raw: bytes, error: str, kind: type) -> Refusal:
    missing = _MISSING.match(error)
    if missing:
        return _unfit(raw, missing["path"] or "$", f"missing field `{missing['field']}`")
    variant = _VARIANT.match(error)
    if variant:
        return _unfit(raw, variant["path"], f"unknown variant `{variant['value'][:200]}`")
    expected = _EXPECTED.match(error)
    if expected is None:
        return _unfit(raw, "$", "invalid value")
    path = _steps(expected["path"])
    wanted = [part.strip() for part in expected["expected"].split("|")]
    name = path[-1] if path and isinstance(path[-1], str) else ""
    base = next((part for part in wanted if part != "null"), "null")
    if name in SERDE_TYPES and base == "int":
        wanted_text = SERDE_TYPES[name]
    elif base == "object":
        wanted_text = f"struct {kind.__name__ if not path else name.title().replace('_', '')}"
    else:
        wanted_text = _KINDS.get(base, base)
    found = _locate(raw, path)
    return _unfit(raw, expected["path"] or "$", f"{_found(expected['got'], found)}, expected {wanted_text}")


def _found(got: str, located: tuple[Any, int] | None) -> str:
    """The value that does not fit, as serde shows it."""
    if got in ("null", "array", "object"):
        return "invalid type: " + {"null": "null", "array": "sequence", "object": "map"}[got]
    value = located[0] if located is not None else None
    if isinstance(value, bool):
        return f"invalid type: boolean `{str(value).lower()}`"
    if isinstance(value, int):
        return f"invalid type: integer `{value}`"
    if isinstance(value, float):
        return f"invalid type: floating point `{value}`"
    if isinstance(value, str):
        return f"invalid type: string {json.dumps(value[:200], ensure_ascii=False)}"
    return f"invalid type: {got}"


def _unfit(raw: bytes, path: str, message: str) -> Refusal:
    steps = _steps(path)
    dotted = "".join(f"[{s}]" if isinstance(s, int) else f".{s}" for s in steps).removeprefix(".")
    prefix = f"{dotted}: " if dotted else ""
    located = _locate(raw, steps)
    place = _place(raw, located[1] if located is not None else len(raw))
    text = f"Failed to deserialize the JSON body into the target type: {prefix}{message} at {place}"
    return Refusal(422, text, plain=True, param=dotted or None)


def _steps(path: str | None) -> list[str | int]:
    """`$.messages[0].role` as its steps."""
    return [name if name else (int(index) if index.isdigit() else 0) for name, index in _STEP.findall(path or "$")]


def _place(raw: bytes, offset: int) -> str:
    before = raw[:offset]
    column = offset - (before.rfind(b"\n") + 1)
    return f"line {before.count(LF) + 1} column {column}"


def _locate(raw: bytes, steps: list[str | int]) -> tuple[Any, int] | None:
    """(the value at a path, the offset after it), None where the text is not JSON up to there."""
    try:
        text = raw.decode()
        value, end = _walk(text, _skip(text, 0), steps)
        return value, len(text[:end].encode())
    except (ValueError, IndexError, RecursionError):
        return None


def _walk(text: str, at: int, steps: list[str | int]) -> tuple[Any, int]:
    if not steps:
        return _DECODER.raw_decode(text, at)
    index = 0
    at = _skip(text, at + 1)  # past the bracket
    while text[at] not in "]}":
        key: str | int = index
        if isinstance(steps[0], str):
            key, at = _DECODER.raw_decode(text, at)
            at = _skip(text, _skip(text, at) + 1)  # past the colon
        if key == steps[0]:
            return _walk(text, at, steps[1:])
        _, at = _DECODER.raw_decode(text, at)
        at = _skip(text, at)
        if text[at] == ",":
            at = _skip(text, at + 1)
        index += 1
    raise ValueError("no such path")


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in _SPACE:
        at += 1
    return at
