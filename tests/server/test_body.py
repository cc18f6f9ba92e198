"""Bodies that do not fit: serde_json's words, path, line and column. No server needed."""

from __future__ import annotations

import json
import random
from typing import Any

import msgspec
import pytest

from penstock.server.body import parse
from penstock.server.native.wire import CompatGenerateRequest, GenerateRequest
from penstock.server.refusal import Refusal
from penstock.server.serde import judge

SYNTAX = "Failed to parse the request body as JSON: "
FIT = "Failed to deserialize the JSON body into the target type: "


def refused(raw: str | bytes, kind: type = GenerateRequest) -> tuple[int, str]:
    with pytest.raises(Refusal) as caught:
        parse(raw.encode() if isinstance(raw, str) else raw, kind)
    refusal = caught.value
    head = SYNTAX if refusal.status == 400 else FIT
    assert refusal.plain
    assert refusal.message.startswith(head)
    return refusal.status, refusal.message.removeprefix(head)


NOT_JSON: list[tuple[str | bytes, str]] = [
    ("", "EOF while parsing a value at line 1 column 0"),
    (" \n ", "EOF while parsing a value at line 2 column 1"),
    ("{", "EOF while parsing an object at line 1 column 1"),
    ('{"inputs"', "EOF while parsing an object at line 1 column 9"),
    ('{"inputs":', "inputs: EOF while parsing a value at line 1 column 10"),
    ('{"inputs":"a', "inputs: EOF while parsing a string at line 1 column 12"),
    ('{"inputs":"a"', "EOF while parsing an object at line 1 column 13"),
    ('{"inputs":"a","parameters":{"stop":["a"', "parameters.stop: EOF while parsing a list at line 1 column 39"),
    ('{"inputs":"a",}', "trailing comma at line 1 column 15"),
    ('{"inputs" "a"}', "expected `:` at line 1 column 11"),
    ('{"inputs":"a" "b"}', "expected `,` or `}` at line 1 column 15"),
    ('{"inputs":"a"} x', "trailing characters at line 1 column 16"),
    ("{inputs:1}", "key must be a string at line 1 column 2"),
    ("nonsense", "expected ident at line 1 column 2"),
    ("hello", "expected value at line 1 column 1"),
    ('{"inputs":NaN}', "inputs: expected value at line 1 column 11"),
    ('{"inputs":"a","parameters":{"seed":01}}', "parameters.seed: invalid number at line 1 column 37"),
    ('{"inputs":"a","parameters":{"temperature":1.}}', "parameters.temperature: invalid number at line 1 column 45"),
    ('{"inputs":"a","parameters":{"temperature":1e999}}', "parameters.temperature: number out of range"),
    ('{"inputs":"\\x"}', "inputs: invalid escape at line 1 column 13"),
    ('{"inputs":"\\u12"}', "inputs: invalid escape at line 1 column 17"),
    ('{"inputs":"\\u12"', "inputs: EOF while parsing a string at line 1 column 16"),
    ('{"inputs":"\\ud800"}', "inputs: unexpected end of hex escape at line 1 column 17"),
    ('{"inputs":"\\udc00"}', "inputs: lone leading surrogate in hex escape at line 1 column 17"),
    (
        '{"inputs":"a\tb"}',
        "inputs: control character (\\u0000-\\u001F) found while parsing a string at line 1 column 13",
    ),
    (b'{"inputs":"\xff"}', "inputs: invalid unicode code point at line 1 column 13"),
    ('{"inputs":"a","x":[1,{"y":tru}]}', "x: expected ident at line 1 column 30"),
]


@pytest.mark.parametrize(("raw", "words"), NOT_JSON, ids=range(len(NOT_JSON)))
def test_what_is_not_json(raw: str | bytes, words: str) -> None:
    status, text = refused(raw)
    assert (status, text[: len(words)]) == (400, words)


