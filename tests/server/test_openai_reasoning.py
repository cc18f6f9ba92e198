"""Models that think aloud: what stands between the tags is told apart in every shape. A grammar makes them do it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.checkpoints import save_tiny

from .running import Server, start

TALK = [{"role": "user", "content": "the quick"}]
THOUGHT: dict[str, Any] = {"guided_regex": "[a-z]{8}</think>yes", "temperature": 0}


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The tiny Llama with a template whose prompts end inside the think tags."""
    folder = save_tiny(tmp_path_factory.mktemp("models") / "thinker", "llama")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] += "{% if add_generation_prompt %}<think>{% endif %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    server = start(tmp_path_factory.mktemp("home"), folder)
    yield server
    server.kill()


def test_chat(thinker: Server) -> None:
    body = {"messages": TALK, "max_tokens": 40, **THOUGHT}
    choice = thinker.post("/v1/chat/completions", body).json()["choices"][0]
    message = choice["message"]
    assert (message["content"], choice["finish_reason"]) == ("yes", "stop")
    assert len(message["reasoning_content"]) == 8
    usage = thinker.post("/v1/chat/completions", body).json()["usage"]
    reasoning = usage["completion_tokens_details"]["reasoning_tokens"]
    assert 0 < reasoning < usage["completion_tokens"]
    responses = thinker.post("/v1/responses", {"input": "the quick", "max_output_tokens": 40, **THOUGHT}).json()
    assert responses["usage"]["output_tokens_details"]["reasoning_tokens"] == reasoning
    found = {"content": "", "reasoning_content": ""}
    for chunk in thinker.post("/v1/chat/completions", {**body, "stream": True}).events()[:-1]:
        delta = chunk["choices"][0]["delta"]
        for name in found:
            found[name] += delta.get(name) or ""
    assert found == {name: message[name] for name in found}


def test_responses(thinker: Server) -> None:
    body = {"input": "the quick", "max_output_tokens": 40, **THOUGHT}
    value = thinker.post("/v1/responses", body).json()
    reasoning, message = value["output"]
    assert (reasoning["type"], message["type"]) == ("reasoning", "message")
    assert message["content"][0]["text"] == "yes"
    assert len(reasoning["content"][0]["text"]) == 8
    usage = value["usage"]
    assert 0 < usage["output_tokens_details"]["reasoning_tokens"] < usage["output_tokens"]
    events = thinker.post("/v1/responses", {**body, "stream": True}).events()[:-1]
    deltas = [event["delta"] for event in events if event["type"] == "response.reasoning_text.delta"]
    assert "".join(deltas) == reasoning["content"][0]["text"]
    final = events[-1]["response"]
    for items in (final["output"], value["output"]):
        for item in items:
            del item["id"]
    assert final["output"] == value["output"]


def test_messages(thinker: Server) -> None:
    body = {"messages": TALK, "max_tokens": 12, "temperature": 0}
    value = thinker.post("/v1/messages", body).json()
    (block,) = value["content"]
    assert (block["type"], value["stop_reason"]) == ("thinking", "max_tokens")
    assert value["usage"]["output_tokens_details"]["thinking_tokens"] == value["usage"]["output_tokens"] == 12
    raw = thinker.post("/v1/messages", {**body, "stream": True}).text
    data = [json.loads(line.removeprefix("data: ")) for line in raw.splitlines() if line.startswith("data: ")]
    deltas = [event["delta"]["thinking"] for event in data if event["type"] == "content_block_delta"]
    assert "".join(deltas) == block["thinking"]
