"""JSON schemas as they are enforced: every keyword is followed, or known to say nothing, or refused by its place.

llguidance follows the keywords of `CHECKS` and of references; what it would pass over is refused here, with the JSON
pointer, and what it follows almost is rewritten: dates are real ones, and `oneOf` becomes `anyOf` where its options
exclude each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from penstock.text.grammar_keywords import CHECKS, LISTS, MAPS, TYPES
from penstock.text.grammar_oneof import all_disjoint

MAX_DEPTH = 64
_SINGLE = ("items", "additionalItems", "additionalProperties")
_COMBINING = ("allOf", "anyOf", "oneOf", "$ref")  # about the same value as the schema that they stand in
_OF_OBJECTS = ("properties", "patternProperties", "additionalProperties", "required")
_REFUSED = frozenset(
    [
        "not",
        "if",
        "then",
        "else",
        "contains",
        "minContains",
        "maxContains",
        "propertyNames",
        "dependentRequired",
        "dependentSchemas",
        "dependencies",
        "unevaluatedItems",
        "unevaluatedProperties",
        "$dynamicRef",
        "$dynamicAnchor",
        "$recursiveRef",
        "$recursiveAnchor",
        "$vocabulary",
        "x-guidance",
        "divisibleBy",
        "disallow",
        "extends",
    ]
)
_FORMATS = frozenset(
    ["date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "json-pointer"]
)
_DRAFTS = ("draft-04", "draft-06", "draft-07", "draft/2019-09", "draft/2020-12")

_YEAR = "[1-9][0-9]{3}"
_LEAP_YEAR = "(?:[1-9][0-9](?:0[48]|[2468][048]|[13579][26])|(?:[2468][048]|[13579][26])00)"
_LONG, _SHORT = "(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])", "(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
_DAY = f"(?:{_LONG}|{_SHORT}|02-(?:0[1-9]|1[0-9]|2[0-8]))"
_DATE = f"(?:{_YEAR}-{_DAY}|{_LEAP_YEAR}-02-29)"
_CLOCK = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = f"{_CLOCK}:[0-5][0-9](?:\\.[0-9]{{1,6}})?(?:Z|[+-]{_CLOCK})"
_PATTERNS = {  # formats that llguidance would follow almost, or not at all (RFC 3339, RFC 6901)
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}T{_TIME}$",
    "json-pointer": "^(?:/(?:[^~/]|~[01])*)*$",
}


class SchemaFault(Exception):
    """A keyword that cannot be followed. pointer: where it stands, "" for the top."""

    def __init__(self, keyword: str, pointer: str, why: str) -> None:
        super().__init__(why)
        self.keyword, self.pointer, self.why = keyword, pointer, why


def prepare(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema as llguidance gets it. It is changed in place; only what its root leads to is looked at.

    Raises SchemaFault.
    """
    draft = schema.get("$schema")
    if draft is not None and not (isinstance(draft, str) and any(known in draft for known in _DRAFTS)):
        raise SchemaFault("$schema", "/$schema", "only JSON Schema's drafts 4 to 2020-12 are known")
    walk = _Walk(schema)
    walk.visit(schema, "", 0, alone=True)
    walk.close()
    return schema


def first_pointer(schema: Any, keyword: str) -> str | None:
    """Where a keyword stands first in a schema, in the order of its text; None where it does not."""
    return next((pointer for found, pointer in _keys(schema, "", 0) if found == keyword), None)