MISFITS = [
    ("{}", "missing field `inputs` at line 1 column 2"),
    ('"x"', 'invalid type: string "x", expected struct GenerateRequest at line 1 column 3'),
    ("5", "invalid type: integer `5`, expected struct GenerateRequest at line 1 column 1"),
    ("null", "invalid type: null, expected struct GenerateRequest at line 1 column 4"),
    ('{"inputs": 5}', "inputs: invalid type: integer `5`, expected a string at line 1 column 12"),
    ('{"inputs": ["a"]}', "inputs: invalid type: sequence, expected a string at line 1 column 11"),
    ('{"inputs": {}}', "inputs: invalid type: map, expected a string at line 1 column 11"),
    ('{"inputs":"a","inputs":"b"}', "duplicate field `inputs` at line 1 column 22"),
    ('{"inputs":"a","parameters":{"top_k":3,"top_k":4}}', "parameters: duplicate field `top_k` at line 1 column 45"),
    (
        '{\n "inputs": "a",\n "parameters": {"do_sample": 1}\n}',
        "parameters.do_sample: invalid type: integer `1`, expected a boolean at line 3 column 30",
    ),
    (
        '{"inputs":"é","parameters":{"stop":["a",3]}}',
        "parameters.stop[1]: invalid type: integer `3`, expected a string at line 1 column 42",
    ),
    (
        '{"inputs":"a","parameters":{"best_of":99999999999999999999999}}',
        "parameters.best_of: invalid type: floating point `100000000000000000000000.0`, expected usize",
    ),
    ('{"inputs":"a","parameters":{"grammar":{"value":1}}}', "parameters.grammar: missing field `type`"),
    ('{"inputs":"a","parameters":{"grammar":{"type":"regex"}}}', "parameters.grammar: missing field `value`"),
    (
        '{"inputs":"a","parameters":{"grammar":{"value":1,"type":"text"}}}',
        "parameters.grammar.type: unknown variant `text`, expected one of `json`, `json_object`",
    ),
    (
        '{"inputs":"a","parameters":{"grammar":{"type":"regex","value":1}}}',
        "parameters.grammar.value: invalid type: integer `1`, expected a string at line 1 column 63",
    ),
]
NUMBERS = {"best_of": "usize", "truncate": "usize", "seed": "u64", "max_new_tokens": "u32", "top_n_tokens": "u32"}
FLOATS = ("temperature", "top_p", "typical_p", "repetition_penalty", "frequency_penalty")
FLAGS = ("do_sample", "watermark", "details", "decoder_input_details")


@pytest.mark.parametrize(("raw", "words"), MISFITS)
def test_what_does_not_fit(raw: str, words: str) -> None:
    status, text = refused(raw)
    assert (status, text[: len(words)]) == (422, words)


def parameter(name: str, value: str) -> str:
    status, text = refused(f'{{"inputs":"a","parameters":{{"{name}":{value}}}}}')
    assert status == 422
    assert text.startswith(f"parameters.{name}: ")
    return text.removeprefix(f"parameters.{name}: ").rpartition(" at line ")[0]


@pytest.mark.parametrize("name", [*NUMBERS, "top_k"])
def test_integers(name: str) -> None:
    kind = NUMBERS.get(name, "i32")
    assert parameter(name, "1.0") == f"invalid type: floating point `1.0`, expected {kind}"
    assert parameter(name, '"1"') == f'invalid type: string "1", expected {kind}'
    assert parameter(name, "true") == f"invalid type: boolean `true`, expected {kind}"
    assert parameter(name, "{}") == f"invalid type: map, expected {kind}"
    low = -(2**31) - 1 if kind == "i32" else -1
    assert parameter(name, str(low)) == f"invalid value: integer `{low}`, expected {kind}"
    assert parameter(name, "-0") == f"invalid type: floating point `-0.0`, expected {kind}"
    if kind in ("u32", "i32"):
        assert parameter(name, str(2**32)) == f"invalid value: integer `{2**32}`, expected {kind}"


@pytest.mark.parametrize("name", FLOATS)
def test_floats(name: str) -> None:
    assert parameter(name, '"hot"') == 'invalid type: string "hot", expected f32'
    assert parameter(name, "[]") == "invalid type: sequence, expected f32"
    for number in ("1", "-0"):
        assert parse(f'{{"inputs":"a","parameters":{{"{name}":{number}}}}}'.encode(), GenerateRequest).inputs == "a"


@pytest.mark.parametrize("name", FLAGS)
def test_flags_are_not_nullable(name: str) -> None:
    assert parameter(name, "null") == "invalid type: null, expected a boolean"
    assert parameter(name, '"true"') == 'invalid type: string "true", expected a boolean'


def test_unknown_fields_of_any_shape_pass() -> None:
    raw = b'{"x":[{"inputs":1}],"inputs":"a","parameters":{"unknown":null,"top_k":null},"stream":true,"inputs2":2}'
    assert parse(raw, CompatGenerateRequest).stream


def test_it_agrees_with_the_decoder_about_damaged_bodies() -> None:
    """Whatever is broken into a body: what msgspec takes, serde's reader takes, and what one refuses the other does."""
    parameters: dict[str, Any] = {"stop": ["é", 'q"'], "temperature": 0.5, "seed": 3, "details": True, "top_k": None}
    whole = json.dumps({"inputs": "the fox\n", "parameters": parameters}, ensure_ascii=False).encode()
    rng = random.Random(3)
    decoder = msgspec.json.Decoder(GenerateRequest)
    for _ in range(5000):
        raw = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(raw))
            raw[at : at + rng.randint(0, 3)] = rng.choice([b"", b'"', b"\\", b"1", b"-", b"{", b"]", b",", b"n"])
        try:
            decoder.decode(bytes(raw))
            taken = True
        except (msgspec.DecodeError, UnicodeDecodeError):
            taken = False
        found = judge(bytes(raw), GenerateRequest)
        # msgspec takes a field twice, and does not look into strings that it skips; `parse` asks serde's reader then.
        stricter = found is not None and found.message.startswith(("duplicate field", "invalid unicode"))
        assert (found is None) == taken or stricter, (bytes(raw), found)
