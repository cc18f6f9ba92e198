"""/invocations, /vertex, /chat_tokenize and the native grammars: what they take, what they answer, what they refuse."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from .running import Server

SHORT = {"inputs": "the fox", "parameters": {"max_new_tokens": 3}}
CHAT = {"messages": [{"role": "user", "content": "the fox"}], "max_tokens": 3, "temperature": 0}
COMPLETION = {"prompt": "the fox", "max_tokens": 3, "temperature": 0}
UNFIT = "Failed to deserialize the JSON body into the target type: "


def test_invocations_take_all_three_bodies(server: Server) -> None:
    native = server.post("/invocations", SHORT)
    assert native.json() == server.post("/", SHORT).json()
    assert native.headers["x-generated-tokens"] == "3"
    assert server.post("/invocations", {**SHORT, "stream": True}).events()[-1]["generated_text"]
    assert server.post("/invocations", CHAT).json()["object"] == "chat.completion"
    assert server.post("/invocations", COMPLETION).json()["object"] == "text_completion"
    assert server.post("/invocations", {**CHAT, "stream": True}).events()[-1] == "[DONE]"


def test_invocations_refuse_in_tgis_words(server: Server) -> None:
    for body in ({}, {"inputs": 5}, [1], 7):
        answer = server.post("/invocations", json.dumps(body))
        assert answer.status == 422
        assert answer.text == f"{UNFIT}data did not match any variant of untagged enum SagemakerRequest"
    assert server.post("/invocations", "{").status == 400
    assert server.post("/invocations", {**SHORT, "parameters": {"top_p": 1.0}}).json()["error_type"] == "validation"


def test_vertex_answers_every_instance(server: Server) -> None:
    body = {"instances": [SHORT, {"inputs": "a", "parameters": {"max_new_tokens": 1, "seed": 1}}, CHAT]}
    answer = server.post("/vertex", body)
    assert list(answer.json()) == ["predictions"]
    first, second, third = answer.json()["predictions"]
    assert first == server.post("/generate", SHORT).json()["generated_text"]
    assert isinstance(second, str)
    assert third == server.post("/v1/chat/completions", CHAT).json()["choices"][0]["message"]["content"]
    server.wait_idle()


def test_vertex_refuses(server: Server) -> None:
    empty = server.post("/vertex", {"instances": []})
    error = "Input validation error"
    assert (empty.status, empty.json()) == (422, {"error": error, "error_type": error})
    assert "missing field `instances`" in server.post("/vertex", {}).text
    assert "untagged enum VertexInstance" in server.post("/vertex", {"instances": [SHORT, {"x": 1}]}).text
    for raw, column in (
        ('{"instances":[{"x":1}]}', 22),
        ('{"instances":[{"x":1} , {"inputs":"a"}]}', 24),
        ('{"a":[1,{}],"instances": [{"inputs":"a"}, {"x":1}], "b":2}', 50),
    ):
        assert server.post("/vertex", raw).text.endswith(f"enum VertexInstance at line 1 column {column}")
    bad = server.post("/vertex", {"instances": [SHORT, {"inputs": "a", "parameters": {"temperature": -1}}]})
    assert (bad.status, bad.json()["error_type"]) == (422, "validation")
    server.wait_idle()


def test_chat_tokenize(server: Server) -> None:
    answer = server.post("/chat_tokenize", {"messages": [{"role": "user", "content": "the café"}]})
    assert list(answer.json()) == ["tokenize_response", "templated_text"]
    text = answer.json()["templated_text"]
    assert text == "<s><|user|>the café\n<|assistant|>"
    tokens = answer.json()["tokenize_response"]
    assert list(tokens[0]) == ["id", "text", "start", "stop"]
    assert [token["id"] for token in tokens[:2]] == [0, 2]  # no second BOS beside the template's
    raw = text.encode()
    assert all(raw[t["start"] : t["stop"]].decode() == t["text"] for t in tokens)
    assert server.post("/chat_tokenize", {}).status == 422


def grammar(server: Server, grammar: Any, tokens: int = 60) -> Any:
    body = {"inputs": "the fox", "parameters": {"max_new_tokens": tokens, "grammar": grammar}}
    return server.post("/generate", body)


BROKEN: list[tuple[Any, str]] = [
    ({"type": "json", "value": {"type": "object"}}, "grammar is not valid: Grammar must have a 'properties' field"),
    ({"type": "json", "value": True}, "grammar is not valid: Grammar must have a 'properties' field"),
    ({"type": "json", "value": 5}, 'grammar is not valid: 5 is not of types "boolean", "object"'),
    ({"type": "json", "value": "{"}, "grammar is not valid: EOF while parsing an object at line 1 column 1"),
    ({"type": "json", "value": "words"}, "grammar is not valid: expected value at line 1 column 1"),
    ({"type": "json_schema", "value": {"schema": {"type": "array"}}}, "grammar is not valid: Grammar must have"),
    ({"type": "regex", "value": "(a"}, "grammar is not valid: "),
    ({"type": "json", "value": {"properties": {"a": {"type": "nothing"}}}}, "grammar is not valid: "),
]


@pytest.mark.parametrize(("value", "words"), BROKEN)
def test_broken_grammars(server: Server, value: Any, words: str) -> None:
    answer = grammar(server, value)
    assert answer.status == 422, answer.text
    assert answer.json()["error_type"] == "validation"
    assert answer.json()["error"].startswith(f"Input validation error: {words}")
    assert answer.text.count("grammar is not valid") == 1


SCHEMA = {"properties": {"colour": {"enum": ["red", "blue"]}, "count": {"type": "integer", "maximum": 9}},
          "required": ["colour", "count"]}  # fmt: skip


@pytest.mark.parametrize(
    "value",
    [
        {"type": "json", "value": SCHEMA},
        {"type": "json_object", "value": json.dumps(SCHEMA)},
        {"type": "json_schema", "value": {"name": "x", "schema": SCHEMA, "strict": True}},
    ],
)
def test_a_schema_is_kept_to(server: Server, value: Any) -> None:
    chat = server.post("/v1/chat/completions", {**CHAT, "max_tokens": 60, "response_format": value})
    assert chat.status == 200, chat.text
    assert set(json.loads(chat.json()["choices"][0]["message"]["content"])) == {"colour", "count"}
    answer = grammar(server, value)
    assert answer.status == 200, answer.text
    found = json.loads(answer.json()["generated_text"])
    assert found["colour"] in ("red", "blue")
    assert list(found) == ["colour", "count"]


def test_a_regex_is_kept_to(server: Server) -> None:
    value = {"type": "regex", "value": "[a-f]{4}-[0-9]{2}"}
    text = grammar(server, value).json()["generated_text"]
    assert re.fullmatch("[a-f]{4}-[0-9]{2}", text)
    body = {"inputs": "the fox", "parameters": {"max_new_tokens": 60, "grammar": value}}
    assert server.post("/generate_stream", body).events()[-1]["generated_text"] == text
