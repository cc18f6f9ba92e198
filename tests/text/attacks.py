"""200 grammars made to hurt: each must be refused, killed, or harmless."""

from __future__ import annotations

import json

from penstock.text.grammar import GrammarSpec


def attacks() -> list[GrammarSpec]:
    """Nested quantifiers, huge counts, deep nesting, cycles, products of automata, large lists."""
    regexes = ["(" * n + "a" + ")" * n for n in (100, 300, 1000, 2000, 30_000)]
    regexes += [f"(x{{1,{n}}}){{1,{n}}}" for n in (10, 100, 1000, 10_000, 10**9)]
    regexes += [f"((x{{1,{n}}}){{1,{n}}}){{1,{n}}}" for n in (10, 100, 1000)]
    regexes += ["(" * n + "a" + ")+" * n for n in (5, 20, 100, 240)]
    regexes += ["(" * n + "a" + "){1,9}" * n for n in (5, 20, 100)]
    regexes += [f".*a.{{{n}}}" for n in (10, 20, 200, 2000)] + [f"(.*a.{{{n}}}b|.*c.{{{n}}}d)*" for n in (5, 20, 100)]
    regexes += ["|".join(f"{i * 7919:x}" for i in range(n)) for n in (100, 600)]
    regexes += [f"(\\w{{1,{n}}}\\s)*[^a-z]{{{n}}}" for n in (10, 100, 1000)] + [
        "[",
        "a{2,1}",
        "(?P<x",
        "\\",
        "a**",
        "(?R)",
    ]
    regexes += (
        ["(.*)" * n for n in (5, 50, 500)] + ["(.*?a)?" * n for n in (5, 50, 500)] + ["(a|a)*" * n for n in (10, 300)]
    )
    regexes += [f"(?:{c}*)*{c}{{{n}}}$" for c in "ab." for n in (3, 30, 300)] + [
        "\\p{L}{500}",
        "[\\s\\S]{4000}",
        "\x00+",
    ]
    lark = [f'start: {"(" * n}"a"{")" * n}' for n in (10, 100, 1000, 10_000)]
    lark += ["start: start", "start: start start", "start: a\na: b\nb: a", 'start: a a | \na: a a | "x" | ']
    lark += [f"start: {'s ' * n}\ns: s s | /[a-z]/ | s s s" for n in (2, 10, 40)]
    lark += ["start: " + " | ".join(f'"{i}"' for i in range(n)) for n in (100, 5000)]
    lark += [
        f"start: r{n}\n" + "\n".join(f"r{i}: r{i - 1} r{i - 1}" for i in range(1, n + 1)) + '\nr0: "a"'
        for n in (10, 30, 300)
    ]
    lark += [f'start: x{{1,{n}}}\nx: y{{1,{n}}}\ny: "a"' for n in (10, 1000, 10**8)]
    lark += [
        "start:",
        "%import x",
        "start: /(/",
        'start: "',
        "start: <|no_such_token|>",
        "%llguidance {",
        "start: %json {}",
    ]
    schemas: list[object] = [{"enum": [f"v{i}" for i in range(n)]} for n in (1000, 10_000)]
    schemas += [{"description": "x" * 2**20}, {"enum": list(range(10_000))}, {"type": "array", "minItems": 10**8}]
    schemas += [{"type": "array", "items": {"type": "string"}, "maxItems": n} for n in (10**4, 10**8)]
    schemas += [{"type": "string", "minLength": n, "maxLength": 2 * n} for n in (10**3, 10**4, 10**9)]
    schemas += [{"type": "integer", "multipleOf": n} for n in (9973, 19_997, 1234567, 10**18 + 9)]
    schemas += [{"type": "number", "multipleOf": 1 / n} for n in (3, 7919)] + [
        {"allOf": [{"multipleOf": n} for n in (97, 101, 103, 107)]}
    ]
    schemas += [
        {"allOf": [{"type": "string", "pattern": f".*a.{{10}}{i}.*"} for i in range(n)]} for n in (2, 6, 12, 40)
    ]
    schemas += [
        {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(n)}} for n in (300, 1000, 1900)
    ]
    schemas += [
        {"anyOf": [{"properties": {f"k{i}": {"pattern": f".*a.{{10}}{i}"}}} for i in range(n)]} for n in (10, 200, 800)
    ]
    schemas += [_deep(n) for n in (10, 60, 100, 2000)] + ["[" * n for n in (100, 60_000)] + ['{"a":' * 5000]
    schemas += [{"$ref": "#"}, {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, {"anyOf": [{"$ref": "#"}]}]
    schemas += [{"allOf": [{"$ref": "#"}, {"$ref": "#"}]}, {"type": "array", "items": {"$ref": "#"}, "minItems": 1}]
    schemas += [{"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, {"not": {"$ref": "#"}}]
    schemas += [_doubling(n) for n in (5, 12, 20, 40)] + [_crossing(n) for n in (3, 8, 14)]
    schemas += [{"patternProperties": {f"^({c}+)+$": {} for c in "abcdef"}}, {"pattern": "^(a+)+$", "minLength": 5000}]
    schemas += [{"oneOf": [{"const": i} for i in range(n)]} for n in (60, 1000)] + [{"type": ["string"] * 1000}]
    schemas += [{"required": [f"r{i}" for i in range(n)]} for n in (100, 3000)] + [
        {"const": json.loads("[" * 500 + "]" * 500)}
    ]
    found = [GrammarSpec("regex", text) for text in regexes] + [GrammarSpec("lark", text) for text in lark]
    found += [GrammarSpec("json_schema", schema) for schema in schemas]
    found += [GrammarSpec("choice", [f"{'x' * i}" for i in range(1, n)]) for n in (100, 400)]
    found += [
        GrammarSpec("json_schema", {"allOf": [{"pattern": f".*{c}.{{{n}}}"} for c in "abcd"]})
        for n in range(200 - len(found))
    ]
    return found


def _deep(n: int) -> object:
    schema: object = {"type": "null"}
    for _ in range(n):
        schema = {"type": "array", "items": schema}
    return json.dumps(schema) if n < 400 else '{"items":' * n + "{}" + "}" * n


def _doubling(n: int) -> object:
    """Each definition uses the one below twice: 2^n when written out."""
    pair = {f"d{i}": {"type": "array", "prefixItems": [{"$ref": f"#/$defs/d{i - 1}"}] * 2} for i in range(1, n)}
    return {"$ref": f"#/$defs/d{n - 1}", "$defs": {"d0": {"type": "null"}, **pair}}


def _crossing(n: int) -> object:
    """An intersection of unions: 2^n combinations."""
    return {"allOf": [{"anyOf": [{"required": [f"a{i}"]}, {"required": [f"b{i}"]}]} for i in range(n)]}
