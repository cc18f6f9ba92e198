"""300 JSON schemas as people write them: written ones, and ones put together from the parts that they share."""

from __future__ import annotations

import random
from typing import Any

Schema = dict[str, Any]

# fmt: off
WORDS = [
    "name", "title", "status", "kind", "owner", "email", "price", "amount", "currency", "country", "city", "street",
    "tags", "items", "notes", "start", "end", "created", "updated", "score", "level", "color", "size", "weight",
    "height", "width", "depth", "author", "version", "license", "path", "url", "host", "port", "timeout", "retries",
    "enabled", "visible", "archived", "species", "habitat", "latitude", "longitude", "sample", "dose", "unit",
    "result", "page", "rank", "labels", "meta",
]
# fmt: on

TREE: Schema = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "integer", "minimum": 0, "maximum": 99},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
            },
            "required": ["value"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
LINKED: Schema = {
    "type": "object",
    "properties": {"head": {"type": "string", "maxLength": 8}, "tail": {"anyOf": [{"type": "null"}, {"$ref": "#"}]}},
    "required": ["head", "tail"],
    "additionalProperties": False,
}
SHAPES: Schema = {  # a discriminated union, as pydantic writes it
    "$defs": {
        "Circle": {
            "properties": {
                "kind": {"const": "circle", "title": "Kind", "type": "string"},
                "radius": {"type": "number"},
            },
            "required": ["kind", "radius"],
            "title": "Circle",
            "type": "object",
        },
        "Square": {
            "properties": {"kind": {"const": "square", "title": "Kind", "type": "string"}, "side": {"type": "number"}},
            "required": ["kind", "side"],
            "title": "Square",
            "type": "object",
        },
    },
    "properties": {
        "shape": {
            "discriminator": {
                "mapping": {"circle": "#/$defs/Circle", "square": "#/$defs/Square"},
                "propertyName": "kind",
            },
            "oneOf": [{"$ref": "#/$defs/Circle"}, {"$ref": "#/$defs/Square"}],
            "title": "Shape",
        }
    },
    "required": ["shape"],
    "title": "Drawing",
    "type": "object",
}
EXPRESSION: Schema = {
    "definitions": {
        "expression": {
            "oneOf": [
                {"type": "number"},
                {
                    "type": "object",
                    "properties": {
                        "op": {"enum": ["+", "-", "*"]},
                        "left": {"$ref": "#/definitions/expression"},
                        "right": {"$ref": "#/definitions/expression"},
                    },
                    "required": ["op", "left", "right"],
                    "additionalProperties": False,
                },
            ]
        }
    },
    "$schema": "http://json-schema.org/draft-07/schema#",
    "$ref": "#/definitions/expression",
}
WRITTEN: list[Schema] = [
    TREE,
    LINKED,
    SHAPES,
    EXPRESSION,
    {"type": "object"},
    {"type": "array", "items": True, "maxItems": 3},
    {"enum": ["red", "green", 'with "quotes"', "slash/and\\back", "é", "日本", None, True, 3, 2.5, {"a": [1]}]},
    {"const": {"version": 1, "of": ["a", None]}},
    {"type": ["string", "null"], "maxLength": 5},
    {"type": ["integer", "boolean"]},
    {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    {"type": "integer", "minimum": -5, "maximum": 5, "multipleOf": 5},
    {"type": "number", "multipleOf": 0.25, "minimum": 0, "maximum": 10},
    {"type": "integer", "exclusiveMinimum": 10, "exclusiveMaximum": 20},
    {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"},
    {"type": "string", "pattern": "ab+c", "maxLength": 12},
    {"type": "string", "pattern": "^\\d{3}\\s\\w+$", "maxLength": 10},
    {"type": "string", "minLength": 2, "maxLength": 4},
    {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string", "maxLength": 3}], "items": False},
    {"type": "array", "prefixItems": [{"type": "boolean"}], "items": {"type": "null"}, "minItems": 2, "maxItems": 4},
    {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "array",
        "items": [{"type": "integer"}, {"type": "boolean"}],
        "additionalItems": False,
    },
    {"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 3},
    {"type": "object", "additionalProperties": {"type": "boolean"}, "minProperties": 1},
    {"type": "object", "patternProperties": {"^x_[a-z]$": {"type": "integer"}}, "additionalProperties": False},
    {"type": "object", "properties": {"a": {}, "b": False}, "required": ["a"], "additionalProperties": False},
    {"type": "object", "required": ["free"], "additionalProperties": {"type": "string", "maxLength": 3}},
    {
        "allOf": [
            {"type": "object", "properties": {"id": {"type": "integer"}}, "required": ["id"]},
            {"properties": {"label": {"type": "string", "maxLength": 6}}, "required": ["label"]},
        ]
    },
    {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
        "additionalProperties": False,
    },
    {"oneOf": [{"type": "integer"}, {"type": "string", "maxLength": 2}, {"type": "null"}]},
    {"oneOf": [{"const": "a"}, {"const": "b"}, {"enum": ["c", "d"]}]},
    {
        "oneOf": [
            {
                "type": "object",
                "properties": {"x": {"type": "integer"}},
                "required": ["x"],
                "additionalProperties": False,
            },
            {
                "type": "object",
                "properties": {"y": {"type": "integer"}},
                "required": ["y"],
                "additionalProperties": False,
            },
        ]
    },
    {"type": "object", "properties": {"a": {"$ref": "#/properties/b"}, "b": {"type": "string", "maxLength": 2}}},
    {"type": "object", "properties": {'we"ird/~ key\n': {"type": "null"}}, "required": ['we"ird/~ key\n']},
    {"type": "integer", "format": "int32", "minimum": 0, "nullable": True, "x-order": 3},
    {"type": "array", "items": {"type": "integer"}, "uniqueItems": False, "maxItems": 2},
    *({"type": "string", "format": name} for name in ("date", "time", "date-time", "uuid", "ipv4", "ipv6")),
    *({"type": "string", "format": name} for name in ("duration", "email", "hostname", "uri", "json-pointer")),
]

# What is not supported, and the place that a refusal must name.
UNSUPPORTED: list[tuple[Schema, str]] = [
    ({"not": {"type": "string"}}, "/not"),
    ({"type": "object", "properties": {"a": {"if": {"const": 1}}}}, "/properties/a/if"),
    ({"type": "integer", "then": {"const": 1}}, "/then"),
    ({"type": "array", "contains": {"const": 1}}, "/contains"),
    ({"type": "array", "minContains": 1}, "/minContains"),
    ({"type": "array", "items": {"type": "array", "uniqueItems": True}}, "/items/uniqueItems"),
    ({"type": "object", "propertyNames": {"pattern": "^a"}}, "/propertyNames"),
    ({"type": "object", "dependentRequired": {"a": ["b"]}}, "/dependentRequired"),
    ({"type": "object", "dependentSchemas": {}}, "/dependentSchemas"),
    ({"type": "object", "dependencies": {"a": ["b"]}}, "/dependencies"),
    ({"type": "object", "unevaluatedProperties": False}, "/unevaluatedProperties"),
    ({"type": "array", "unevaluatedItems": False}, "/unevaluatedItems"),
    ({"anyOf": [{"type": "null"}, {"$dynamicRef": "#x"}]}, "/anyOf/1/$dynamicRef"),
    ({"$recursiveRef": "#"}, "/$recursiveRef"),
    ({"$ref": "https://example.org/schema"}, "/$ref"),
    ({"$ref": "#/$defs/missing"}, "/$ref"),
    ({"$ref": "#anchor", "$defs": {"a": {"$anchor": "anchor"}}}, "/$ref"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, "/$ref"),
    ({"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"not": {}}}}, "/$defs/a~1b/not"),
    ({"properties": {"a": {"$id": "https://example.org/a"}}}, "/properties/a/$id"),
    ({"x-guidance": {"lenient": True}}, "/x-guidance"),
    ({"type": "string", "format": "regex"}, "/format"),
    ({"items": {"format": "unknown"}}, "/items/format"),
    ({"type": "object", "minProperties": 2}, "/minProperties"),
    ({"type": "array", "minItems": 10**9}, "/minItems"),
    ({"type": "string", "minLength": 10**6}, "/minLength"),
    ({"type": "string", "minLength": -1}, "/minLength"),
    ({"type": "integer", "multipleOf": 1234567}, "/multipleOf"),
    ({"type": "integer", "multipleOf": 0}, "/multipleOf"),
    ({"type": "integer", "minimum": 10**20}, "/minimum"),
    ({"type": "integer", "maximum": "5"}, "/maximum"),
    ({"type": "text"}, "/type"),
    ({"enum": []}, "/enum"),
    ({"required": "a"}, "/required"),
    ({"properties": []}, "/properties"),
    ({"anyOf": []}, "/anyOf"),
    ({"items": 5}, "/items"),
    ({"divisibleBy": 2}, "/divisibleBy"),
    ({"extends": {"type": "string"}}, "/extends"),
    ({"$schema": "http://example.org/mine", "type": "string"}, "/$schema"),
    ({"type": "string", "pattern": "(?!a)b"}, "/pattern"),
    ({"type": "string", "pattern": "(a)\\1"}, "/pattern"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "/oneOf"),
    ({"properties": {"a": {"oneOf": [{"required": ["a"]}, {"required": ["b"]}]}}}, "/properties/a/oneOf"),
    ({"patternProperties": {"^a": {"type": "integer"}, "b$": {"type": "string"}}}, "/patternProperties"),
    ({"type": "object", "properties": {"a": {}, "b": {}, "c": {}}, "maxProperties": 2}, "/maxProperties"),
    ({"type": "array", "minItems": 3, "maxItems": 1}, "/minItems"),
]


def supported(n: int = 300) -> list[Schema]:
    """The written schemas and generated ones, n in all, each different."""
    made = [_document(random.Random(seed)) for seed in range(n - len(WRITTEN))]
    return WRITTEN + made


def _document(rng: random.Random) -> Schema:
    """An object with definitions, of two or three levels."""
    shared = {name.title(): _object(rng, 1, []) for name in rng.sample(WORDS, 2)}
    schema = _object(rng, 2, list(shared))
    schema["$defs"] = shared
    if rng.random() < 0.5:
        schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"], schema["description"] = "Record", "made for a test"
    return schema


def _object(rng: random.Random, depth: int, shared: list[str]) -> Schema:
    names = rng.sample(WORDS, rng.randint(1, 5))
    schema: Schema = {"type": "object", "properties": {name: _value(rng, depth, shared) for name in names}}
    schema["required"] = rng.sample(names, rng.randint(0, len(names)))
    if rng.random() < 0.7:
        schema["additionalProperties"] = False
    elif rng.random() < 0.5:
        schema["additionalProperties"] = {"type": rng.choice(["integer", "boolean", "null"])}
    return schema


def _value(rng: random.Random, depth: int, shared: list[str]) -> Schema:
    kinds = ["string", "enum", "integer", "number", "boolean", "format", "pattern", "const", "nullable"]
    if depth > 0:
        kinds += ["object", "array", "tuple", "map", "anyOf", "oneOf", "allOf"]
        kinds += ["ref", "ref"] if shared else []
    kind = rng.choice(kinds)
    if kind == "object":
        return _object(rng, depth - 1, shared)
    if kind == "array":
        low = rng.randint(0, 2)
        return {"type": "array", "items": _value(rng, depth - 1, shared), "minItems": low, "maxItems": low + 2}
    if kind == "tuple":
        return {"type": "array", "prefixItems": [_value(rng, 0, []), _value(rng, 0, [])], "items": False}
    if kind == "map":
        return {"type": "object", "additionalProperties": _value(rng, 0, []), "maxProperties": 2}
    if kind == "anyOf":
        return {"anyOf": [_value(rng, 0, []), _value(rng, 0, [])]}
    if kind == "oneOf":
        tags = rng.sample(WORDS, 2)
        return {"oneOf": [_tagged(rng, tag) for tag in tags]}
    if kind == "allOf":
        return {"allOf": [{"type": "integer", "minimum": rng.randint(0, 5)}, {"maximum": rng.randint(5, 50)}]}
    if kind == "ref":
        return {"$ref": f"#/$defs/{rng.choice(shared)}"}
    return _scalar(rng, kind)


def _tagged(rng: random.Random, tag: str) -> Schema:
    schema = _object(rng, 0, [])
    schema["properties"] = {"tag": {"const": tag}, **schema["properties"]}
    schema["required"].append("tag")
    return schema


def _scalar(rng: random.Random, kind: str) -> Schema:
    low = rng.randint(-100, 100)
    bounds = {"minimum": low, "maximum": low + rng.randint(1, 1000)}
    if kind == "integer":
        return {"type": "integer", **(bounds if rng.random() < 0.7 else {})}
    if kind == "number":
        return {"type": "number", **(bounds if rng.random() < 0.7 else {})}
    if kind == "enum":
        return {"type": "string", "enum": rng.sample(WORDS, rng.randint(1, 6))}
    if kind == "const":
        return {"const": rng.choice(["fixed", 7, True, None, "a b"])}
    if kind == "format":
        return {"type": "string", "format": rng.choice(["date", "date-time", "time", "uuid", "ipv4", "email"])}
    if kind == "pattern":
        return {"type": "string", "pattern": rng.choice(["^[a-z]{2,5}$", "^#[0-9a-f]{6}$", "^v[0-9]+\\.[0-9]+$"])}
    if kind == "nullable":
        return {"anyOf": [{"type": "string", "maxLength": 6}, {"type": "null"}], "default": None}
    if kind == "boolean":
        return {"type": "boolean", "default": False}
    return {
        "type": "string",
        "description": "free text",
        **({"maxLength": rng.randint(1, 20)} if rng.random() < 0.8 else {}),
    }
