"""`grammar` of the native API: TGI's checks, and what they become for the engine."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from penstock.server.config import ServeConfig
from penstock.server.native import wire
from penstock.server.refusal import invalid
from penstock.server.serde import judge
from penstock.text.grammar import GrammarSpec

_OF_NAMES, _OF_LISTS = ("properties", "$defs", "definitions"), ("anyOf", "oneOf", "prefixItems")


def grammar_of(asked: wire.Grammar, config: ServeConfig) -> GrammarSpec:
    """Rule 18: what the output must match. Raises Refusal 422."""
    if config.disable_grammar_support:
        raise invalid("grammar is not supported")
    if isinstance(asked, wire.RegexGrammar):
        return GrammarSpec("regex", asked.value)
    schema = asked.value.schema if isinstance(asked, wire.JsonSchemaGrammar) else asked.value
    if isinstance(schema, str) and isinstance(asked, wire.JsonGrammar):
        schema = schema_of_text(schema)
    if not isinstance(schema, dict | bool):
        shown = json.dumps(schema, ensure_ascii=False)[:200]
        raise invalid(f'grammar is not valid: {shown} is not of types "boolean", "object"')
    if isinstance(schema, bool) or "properties" not in schema:
        raise invalid("grammar is not valid: Grammar must have a 'properties' field")
    return GrammarSpec("json_schema", closed(schema))


def closed(schema: Any) -> Any:
    """The schema as TGI reads it: what has `properties` is an object, and has no others unless the schema says so."""
    if not isinstance(schema, dict):
        return schema
    found = dict(schema)
    for key in _OF_NAMES:
        if isinstance(found.get(key), dict):
            found[key] = {name: closed(inner) for name, inner in found[key].items()}
    for key in _OF_LISTS:
        if isinstance(found.get(key), list):
            found[key] = [closed(inner) for inner in found[key]]
    if "items" in found:
        found["items"] = closed(found["items"])
    if isinstance(found.get("properties"), dict):
        found = {"type": "object", "additionalProperties": False, **found}
    return found


def schema_of_text(text: str) -> Any:
    """A schema that came as text. Raises Refusal 422."""
    raw = text.encode("utf-8", "replace")
    try:
        return msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError):
        found = judge(raw, Any)
        raise invalid(f"grammar is not valid: {found or 'recursion limit exceeded'}") from None
