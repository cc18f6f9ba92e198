"""Tool calls over HTTP in the three shapes: chat completions, responses, messages. The grammar makes any model call."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from .running import Server

TALK: Any = [{"role": "user", "content": "How is the weather?"}]
PARAMETERS = {
    "type": "object",
    "properties": {"where": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["where", "days"],
    "additionalProperties": False,
}
FUNCTION = {"name": "get_weather", "description": "The forecast", "parameters": PARAMETERS}
TOOLS: Any = [
    {"type": "function", "function": FUNCTION},
    {"type": "function", "function": {"name": "wait", "parameters": {"type": "object", "additionalProperties": False}}},
]
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}


@pytest.fixture
def client(demo_server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{demo_server.url}/v1", api_key=demo_server.key, max_retries=0) as found:
        yield found


def check(name: str, arguments: str) -> None:
    value = json.loads(arguments)
    if name == "get_weather":
        assert value["where"] in ("Oslo", "Rome")
        assert 1 <= value["days"] <= 9
    else:
        assert (name, value) == ("wait", {})


def test_a_call_that_must_come(client: openai.OpenAI) -> None:
    for choice in ("required", NAMED):
        completion = client.chat.completions.create(
            model="demo", messages=TALK, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False, temperature=0
        )
        message = completion.choices[0].message
        assert (completion.choices[0].finish_reason, message.content) == ("tool_calls", None)
        assert message.tool_calls
        for call in message.tool_calls:
            assert call.type == "function"
            assert call.id
            check(call.function.name, call.function.arguments)
        if choice == NAMED:
            assert [call.function.name for call in message.tool_calls] == ["get_weather"]


def test_a_stream_adds_up_to_the_whole(client: openai.OpenAI) -> None:
    fields: Any = {"model": "demo", "messages": TALK, "tools": TOOLS, "tool_choice": NAMED, "temperature": 0}
    fields["parallel_tool_calls"] = False
    whole = client.chat.completions.create(**fields).choices[0].message.tool_calls
    with client.chat.completions.stream(**fields) as stream:
        choice = stream.get_final_completion().choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.role == "assistant"
    assert whole
    assert choice.message.tool_calls
    assert [c.function.arguments for c in choice.message.tool_calls] == [c.function.arguments for c in whole]


def test_several_answers_call_each_for_itself(demo_server: Server) -> None:
    body = {"messages": TALK, "tools": TOOLS, "tool_choice": NAMED, "n": 3, "seed": 1, "parallel_tool_calls": False}
    whole = demo_server.post("/v1/chat/completions", body).json()["choices"]
    arguments = {0: "", 1: "", 2: ""}
    for chunk in demo_server.post("/v1/chat/completions", {**body, "stream": True}).events()[:-1]:
        for choice in chunk["choices"]:
            for call in choice["delta"].get("tool_calls", []):
                arguments[choice["index"]] += call["function"]["arguments"]
    for choice in whole:
        (call,) = choice["message"]["tool_calls"]
        check(call["function"]["name"], call["function"]["arguments"])
        assert arguments[choice["index"]] == call["function"]["arguments"]


def test_tools_may_stay_unused(client: openai.OpenAI, demo_server: Server) -> None:
    talk: Any = [{"role": "user", "content": "What does sinfo do?"}]
    plain = client.chat.completions.create(model="demo", messages=talk, temperature=0)
    none = client.chat.completions.create(model="demo", messages=talk, temperature=0, tools=TOOLS, tool_choice="none")
    assert none.choices[0].message.content == plain.choices[0].message.content
    before = demo_server.metric("tgi_request_success")
    auto = client.chat.completions.create(model="demo", messages=talk, temperature=0, tools=TOOLS, max_tokens=20)
    assert auto.choices[0].message.content
    assert demo_server.metric("tgi_request_success") == before + 1  # auto costs one generation


def test_responses(client: openai.OpenAI) -> None:
    tools: Any = [{"type": "function", "strict": True, **FUNCTION}]
    fields: Any = {"model": "demo", "input": "How is the weather?", "tools": tools, "temperature": 0}
    fields |= {"tool_choice": {"type": "function", "name": "get_weather"}, "parallel_tool_calls": False}
    response = client.responses.create(**fields)
    (call,) = response.output
    assert call.type == "function_call"
    assert response.status == "completed"
    check(call.name, call.arguments)
    events: list[Any] = list(client.responses.create(**fields, stream=True))
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    (done,) = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert "".join(deltas) == done.arguments == call.arguments
    assert [e.type for e in events if "output_item" in e.type] == [
        "response.output_item.added", "response.output_item.done",
    ]  # fmt: skip
    with client.responses.stream(**fields) as stream:
        assert stream.get_final_response().output[0].arguments == call.arguments  # type: ignore[union-attr]
    follow = [*response.output, {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}]
    items: Any = [{"role": "user", "content": "How is the weather?"}, *follow]
    assert client.responses.create(model="demo", input=items, max_output_tokens=4).output


def test_messages(demo_server: Server) -> None:
    tools: Any = [{"name": "get_weather", "description": "The forecast", "input_schema": PARAMETERS}]
    fields: Any = {"model": "demo", "max_tokens": 64, "messages": TALK, "tools": tools}
    fields["tool_choice"] = {"type": "tool", "name": "get_weather", "disable_parallel_tool_use": True}
    with anthropic.Anthropic(base_url=demo_server.url, api_key=demo_server.key, max_retries=0) as client:
        message = client.messages.create(**fields, extra_body={"temperature": 0})
        (block,) = message.content
        assert block.type == "tool_use"
        assert message.stop_reason == "tool_use"
        check(block.name, json.dumps(block.input))
        with client.messages.stream(**fields, extra_body={"temperature": 0}) as stream:
            final = stream.get_final_message()
        assert final.content[0].type == "tool_use"
        assert (final.content[0].input, final.stop_reason) == (block.input, "tool_use")
        result: Any = {"type": "tool_result", "tool_use_id": block.id, "content": "rain"}
        talk: Any = [*TALK, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
        assert client.messages.create(model="demo", max_tokens=4, messages=talk, tools=tools).stop_reason


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tools": TOOLS, "tool_choice": "fly"}, "Tool error: Tool with name fly not found"),
        ({"tools": [{"type": "web_search"}]}, "Tool error: "),
        ({"tools": [{"type": "function", "function": {}}]}, "Tool error: "),
    ],
)
def test_refusals(demo_server: Server, fields: dict[str, Any], words: str) -> None:
    answer = demo_server.post("/v1/chat/completions", {"messages": TALK, **fields})
    assert answer.status == 422
    assert words in answer.json()["error"]["message"]
    assert answer.json()["error"]["code"] == "tool_error"
