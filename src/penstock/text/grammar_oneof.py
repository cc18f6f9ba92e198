"""Whether the options of a `oneOf` exclude each other, so that any of them is exactly one of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

Resolve = Callable[[str], Any]  # what a reference points to

MAX_OPTIONS = 64
_MAX_HOPS = 16


def all_disjoint(options: list[Any], resolve: Resolve) -> bool:
    """Whether no value can match two of the options, as far as types, constants and required keys tell."""
    if len(options) > MAX_OPTIONS:
        return False
    targets = [_target(option, resolve) for option in options]
    return all(_disjoint(a, b, resolve) for a, b in itertools.combinations(targets, 2))


def _target(schema: Any, resolve: Resolve) -> dict[str, Any]:
    """A schema behind its references; {} where nothing is known of it."""
    for _ in range(_MAX_HOPS):
        if not isinstance(schema, dict):
            return {}
        if set(schema) - {"title", "description", "default"} != {"$ref"}:
            return schema
        schema = resolve(schema["$ref"])
    return {}


def _disjoint(a: dict[str, Any], b: dict[str, Any], resolve: Resolve) -> bool:
    kinds_a, kinds_b = _kinds(a), _kinds(b)
    if kinds_a is not None and kinds_b is not None and not kinds_a & kinds_b:
        return True
    values_a, values_b = _values(a), _values(b)
    if values_a is not None and values_b is not None and not values_a & values_b:
        return True
    if kinds_a != {"object"} or kinds_b != {"object"}:
        return False
    for one, other in ((a, b), (b, a)):
        known = _properties(other)
        closed = other.get("additionalProperties") is False and not other.get("patternProperties")
        if closed and any(name not in known for name in _required(one)):
            return True
    for name in set(_required(a)) & set(_required(b)):
        inner_a = _target(_properties(a).get(name), resolve)
        inner_b = _target(_properties(b).get(name), resolve)
        values_a, values_b = _values(inner_a), _values(inner_b)
        if values_a is not None and values_b is not None and not values_a & values_b:
            return True
    return False


def _kinds(schema: dict[str, Any]) -> set[str] | None:
    """The types that a schema allows, integers counted as numbers; None for any."""
    named = schema.get("type")
    if named is None:
        return None
    return {"number" if name == "integer" else name for name in (named if isinstance(named, list) else [named])}


def _values(schema: dict[str, Any]) -> set[str] | None:
    """The values that a schema lists, each as a text; None where it lists none."""
    if "const" in schema:
        return {_spell(schema["const"])}
    values = schema.get("enum")
    return {_spell(value) for value in values} if isinstance(values, list) else None


def _spell(value: Any) -> str:
    """Equal for values that JSON Schema holds equal: 1 and 1.0, but not 1 and true."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"number {float(value)!r}" if abs(value) < 2**53 else "number, large"
    if isinstance(value, list | dict):
        return "structure"  # never told apart
    return f"{type(value).__name__} {value!r}"


def _properties(schema: dict[str, Any]) -> dict[str, Any]:
    properties = schema.get("properties")
    return properties if isinstance(properties, dict) else {}


def _required(schema: dict[str, Any]) -> list[str]:
    required = schema.get("required")
    return [name for name in required if isinstance(name, str)] if isinstance(required, list) else []
