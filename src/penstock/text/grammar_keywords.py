"""What the value of each keyword of a JSON schema may be."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

MAX_LEAST = 10_000  # items or characters that a schema may demand
MAX_MULTIPLE = 20_000  # digits aside; the automaton of a multiple has so many states
_EXACT = 2**53  # bounds beyond are not exact in the numbers that llguidance computes with
MAPS = ("properties", "patternProperties")
LISTS = ("prefixItems", "allOf", "anyOf", "oneOf")
TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")


def _count(value: Any) -> str | None:
    return None if _is_int(value) and 0 <= value < _EXACT else "a count is a whole number, not negative"


def _least(value: Any) -> str | None:
    return _count(value) or (f"at most {MAX_LEAST} can be demanded" if value > MAX_LEAST else None)


def _bound(value: Any) -> str | None:
    if not _is_number(value):
        return "a bound is a number"
    return None if abs(value) <= _EXACT else "bounds beyond 2^53 are not exact"


def _exclusive(value: Any) -> str | None:
    return None if isinstance(value, bool) else _bound(value)  # a boolean in draft 4


def _multiple(value: Any) -> str | None:
    if not _is_number(value) or value <= 0:
        return "a multiple is a number above 0"
    digits = Decimal(str(value)).normalize().as_tuple().digits
    return None if int("".join(map(str, digits))) <= MAX_MULTIPLE else "the multiple has too many digits"


def _pattern(value: Any) -> str | None:
    return None if isinstance(value, str) and len(value) <= 4096 else "a pattern is a text of at most 4096 characters"


def _names(value: Any) -> str | None:
    return None if isinstance(value, list) and all(isinstance(v, str) for v in value) else "a list of names is expected"


def _type(value: Any) -> str | None:
    named = value if isinstance(value, list) else [value]
    return None if named and all(name in TYPES for name in named) else f"the types are {', '.join(TYPES)}"


def _map(value: Any) -> str | None:
    return None if isinstance(value, dict) else "an object of schemas is expected"


def _list(value: Any) -> str | None:
    return None if isinstance(value, list) and value else "a list of schemas is expected, and not an empty one"


def _values(value: Any) -> str | None:
    return None if isinstance(value, list) and value else "a list of values is expected, and not an empty one"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# keyword -> a function that says what is wrong with a value, or None
CHECKS = {
    "type": _type,
    "enum": _values,
    "required": _names,
    "format": lambda value: None if isinstance(value, str) else "a format is a text",
    "pattern": _pattern,
    "minLength": _least,
    "minItems": _least,
    "minProperties": _least,
    "maxLength": _count,
    "maxItems": _count,
    "maxProperties": _count,
    "minimum": _bound,
    "maximum": _bound,
    "exclusiveMinimum": _exclusive,
    "exclusiveMaximum": _exclusive,
    "multipleOf": _multiple,
    **dict.fromkeys(MAPS, _map),
    **dict.fromkeys(LISTS, _list),
}
