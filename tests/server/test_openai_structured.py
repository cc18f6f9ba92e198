"""Structured output over HTTP: every client's spelling of it, whole and streamed."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from .running import Server

TALK: Any = [{"role": "user", "content": "Tell me about a dog that I saw"}]
SCHEMA = {
    "type": "object",
    "properties": {"place": {"enum": ["park", "street"]}, "count": {"type": "integer", "maximum": 99}},
    "required": ["place", "count"],
    "additionalProperties": False,
}
NAMED = {"name": "sighting", "schema": SCHEMA, "strict": True}

SPELLINGS: dict[str, dict[str, Any]] = {
    "OpenAI": {"response_format": {"type": "json_schema", "json_schema": NAMED}},
    "TGI": {"response_format": {"type": "json", "value": SCHEMA}},
    "TGI, as text": {"response_format": {"type": "json", "value": json.dumps(SCHEMA)}},
    "TGI, named": {"response_format": {"type": "json_schema", "value": NAMED}},
    "huggingface_hub": {"response_format": {"type": "json_object", "value": SCHEMA}},
    "others": {"response_format": {"type": "json_object", "schema": SCHEMA}},
    "vLLM, older": {"guided_json": SCHEMA},
    "vLLM": {"structured_outputs": {"json": SCHEMA, "regex": None}},
    "TGI's native field": {"grammar": {"type": "json", "value": SCHEMA}},
}


def post(server: Server, path: str = "/v1/chat/completions", status: int = 200, **fields: Any) -> Any:
    body = {"messages": TALK} if "chat" in path else {}
    answer = server.post(path, {"temperature": 1, "seed": 3, "max_tokens": 60, **body, **fields})
    assert answer.status == status, answer.text
    return answer.json()


def content(completion: Any) -> str:
    text: str = completion["choices"][0]["message"]["content"]
    return text


def check(text: str) -> None:
    value = json.loads(text)
    assert set(value) == {"place", "count"}
    assert value["place"] in ("park", "street")
    assert isinstance(value["count"], int)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_schema_in_every_spelling(demo_server: Server, spelling: str) -> None:
    check(content(post(demo_server, **SPELLINGS[spelling])))


@pytest.mark.parametrize(
    ("fields", "allowed"),
    [
        ({"guided_choice": ["north", "south"]}, ["north", "south"]),
        ({"structured_outputs": {"choice": ["north", "south"]}}, ["north", "south"]),
        ({"guided_regex": "(ab){3}"}, ["ababab"]),
        ({"response_format": {"type": "regex", "value": "(ab){3}"}}, ["ababab"]),
        ({"guided_grammar": 'start: "x" ("y" | "z")'}, ["xy", "xz"]),
        ({"grammar": 'start: "x" ("y" | "z")'}, ["xy", "xz"]),
    ],
)
def test_other_grammars(demo_server: Server, fields: dict[str, Any], allowed: list[str]) -> None:
    completion = post(demo_server, **fields)
    assert content(completion) in allowed
    assert completion["choices"][0]["finish_reason"] == "stop"
    whole = post(demo_server, "/v1/completions", prompt="Which way?", **fields)
    assert whole["choices"][0]["text"] in allowed


def test_any_object(demo_server: Server) -> None:
    value = json.loads(content(post(demo_server, temperature=0, response_format={"type": "json_object"})))
    assert isinstance(value, dict)


def test_streams_and_several_answers(demo_server: Server) -> None:
    fields = {**SPELLINGS["OpenAI"], "n": 3}
    whole = [choice["message"]["content"] for choice in post(demo_server, **fields)["choices"]]
    body = {"messages": TALK, "temperature": 1, "seed": 3, "max_tokens": 60, "stream": True, **fields}
    texts = ["", "", ""]
    for chunk in demo_server.post("/v1/chat/completions", body).events()[:-1]:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["delta"]["content"]
    assert texts == whole
    for text in texts:
        check(text)


def test_the_sdk_parses_into_a_class(demo_server: Server) -> None:
    class Sighting(BaseModel):
        place: str
        count: int

    with openai.OpenAI(base_url=f"{demo_server.url}/v1", api_key=demo_server.key, max_retries=0) as client:
        chat = client.chat.completions.parse(model="demo", messages=TALK, response_format=Sighting, temperature=0)
        response = client.responses.parse(model="demo", input="I saw a dog", text_format=Sighting, temperature=0)
    assert isinstance(chat.choices[0].message.parsed, Sighting)
    assert isinstance(response.output_parsed, Sighting)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"guided_json": {"properties": {"a": {"not": {}}}}}, "/properties/a/not"),
        ({"guided_regex": "("}, "invalid regex"),
        ({"guided_json": "{"}, "guided_json"),
        ({"response_format": {"type": "json_schema"}}, "needs a `json_schema` object"),
        ({"response_format": {"type": "regex"}}, "needs a `value`"),
        ({"response_format": {}}, "must be an object with a `type`"),
        ({"response_format": {"type": "yaml"}}, "response_format.type = yaml"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}], **SPELLINGS["OpenAI"]}, "mutually exclusive"),
    ],
)
def test_refusals(demo_server: Server, fields: dict[str, Any], words: str) -> None:
    error = post(demo_server, status=422, **fields)["error"]
    assert words in f"{error['param']}: {error['message']}"
