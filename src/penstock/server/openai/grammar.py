"""The many spellings of "the output must match": OpenAI's, TGI's, huggingface_hub's and vLLM's, as one GrammarSpec."""

from __future__ import annotations

from typing import Any

from penstock.engine.request import Grammar
from penstock.server.house import House
from penstock.server.native.grammar import closed, schema_of_text
from penstock.server.openai.fields import unsupported
from penstock.server.openai.wire import Sampled
from penstock.server.refusal import invalid
from penstock.text.grammar import GrammarRefused, GrammarSpec, Kind

_GUIDED: dict[str, Kind] = {
    "guided_json": "json_schema",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "lark",
}
_STRUCTURED: dict[str, Kind] = {
    "json": "json_schema",
    "regex": "regex",
    "choice": "choice",
    "grammar": "lark",
    "json_object": "json_object",
}
# Settings of vLLM's that say how to match, never what.
_STRUCTURED_HOW = ("backend", "disable_fallback", "disable_any_whitespace", "disable_additional_properties")
_TGI: dict[str, Kind] = {"json": "json_schema", "json_object": "json_schema", "regex": "regex", "lark": "lark"}


def wanted(body: Sampled) -> tuple[str, GrammarSpec] | None:
    """The one grammar of a request with the field that asks for it. Raises Refusal 422 where there are several."""
    found: list[tuple[str, GrammarSpec]] = []
    for name, kind in _GUIDED.items():
        value = getattr(body, name)
        if value is not None:
            found.append((name, GrammarSpec(kind, value)))
    if body.structured_outputs:
        found.append(("structured_outputs", _structured(body.structured_outputs)))
    if isinstance(body.grammar, str):
        found.append(("grammar", GrammarSpec("lark", body.grammar)))
    elif body.grammar is not None:
        found += _named("grammar", _format(body.grammar, "grammar"))
    if body.response_format is not None:
        found += _named("response_format", _format(body.response_format, "response_format"))
    if len(found) > 1:
        names = " and ".join(f"`{name}`" for name, _ in found)
        raise invalid(f"{names} contradict each other: give one", found[1][0])
    return found[0] if found else None


async def compiled(house: House, who: str, field: str, spec: GrammarSpec) -> Grammar:
    """The engine's form of a grammar; who: stands for the API key.

    Raises Refusal 422, which tells where in a schema the fault is.
    """
    if house.config.disable_grammar_support:
        raise invalid("grammar is not supported", field)
    try:
        return await house.grammars.compile_grammar(spec, who)
    except GrammarRefused as refused:
        raise invalid(refused.what, field) from None


def _named(name: str, spec: GrammarSpec | None) -> list[tuple[str, GrammarSpec]]:
    return [] if spec is None else [(name, spec)]


def _structured(given: dict[str, Any]) -> GrammarSpec:
    """vLLM's `structured_outputs`: an object with one of these keys."""
    found = [(key, value) for key, value in given.items() if value is not None and value is not False]
    found = [(key, value) for key, value in found if key not in _STRUCTURED_HOW]
    if len(found) != 1:
        raise invalid("`structured_outputs` needs exactly one of: " + ", ".join(_STRUCTURED), "structured_outputs")
    key, value = found[0]
    if key not in _STRUCTURED:
        raise unsupported(f"structured_outputs.{key}", param="structured_outputs")
    return GrammarSpec(_STRUCTURED[key], None if key == "json_object" else value)


def _format(given: Any, field: str) -> GrammarSpec | None:
    """`response_format` and TGI's `grammar`: a type, and the grammar under a name that differs between clients."""
    kind = given.get("type") if isinstance(given, dict) else None
    if kind == "text":
        return None
    if kind == "json_schema":
        found = _schema(given.get("json_schema", given.get("value")), field)
        return found if "json_schema" in given else _as_tgi(found)
    if kind == "json_object" and given.get("value") is None and given.get("schema") is None:
        return GrammarSpec("json_object")
    if not isinstance(kind, str):
        raise invalid(f"`{field}` must be an object with a `type`", field)
    if kind not in _TGI:
        raise unsupported(f"{field}.type = {kind[:64]}", "text, json_object, json_schema and regex are", field)
    value = given.get("value", given.get("schema"))
    if value is None:
        raise invalid(f"`{field}` of type `{kind}` needs a `value`", field)
    found = GrammarSpec(_TGI[kind], value)
    return _as_tgi(found) if "value" in given else found


def _as_tgi(spec: GrammarSpec) -> GrammarSpec:
    """Schemas in TGI's spelling often leave out that they are of an object."""
    if spec.kind != "json_schema":
        return spec
    schema = schema_of_text(spec.value) if isinstance(spec.value, str) else spec.value
    return GrammarSpec(spec.kind, closed(schema))


def _schema(given: Any, field: str) -> GrammarSpec:
    """OpenAI's and TGI's json_schema: the schema under `schema` beside its name. OpenAI lets it be left out."""
    if not isinstance(given, dict):
        raise invalid(f"`{field}` of type `json_schema` needs a `json_schema` object", field)
    schema = given.get("schema", given if "properties" in given or "$ref" in given else None)
    return GrammarSpec("json_object") if schema is None else GrammarSpec("json_schema", schema)
