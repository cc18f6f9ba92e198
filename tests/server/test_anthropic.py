"""/v1/messages, with Anthropic's own client and by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import pytest

from .conftest import StartServer
from .running import Server

TALK: Any = [{"role": "user", "content": "What does sinfo do?"}]
ANSWER = "`sinfo` lists the partitions and the state of their nodes."


@pytest.fixture
def client(demo_server: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=demo_server.url, api_key=demo_server.key, max_retries=0) as found:
        yield found


def test_a_whole_message(client: anthropic.Anthropic) -> None:
    message = client.messages.create(model="demo", max_tokens=64, messages=TALK, extra_body={"temperature": 0})
    (block,) = message.content
    assert (message.type, message.role, message.model) == ("message", "assistant", "demo")
    assert block.type == "text"
    assert (block.text, message.stop_reason, message.stop_sequence) == (ANSWER, "end_turn", None)
    assert message.usage.output_tokens == 15
    assert message._request_id


def test_a_stream(client: anthropic.Anthropic) -> None:
    with client.messages.stream(model="demo", max_tokens=64, messages=TALK, extra_body={"temperature": 0}) as stream:
        assert "".join(stream.text_stream) == ANSWER
        message = stream.get_final_message()
    assert message.stop_reason == "end_turn"
    assert message.usage.output_tokens == 15


def test_the_events_of_a_stream(demo_server: Server) -> None:
    body = {"messages": TALK, "max_tokens": 2, "temperature": 0, "stream": True}
    raw = demo_server.post("/v1/messages", body).text
    kinds = [line.removeprefix("event: ") for line in raw.splitlines() if line.startswith("event: ")]
    assert kinds == [
        "message_start", "ping", "content_block_start", "content_block_delta", "content_block_delta",
        "content_block_stop", "message_delta", "message_stop",
    ]  # fmt: skip
    assert raw.endswith('event: message_stop\ndata: {"type":"message_stop"}\n\n')


def test_why_it_stopped(client: anthropic.Anthropic) -> None:
    cut = client.messages.create(model="demo", max_tokens=2, messages=TALK, extra_body={"temperature": 0})
    assert cut.stop_reason == "max_tokens"
    stopped = client.messages.create(
        model="demo", max_tokens=64, messages=TALK, extra_body={"temperature": 0}, stop_sequences=["zork", "and"]
    )
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "and")
    assert stopped.content[0].type == "text"
    assert stopped.content[0].text == ANSWER[: ANSWER.index("and")]


def test_blocks_are_the_messages_of_a_chat(client: anthropic.Anthropic, demo_server: Server) -> None:
    talk: Any = [
        {"role": "user", "content": [{"type": "text", "text": "Look "}, {"type": "text", "text": "there!"}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "hm", "signature": ""},
            {"type": "text", "text": "I look."},
            {"type": "tool_use", "id": "t1", "name": "look", "input": {"where": "there"}},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "a hill"}]},
            {"type": "text", "text": "And?"},
        ]},
    ]  # fmt: skip
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Look there!"},
        {"role": "assistant", "content": "I look.", "tool_calls": [
            {"id": "t1", "type": "function", "function": {"name": "look", "arguments": '{"where": "there"}'}},
        ], "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "t1", "content": "a hill"},
        {"role": "user", "content": "And?"},
    ]  # fmt: skip
    system: Any = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    counted = client.messages.count_tokens(model="demo", messages=talk, system=system)
    assert counted.input_tokens == demo_server.post("/tokenize", {"messages": chat}).json()["count"]
    answer = client.messages.create(model="demo", max_tokens=4, messages=talk, system=system)
    assert answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0) == counted.input_tokens


def test_an_answer_that_was_begun_is_continued(client: anthropic.Anthropic) -> None:
    talk: Any = [*TALK, {"role": "assistant", "content": "`sinfo` lists the"}]
    message = client.messages.create(model="demo", max_tokens=64, messages=talk, extra_body={"temperature": 0})
    assert message.content[0].type == "text"
    assert "`sinfo` lists the" + message.content[0].text == ANSWER


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_tokens": 0}, "`max_tokens` must be strictly positive"),
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "cannot be empty"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            "must be of type base64 or url",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "x"}}]}]},
            "this model takes no images",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text must be a string",
        ),
        ({"mcp_servers": [{}]}, "`mcp_servers` is not supported"),
        ({"tools": [{"type": "web_search_20250305", "name": "x"}]}, "`web_search_20250305` is not supported"),
        ({"tool_choice": {"type": "zork"}}, "`tool_choice.type` must be"),
        ({"system": [{"type": "image"}]}, "`image` is not supported"),
        ({"output_config": {"effort": 3}}, "output_config.effort must be a string"),
        ({"output_config": {"format": {"type": "zork", "schema": {}}}}, "output_config.format must be"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format must be"),
    ],
)
def test_errors_have_anthropics_shape(demo_server: Server, fields: dict[str, Any], words: str) -> None:
    answer = demo_server.post("/v1/messages", {"messages": TALK, "max_tokens": 4, **fields})
    assert answer.status == 400
    value = answer.json()
    assert (value["type"], value["error"]["type"]) == ("error", "invalid_request_error")
    assert words in value["error"]["message"]


def test_the_answer_fits_a_schema(client: anthropic.Anthropic) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [4, 5]}}, "required": ["n"], "additionalProperties": False}
    form: Any = {"effort": "low", "format": {"type": "json_schema", "schema": schema}}
    message = client.messages.create(model="demo", max_tokens=64, messages=TALK, output_config=form)
    assert message.content[0].type == "text"
    assert json.loads(message.content[0].text)["n"] in (4, 5)


def test_a_template_sees_the_effort(start_server: StartServer, tiny_llama: Path, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{{ reasoning_effort or 'none' }}{{ messages[0].content }}")
    server = start_server(tiny_llama, "--chat-template", template)
    for fields, said in (({}, "none"), ({"output_config": {"effort": "the quick brown fox"}}, "the quick brown fox")):
        body = {"messages": TALK, **fields}
        count = len(server.post("/tokenize", {"inputs": said + TALK[0]["content"]}).json())
        counted = server.post("/v1/messages/count_tokens", body).json()["input_tokens"]
        usage = server.post("/v1/messages", {**body, "max_tokens": 1}).json()["usage"]
        assert counted == usage["input_tokens"] + usage["cache_read_input_tokens"] == count - 1  # no BOS


def test_errors_of_the_sdk(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="Names: demo"):
        client.messages.create(model="claude-9", max_tokens=4, messages=TALK)
    with pytest.raises(anthropic.AuthenticationError):
        client.with_options(api_key="wrong").messages.create(model="demo", max_tokens=4, messages=TALK)