class _Walk:
    """One pass over a schema, along its references."""

    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        self._seen: set[tuple[int, bool]] = set()
        self._objects: list[dict[str, Any]] = []  # that name their properties and stand alone somewhere

    def visit(self, schema: Any, pointer: str, depth: int, alone: bool) -> None:
        """Check a schema and what it leads to, rewriting it in place. alone: no other schema is about its value."""
        if isinstance(schema, bool) or (id(schema), alone) in self._seen:
            return
        keyword = pointer.rpartition("/")[2] or "schema"
        if not isinstance(schema, dict):
            raise SchemaFault(keyword, pointer, "a schema is a JSON object or a boolean")
        if depth > MAX_DEPTH:
            raise SchemaFault(keyword, pointer, f"a schema may be nested {MAX_DEPTH} deep")
        self._seen.add((id(schema), alone))
        combined = [key for key in _COMBINING if key in schema]
        if alone and not combined and "properties" in schema:
            self._objects.append(schema)
        alone_within = alone and len(combined) == 1 and not any(key in schema for key in _OF_OBJECTS)
        for key, value in schema.items():
            self._check(key, value, schema, _join(pointer, key))
        for key, value in list(schema.items()):
            self._descend(key, value, _join(pointer, key), depth + 1, alone_within)
        self._rewrite(schema)

    def close(self) -> None:
        """As in TGI, an object that names its properties has no others, unless the schema speaks of them, here or in
        another schema about the same object."""
        for schema in self._objects:
            speaks = "additionalProperties" in schema or "patternProperties" in schema
            named = all(name in schema["properties"] for name in schema.get("required", ()))
            if named and not speaks and (id(schema), False) not in self._seen:
                schema["additionalProperties"] = False

    def _check(self, key: str, value: Any, schema: dict[str, Any], at: str) -> None:
        """The keyword and its value. Raises SchemaFault."""
        if key in _REFUSED or (key == "uniqueItems" and value is not False):
            raise SchemaFault(key, at, "this keyword is not supported")
        if key == "$id" and schema is not self._root:
            raise SchemaFault(key, at, "only the whole schema may have an id")
        if key == "$ref":
            self._follow(schema, at)
        check = CHECKS.get(key)
        why = check(value) if check else None
        if key == "minProperties" and why is None and value > max(1, len(schema.get("required", ()))):
            why = "more than one key can be demanded only by `required`"
        if key == "format" and why is None and "string" in _types(schema) and value not in _FORMATS:
            why = f"the format {str(value)[:40]!r} is not supported; known are {', '.join(sorted(_FORMATS))}"
        if why is not None:
            raise SchemaFault(key, at, why)

    def _descend(self, key: str, value: Any, at: str, depth: int, alone: bool) -> None:
        """alone: of what is about the same value as the schema itself."""
        if key in MAPS:
            for name, inner in value.items():
                self.visit(inner, _join(at, name), depth, alone=True)
        elif key in LISTS or (key == "items" and isinstance(value, list)):
            for i, inner in enumerate(value):
                self.visit(
                    inner, f"{at}/{i}", depth, alone=key in ("items", "prefixItems") or (alone and key != "allOf")
                )
        elif key in _SINGLE:
            self.visit(value, at, depth, alone=True)
        elif key == "$ref":
            self.visit(self.resolve(value), value[1:], depth, alone=alone)

    def _rewrite(self, schema: dict[str, Any]) -> None:
        """What llguidance follows almost becomes what it follows."""
        schema.pop("uniqueItems", None)
        least = schema.get("minProperties")
        if least is not None and least <= len(schema.get("required", ())):
            del schema["minProperties"]
        if "format" in schema and schema["format"] not in _FORMATS:  # of a number: says nothing
            del schema["format"]
        pattern = _PATTERNS.get(schema.get("format", ""))
        if pattern is not None:
            del schema["format"]
            _also(schema, "pattern", pattern)
        if "oneOf" in schema and all_disjoint(schema["oneOf"], self.resolve):
            _also(schema, "anyOf", schema.pop("oneOf"))

    def _follow(self, schema: dict[str, Any], at: str) -> None:
        """A reference must lead somewhere, and not only to references."""
        visited = {id(schema)}
        target: Any = schema
        while isinstance(target, dict) and "$ref" in target:
            reference = target["$ref"]
            if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
                raise SchemaFault("$ref", at, "a reference must lead into this schema: #/...")
            target = self.resolve(reference)
            if target is None:
                raise SchemaFault("$ref", at, f"there is nothing at {reference[:80]}")
            if id(target) in visited:
                raise SchemaFault("$ref", at, "the reference leads back to itself")
            visited.add(id(target))

    def resolve(self, reference: str) -> Any:
        """What `#/...` points to (RFC 6901); None where that is nothing."""
        target: Any = self._root
        for part in reference[1:].split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            if isinstance(target, dict):
                target = target.get(name)
            elif isinstance(target, list) and name.isdecimal() and len(name) < 8 and int(name) < len(target):
                target = target[int(name)]
            else:
                return None
        return target


def _also(schema: dict[str, Any], key: str, value: Any) -> None:
    """Demand one more thing, beside what the same keyword demands already."""
    if key in schema:
        schema["allOf"] = [*schema.get("allOf", []), {key: value}]
    else:
        schema[key] = value


def _types(schema: dict[str, Any]) -> list[Any]:
    """The types that a schema names; all of them where it names none."""
    named = schema.get("type", list(TYPES))
    return named if isinstance(named, list) else [named]


def _join(pointer: str, key: str) -> str:
    return f"{pointer}/{key.replace('~', '~0').replace('/', '~1')}"


def _keys(node: Any, pointer: str, depth: int) -> Iterator[tuple[str, str]]:
    """(key, pointer) of every object below."""
    if depth > 2 * MAX_DEPTH:
        return
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in inner:
        at = _join(pointer, str(key))
        if isinstance(node, dict):
            yield str(key), at
        yield from _keys(value, at, depth + 1)
