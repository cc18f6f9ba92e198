"""/v1/chat/completions in its plain form, and /v1/models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .running import Server

TALK = [{"role": "user", "content": "the quick"}]


def chat(server: Server, **fields: Any) -> Any:
    answer = server.post("/v1/chat/completions", {"messages": TALK, "temperature": 0, **fields})
    assert answer.status == 200, answer.text
    return answer.json()


def test_models(server: Server, tiny_llama: Path) -> None:
    value = server.get("/v1/models").json()
    (model,) = value["data"]
    assert value["object"] == "list"
    assert (model["id"], model["object"], model["max_model_len"]) == (str(tiny_llama), "model", 512)


def test_a_whole_completion(server: Server, tiny_llama: Path) -> None:
    value = chat(server, max_tokens=6)
    assert list(value) == [
        "object", "id", "created", "model", "system_fingerprint", "choices", "usage",
    ]  # fmt: skip
    assert value["object"] == "chat.completion"
    assert value["model"] == str(tiny_llama)
    (choice,) = value["choices"]
    assert list(choice) == ["index", "message", "logprobs", "finish_reason"]
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] == "length"
    # The template prints BOS itself, so none is added.
    prompt = server.post("/tokenize", {"inputs": "<|user|>the quick\n<|assistant|>"}).json()
    usage = value["usage"]
    assert usage["prompt_tokens"] == len(prompt)
    assert (usage["completion_tokens"], usage["total_tokens"]) == (6, 6 + len(prompt))


def test_the_prompt_is_the_models_template(server: Server) -> None:
    body = {"inputs": "<|user|>the quick\n<|assistant|>", "parameters": {"max_new_tokens": 6}}
    native = server.post("/generate", body).json()["generated_text"]
    assert chat(server, max_completion_tokens=6)["choices"][0]["message"]["content"] == native


def test_streaming_equals_whole_answers(server: Server) -> None:
    whole = chat(server, max_tokens=12)
    body = {
        "messages": TALK, "temperature": 0, "max_tokens": 12,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    answer = server.post("/v1/chat/completions", body)
    *chunks, usage, done = answer.events()
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 12
    assert all(chunk["usage"] is None for chunk in chunks)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks)
    assert text == whole["choices"][0]["message"]["content"]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["length"]
    assert {chunk["choices"][0]["delta"]["role"] for chunk in chunks} == {"assistant"}


def test_a_stop_string_is_left_out(server: Server) -> None:
    text = chat(server, max_tokens=24)["choices"][0]["message"]["content"]
    stop = text[6:9]
    choice = chat(server, max_tokens=24, stop=stop)["choices"][0]
    assert choice["message"]["content"] == text[: text.index(stop)]
    assert choice["finish_reason"] == "stop"
    answer = server.post(
        "/v1/chat/completions",
        {"messages": TALK, "temperature": 0, "max_tokens": 24, "stop": [stop], "stream": True},
    )
    chunks = [e for e in answer.events() if e != "[DONE]"]
    assert "".join(c["choices"][0]["delta"]["content"] for c in chunks) == text[: text.index(stop)]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_content_may_be_a_list_of_text_parts(server: Server) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "quick"}]}]
    value = server.post("/v1/chat/completions", {"messages": parts, "temperature": 0, "max_tokens": 6}).json()
    assert value["choices"] == chat(server, max_tokens=6)["choices"]


@pytest.mark.parametrize("model", ["tgi", "dummy", "default"])
def test_aliases_of_the_model(server: Server, model: str) -> None:
    assert chat(server, max_tokens=1, model=model)


def test_an_unknown_model_is_told_the_names(server: Server, tiny_llama: Path) -> None:
    answer = server.post("/v1/chat/completions", {"messages": TALK, "model": "gpt-9"})
    assert answer.status == 404
    assert str(tiny_llama) in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("functions", [{"name": "f"}]),
        ("bad_words", ["a"]),
        ("audio", {"voice": "x"}),
        ("prompt_logprobs", 1),
        ("use_beam_search", True),
        ("chat_template", "{{ 1 }}"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(server: Server, field: str, value: Any) -> None:
    answer = server.post("/v1/chat/completions", {"messages": TALK, "max_tokens": 1, field: value})
    assert answer.status == 422
    error = answer.json()["error"]
    assert error["param"] == field
    assert f"`{field}`" in error["message"]


def test_neutral_values_and_unknown_fields_pass(server: Server) -> None:
    fields = {
        "n": 1, "logprobs": False, "logit_bias": {}, "presence_penalty": 0, "frequency_penalty": 0.0,
        "response_format": {"type": "text"}, "tools": [], "tool_choice": "none", "user": "me", "stop": None,
        "stream_options": None, "parallel_tool_calls": True, "top_p": 1.0, "whatever": {"a": 1},
    }  # fmt: skip
    assert chat(server, max_tokens=1, **fields)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"content": "x"}]}, "role"),
        ({"messages": [{"role": "user"}]}, "content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "image_url"),
        ({"messages": TALK, "max_tokens": 0}, "max_new_tokens"),
        ({"messages": TALK, "max_tokens": -1}, "max_tokens"),
        ({"messages": TALK, "max_tokens": 1, "max_completion_tokens": 1}, "max_tokens"),
        ({"messages": TALK, "temperature": -1}, "temperature"),
        ({"messages": TALK, "top_p": 0}, "top_p"),
        ({"messages": TALK, "top_p": 1.5}, "top_p"),
        ({"messages": TALK, "seed": -1}, "seed"),
        ({"messages": TALK, "stop": ["a"] * 5}, "stop"),
        ({"messages": TALK, "max_tokens": 10**6}, "max_new_tokens"),
        ({"messages": [{"role": "user", "content": "fox " * 2000}]}, "tokens"),
    ],
)
def test_bad_requests_are_422_in_openais_shape(server: Server, body: Any, words: str) -> None:
    answer = server.post("/v1/chat/completions", body)
    assert answer.status == 422, answer.text
    error = answer.json()["error"]
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"
    assert "Traceback" not in answer.text
