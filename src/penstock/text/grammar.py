"""What an output must match: the kinds of grammar that can be asked for, and their form for llguidance.

Everything here is bounded work on text. Whether llguidance can follow the result is tried out elsewhere: in the forge
(`engine/forge.py`) for strangers, in the engine itself for the person at the keyboard.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from penstock.errors import InvalidRequest
from penstock.text.grammar_schema import SchemaFault, first_pointer, prepare

Kind = Literal["json_schema", "json_object", "regex", "lark", "choice"]

MAX_SOURCE = 2**16  # bytes of a schema, a Lark grammar or a list of choices
MAX_REGEX = 4096  # characters
MAX_CHOICES = 1024
# As TGI: a single space where JSON allows whitespace, so that a model cannot go on with blanks for ever. No \uXXXX
# escapes, which could spell a known key differently.
_JSON_OPTIONS = {"whitespace_pattern": " ", "json_allowed_escapes": 'nrbtf\\"'}
_INVALID = "grammar is not valid: "
_OVERLAP = (
    "it is not certain that the options exclude each other; use `anyOf`, or a required key with a `const` in each"
)
# How llguidance's words point at a keyword of the schema, the telling ones first.
_HINTS = (
    ("oneOf", "oneOf"),
    ("min/maxProperties", "maxProperties"),
    ("patternProperty", "patternProperties"),
    ("required property", "required"),
    ("regex", "pattern"),
    ("range", "minimum"),
    ("minItems", "minItems"),
    ("minLength", "minLength"),
    ("minimum", "minimum"),
    ("Minimum", "exclusiveMinimum"),
    ("anyOf", "anyOf"),
    ("incompatible types", "allOf"),
    ("NoExtension", "$ref"),
)


class GrammarSpec(msgspec.Struct, frozen=True):
    """What the output must match, whole.

    value, by kind: json_schema: the schema, as a JSON value or as JSON text. json_object: not looked at. regex: the
    pattern. lark: a grammar in llguidance's dialect of Lark. choice: the list of strings of which the output is one.
    """

    kind: Kind
    value: Any = None


class GrammarRefused(InvalidRequest):
    """A grammar that will not be used; the text is for the client.

    pointer: JSON pointer of the fault in a schema. lasting: whether the same grammar would be refused again.
    """

    def __init__(self, what: str, pointer: str | None = None, lasting: bool = True) -> None:
        super().__init__(what)
        self.pointer, self.lasting = pointer, lasting


def source_of(spec: GrammarSpec) -> str:
    """The grammar as llguidance reads it. Raises GrammarRefused for what is too large, malformed, or unsupported."""
    if spec.kind == "json_schema":
        return _of_schema(_schema(spec.value))
    if spec.kind == "json_object":
        return _of_schema({"type": "object"})
    if spec.kind == "choice":
        return _of_choice(spec.value)
    if not isinstance(spec.value, str) or not spec.value:
        raise GrammarRefused(f"grammar is not valid: a {spec.kind} is a text that is not empty")
    if spec.kind == "lark":
        if len(spec.value.encode("utf-8", "surrogatepass")) > MAX_SOURCE:
            raise GrammarRefused(f"grammar is not valid: it must have at most {MAX_SOURCE} bytes")
        return _wrap({"lark_grammar": spec.value})
    if len(spec.value) > MAX_REGEX:
        raise GrammarRefused(f"grammar is not valid: a regex must have at most {MAX_REGEX} characters")
    return _wrap({"lark_grammar": f"start: /{_for_lark(spec.value)}/"})


def blame(spec: GrammarSpec, error: str) -> GrammarRefused:
    """llguidance's complaint about a grammar in words for its author; for a schema, with the keyword and its place."""
    if spec.kind != "json_schema":
        return GrammarRefused(error)
    schema = _schema(spec.value)
    for hint, keyword in _HINTS:
        pointer = first_pointer(schema, keyword) if hint in error else None
        if pointer is not None:
            why = _OVERLAP if keyword == "oneOf" else error.removeprefix(_INVALID)
            return GrammarRefused(f"{_INVALID}`{keyword}` at {pointer}: {why}", pointer)
    return GrammarRefused(error)


def _schema(value: Any) -> Any:
    """A schema as a JSON value of our own. Raises GrammarRefused."""
    try:
        text = value if isinstance(value, str) else msgspec.json.encode(value)
        if len(text) > MAX_SOURCE:
            raise GrammarRefused(f"grammar is not valid: a schema must have at most {MAX_SOURCE} bytes")
        schema = msgspec.json.decode(text)
    except (msgspec.MsgspecError, TypeError, ValueError) as error:
        raise GrammarRefused(f"grammar is not valid: the schema is not JSON ({str(error)[:100]})") from None
    except RecursionError:
        raise GrammarRefused("grammar is not valid: the schema is nested too deeply") from None
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        raise GrammarRefused("grammar is not valid: a schema is a JSON object", "")
    return schema


def _of_schema(schema: dict[str, Any]) -> str:
    try:
        prepared = prepare(schema)
    except SchemaFault as fault:
        place = fault.pointer or "the top"
        raise GrammarRefused(
            f"grammar is not valid: `{fault.keyword}` at {place}: {fault.why}", fault.pointer
        ) from None
    return _wrap({"json_schema": {**prepared, "x-guidance": _JSON_OPTIONS}})


def _of_choice(value: Any) -> str:
    if not isinstance(value, list | tuple) or not value or not all(isinstance(s, str) and s for s in value):
        raise GrammarRefused("grammar is not valid: a choice is a list of strings that are not empty")
    if len(value) > MAX_CHOICES or sum(map(len, value)) > MAX_SOURCE:
        raise GrammarRefused(
            f"grammar is not valid: a choice has at most {MAX_CHOICES} strings, {MAX_SOURCE} characters"
        )
    literals = [msgspec.json.encode(s).decode() for s in dict.fromkeys(value)]
    return _wrap({"lark_grammar": "start: " + " | ".join(literals)})


def _for_lark(regex: str) -> str:
    """A regex as it stands between two slashes."""
    out, escaped = [], False
    for c in regex:
        if c == "/" and not escaped:
            out.append("\\/")
        elif c == "\n":
            out.append("n" if escaped else "\\n")
        else:
            out.append(c)
        escaped = c == "\\" and not escaped
    return "".join(out)


def _wrap(grammar: dict[str, Any]) -> str:
    try:
        return msgspec.json.encode({"grammars": [grammar]}).decode()
    except UnicodeEncodeError:
        raise GrammarRefused("grammar is not valid: it holds half of a character") from None
