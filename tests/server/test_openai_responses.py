"""/v1/responses, with OpenAI's own client and by hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from .running import Server

QUESTION = "What does sinfo do?"
ANSWER = "`sinfo` lists the partitions and the state of their nodes."


@pytest.fixture
def client(demo_server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{demo_server.url}/v1", api_key=demo_server.key, max_retries=0) as found:
        yield found


def test_a_whole_response(client: openai.OpenAI) -> None:
    response = client.responses.create(model="demo", input=QUESTION, temperature=0, metadata={"a": "b"})
    assert (response.status, response.output_text, response.store) == ("completed", ANSWER, False)
    assert response.metadata == {"a": "b"}
    assert response.usage is not None
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens


def test_a_stream(client: openai.OpenAI) -> None:
    events: list[Any] = list(client.responses.create(model="demo", input=QUESTION, temperature=0, stream=True))
    kinds = [event.type for event in events]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    assert kinds[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.completed",
    ]  # fmt: skip
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == ANSWER
    assert events[-1].response.output_text == ANSWER
    assert events[-1].response.usage.output_tokens > 5


def test_the_sdk_adds_up_a_stream(client: openai.OpenAI) -> None:
    with client.responses.stream(model="demo", input=QUESTION, temperature=0) as stream:
        assert stream.get_final_response().output_text == ANSWER


def test_an_answer_that_is_cut(client: openai.OpenAI) -> None:
    response = client.responses.create(model="demo", input=QUESTION, temperature=0, max_output_tokens=3)
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    events: list[Any] = list(
        client.responses.create(model="demo", input=QUESTION, temperature=0, max_output_tokens=3, stream=True)
    )
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == response.output_text


def test_items_are_the_messages_of_a_chat(demo_server: Server) -> None:
    items = [
        {"role": "user", "content": "Hi"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Hello!"}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": QUESTION}]},
    ]
    talk = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"}, {"role": "user", "content": QUESTION},
    ]  # fmt: skip
    body = {"input": items, "instructions": "Be brief.", "temperature": 0}
    response = demo_server.post("/v1/responses", body).json()
    chat = demo_server.post("/v1/chat/completions", {"messages": talk, "temperature": 0}).json()
    assert response["output"][-1]["content"][0]["text"] == chat["choices"][0]["message"]["content"]
    assert response["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]


def test_calls_and_their_results_are_taken(demo_server: Server) -> None:
    items = [
        {"role": "user", "content": "Look!"},
        {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "look", "arguments": '{"far": true}'},
        {"type": "function_call_output", "call_id": "c1", "output": "nothing"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "a hill"}]},
    ]
    assert demo_server.post("/v1/responses", {"input": items, "max_output_tokens": 2}).status == 200


def test_logprobs(demo_server: Server) -> None:
    body = {"input": QUESTION, "temperature": 0, "top_logprobs": 2, "max_output_tokens": 4}
    part = demo_server.post("/v1/responses", body).json()["output"][0]["content"][0]
    assert "".join(token["token"] for token in part["logprobs"]) == part["text"]
    assert all(len(token["top_logprobs"]) == 2 for token in part["logprobs"])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"prompt": {"id": "x"}}, "prompt"),
        ({"n": 2}, "n"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "messages[0].content"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file"}, {"type": "input_image"}]}]},
            "input[0].content",
        ),
        ({"input": [3]}, "input"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"text": {"format": {"type": "poem"}}}, "response_format"),
    ],
)
def test_refusals_name_the_field(demo_server: Server, fields: dict[str, Any], param: str) -> None:
    answer = demo_server.post("/v1/responses", {"input": QUESTION, **fields})
    assert answer.status == 422
    assert answer.json()["error"]["param"].startswith(param)


def test_neutral_values_pass(demo_server: Server) -> None:
    body = {
        "input": QUESTION, "max_output_tokens": 1, "store": True, "previous_response_id": None, "background": False,
        "truncation": "disabled", "include": ["reasoning.encrypted_content"], "tools": [], "tool_choice": "auto",
        "reasoning": {"effort": "low"}, "text": {"format": {"type": "text"}, "verbosity": "low"}, "user": "me",
        "service_tier": "auto", "parallel_tool_calls": True, "prompt_cache_key": "x", "safety_identifier": "y",
    }  # fmt: skip
    answer = demo_server.post("/v1/responses", body)
    assert answer.status == 200, answer.text
    assert "x-penstock-ignored" not in answer.headers
