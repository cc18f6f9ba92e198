"""/v1/chat/completions beyond its plain form, with OpenAI's own client and by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from .conftest import StartServer
from .running import Server

TALK: Any = [{"role": "user", "content": "What does sinfo do?"}]
STORY: Any = [{"role": "user", "content": "Tell me a story"}]


@pytest.fixture
def client(demo_server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{demo_server.url}/v1", api_key=demo_server.key, max_retries=0) as found:
        yield found


def post(server: Server, status: int = 200, **fields: Any) -> Any:
    answer = server.post("/v1/chat/completions", {"messages": TALK, "temperature": 0, **fields})
    assert answer.status == status, answer.text
    return answer.json()


def chunks_of(server: Server, **fields: Any) -> list[Any]:
    body = {"messages": TALK, "temperature": 0, "stream": True, **fields}
    *chunks, done = server.post("/v1/chat/completions", body).events()
    assert done == "[DONE]"
    return chunks


def text_by_index(chunks: list[Any]) -> dict[int, str]:
    found: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            found[choice["index"]] = found.get(choice["index"], "") + choice["delta"].get("content", "")
    return found


def test_the_sdk_streams_what_it_gets_whole(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="demo", messages=TALK, temperature=0)
    assert whole.choices[0].message.content == "`sinfo` lists the partitions and the state of their nodes."
    assert whole.choices[0].finish_reason == "stop"
    parts = client.chat.completions.create(
        model="demo", messages=TALK, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(parts)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert last.choices == []
    assert last.usage == whole.usage


def test_the_sdk_adds_up_a_stream(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="demo", messages=TALK, temperature=0) as stream:
        message = stream.get_final_completion().choices[0].message
    assert (message.role, message.content) == (
        "assistant",
        "`sinfo` lists the partitions and the state of their nodes.",
    )


def test_every_delta_tells_the_role_to_other_clients(demo_server: Server) -> None:
    assert {c["choices"][0]["delta"]["role"] for c in chunks_of(demo_server, max_tokens=4)} == {"assistant"}


def test_several_answers_with_a_seed(demo_server: Server) -> None:
    fields = {"messages": STORY, "n": 3, "temperature": 1.2, "seed": 11, "max_tokens": 24}
    first, again = post(demo_server, **fields), post(demo_server, **fields)
    texts = [choice["message"]["content"] for choice in first["choices"]]
    assert [choice["index"] for choice in first["choices"]] == [0, 1, 2]
    assert texts == [choice["message"]["content"] for choice in again["choices"]]
    assert len(set(texts)) == 3
    assert text_by_index(chunks_of(demo_server, **fields)) == dict(enumerate(texts))
    assert first["usage"]["completion_tokens"] <= 3 * 24
    assert texts[0] == post(demo_server, **{**fields, "n": 1})["choices"][0]["message"]["content"]


def test_several_answers_compute_their_prompt_once(demo_server: Server) -> None:
    name = "penstock_prefix_hit_tokens_total"
    before = demo_server.metric(name)
    talk = [{"role": "user", "content": "a fresh prompt of some length, " * 20}]
    prompt = post(demo_server, messages=talk, n=4, max_tokens=2)["usage"]["prompt_tokens"]
    assert demo_server.metric(name) - before >= 3 * (prompt - 16)


def test_logprobs(demo_server: Server) -> None:
    fields = {"logprobs": True, "top_logprobs": 3, "max_tokens": 8}
    choice = post(demo_server, **fields)["choices"][0]
    content = choice["logprobs"]["content"]
    assert len(content) == 8
    assert "".join(token["token"] for token in content) == choice["message"]["content"]
    for token in content:
        assert bytes(token["bytes"]).decode() == token["token"]
        assert len(token["top_logprobs"]) == 3
        best = token["top_logprobs"][0]
        assert (best["token"], best["logprob"]) == (token["token"], token["logprob"])  # greedy: the very same number
        assert [t["logprob"] for t in token["top_logprobs"]] == sorted(
            (t["logprob"] for t in token["top_logprobs"]), reverse=True
        )
    streamed = [t for c in chunks_of(demo_server, **fields) for t in c["choices"][0]["logprobs"]["content"]]
    assert streamed == content
    assert post(demo_server, max_tokens=2)["choices"][0]["logprobs"] is None


def test_usage_in_every_chunk(demo_server: Server) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = chunks_of(demo_server, max_tokens=5, stream_options=options)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 4, 5, 5]
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {9}


def test_stops(demo_server: Server) -> None:
    text = post(demo_server)["choices"][0]["message"]["content"]
    choice = post(demo_server, stop=["zork", "and"])["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (text[: text.index("and")], "stop")
    kept = post(demo_server, stop="and", include_stop_str_in_output=True)["choices"][0]
    assert kept["message"]["content"] == text[: text.index("and") + 3]
    first = demo_server.post("/tokenize", {"prompt": text, "add_special_tokens": False}).json()["tokens"]
    ended = post(demo_server, stop_token_ids=[first[2]])["choices"][0]
    assert ended["finish_reason"] == "stop"
    assert text.startswith(ended["message"]["content"])
    assert len(ended["message"]["content"]) < len(text)


def test_length_beyond_the_end(demo_server: Server) -> None:
    short = post(demo_server)["usage"]["completion_tokens"]
    assert post(demo_server, max_tokens=40, ignore_eos=True)["usage"]["completion_tokens"] == 40
    assert post(demo_server, max_tokens=40, min_tokens=30)["usage"]["completion_tokens"] >= 30 > short


def test_biases(demo_server: Server) -> None:
    chosen = demo_server.post("/tokenize", {"prompt": "fox", "add_special_tokens": False}).json()["tokens"]
    choice = post(demo_server, logit_bias={str(chosen[0]): 100}, max_tokens=5)["choices"][0]
    one = demo_server.post("/detokenize", {"tokens": chosen[:1]}).json()["prompt"]
    assert choice["message"]["content"] == one * 5
    plain = post(demo_server, max_tokens=1, logprobs=True)["choices"][0]["logprobs"]["content"][0]["token"]
    backtick = demo_server.post("/tokenize", {"prompt": plain, "add_special_tokens": False}).json()["tokens"][0]
    assert (
        post(demo_server, max_tokens=1, logit_bias={str(backtick): -100})["choices"][0]["message"]["content"] != plain
    )


def test_penalties_count_the_output(demo_server: Server) -> None:
    chosen = demo_server.post("/tokenize", {"prompt": "fox", "add_special_tokens": False}).json()["tokens"][0]
    fields = {"logit_bias": {str(chosen): 30}, "max_tokens": 24, "ignore_eos": True}
    assert len(set(_tokens(post(demo_server, **fields)))) == 1
    counted = _tokens(post(demo_server, frequency_penalty=2, **fields))
    once = _tokens(post(demo_server, presence_penalty=2, **fields))
    assert len(set(counted)) > 1  # 2 for every time it is said: after some fifteen it costs more than the bias gives
    assert len(set(once)) == 1  # 2 once is less than the bias


def _tokens(completion: Any) -> list[str]:
    text = completion["choices"][0]["message"]["content"]
    return [text[i : i + 3] for i in range(0, len(text), 3)]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"n": 0}, "n", "`n` must be > 0"),
        ({"n": 1000}, "n", "`n` must be > 0"),
        ({"top_logprobs": 21}, "top_logprobs", "<= 20"),
        ({"temperature": -1}, "temperature", "`temperature` must be"),
        ({"top_p": 0}, "top_p", "`top_p` must be"),
        ({"min_p": 2}, "min_p", "`min_p` must be"),
        ({"presence_penalty": 3}, "presence_penalty", "`presence_penalty` must be"),
        ({"frequency_penalty": -3}, "frequency_penalty", "`frequency_penalty` must be"),
        ({"logit_bias": {"fox": 1}}, "logit_bias", "token ids"),
        ({"logit_bias": {"3": 101}}, "logit_bias", "<= 100"),
        ({"logit_bias": {"999999": 1}}, "logit_bias", "`logit_bias`: token id 999999 is outside"),
        ({"logit_bias": {str(n): 1 for n in range(1025)}}, "logit_bias", "`logit_bias` must have at most 1024"),
        ({"stop_token_ids": [3, -1]}, "stop_token_ids", "`stop_token_ids`: token id -1 is outside"),
        ({"stop_token_ids": [3] * 257}, "stop_token_ids", "`stop_token_ids` must have at most 256"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "up to 4 stop sequences"),
        ({"min_tokens": -1}, "min_tokens", "`min_tokens` must be"),
        ({"max_tokens": 0}, "max_tokens", "strictly positive"),
        ({"max_tokens": 3, "max_completion_tokens": 3}, "max_tokens", "not both"),
        ({"messages": []}, "messages", "cannot be empty"),
        ({"messages": [{"role": "user"}]}, "messages", "messages[0] has no `content`"),
        ({"functions": [{}]}, "functions", "use `tools`"),
        ({"audio": {"voice": "x"}}, "audio", "`audio` is not supported"),
        ({"modalities": ["text", "audio"]}, "modalities", "`modalities` is not supported"),
        ({"chat_template": "{{ 1 }}"}, "chat_template", "--chat-template"),
        ({"response_format": {"type": "structural_tag"}}, "response_format", "structural_tag"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "contradict"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs", "exactly one"),
        ({"best_of": 2}, "best_of", "`best_of` is not supported"),
        ({"prompt_logprobs": 1}, "prompt_logprobs", "not supported"),
    ],
)
def test_refusals_name_the_field(demo_server: Server, fields: dict[str, Any], param: str, words: str) -> None:
    for stream in (False, True):
        answer = demo_server.post("/v1/chat/completions", {"messages": TALK, "stream": stream, **fields})
        assert answer.status == 422
        error = answer.json()["error"]
        assert (error["param"], error["type"]) == (param, "invalid_request_error")
        assert words in error["message"]
        assert answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "video_url"])
def test_parts_that_are_no_text_are_refused_by_name(demo_server: Server, kind: str) -> None:
    content = [{"type": "text", "text": "what is this?"}, {"type": kind, kind: {"url": "x"}}]
    error = post(demo_server, 422, messages=[{"role": "user", "content": content}])["error"]
    assert f"`{kind}` is not supported" in error["message"]
    assert error["param"] == "messages[0].content"


def test_unknown_fields_are_named_in_a_header(demo_server: Server) -> None:
    body = {
        "messages": TALK,
        "max_tokens": 1,
        "zork": 1,
        "a\r\nb": 2,
        "user": "me",
        "store": True,
        "metadata": {"a": "b"},
    }
    answer = demo_server.post("/v1/chat/completions", body)
    assert answer.status == 200
    assert answer.headers["x-penstock-ignored"] == "zork"
    assert (
        "x-penstock-ignored"
        not in demo_server.post("/v1/chat/completions", {"messages": TALK, "max_tokens": 1}).headers
    )


def test_a_strict_server_refuses_them(start_server: StartServer, tiny_llama: Path) -> None:
    server = start_server(tiny_llama, "--strict")
    body = {"messages": [{"role": "user", "content": "the"}], "max_tokens": 1}
    assert server.post("/v1/chat/completions", {**body, "user": "me", "n": 1}).status == 200
    for path, fields in (
        ("/v1/chat/completions", body),
        ("/v1/completions", {"prompt": "the", "max_tokens": 1}),
        ("/v1/embeddings", {"input": "the"}),
        ("/v1/responses", {"input": "the", "max_output_tokens": 1}),
        ("/v1/messages", body),
    ):
        answer = server.post(path, {**fields, "zork": 1})
        assert answer.status == 400, path
        assert "`zork`" in answer.text


def test_conversations(client: openai.OpenAI, demo_server: Server) -> None:
    talk: Any = [
        {"role": "developer", "content": "Be brief.", "name": "boss"},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}], "name": ""},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{\"where\": \"here\"}"}},
        ]},
        {"role": "tool", "tool_call_id": "call_1", "content": "nothing"},
        {"role": "user", "content": "What does sinfo do?"},
    ]  # fmt: skip
    assert client.chat.completions.create(model="demo", messages=talk, max_tokens=3).choices[0].message.content
    count = demo_server.post("/tokenize", {"messages": talk}).json()["count"]
    assert count > demo_server.post("/tokenize", {"messages": talk[-1:]}).json()["count"]


def test_the_last_message_is_continued(demo_server: Server) -> None:
    said = "`sinfo` lists the"
    talk = [*TALK, {"role": "assistant", "content": said}]
    for fields in ({}, {"continue_final_message": True, "add_generation_prompt": False}):
        text = post(demo_server, messages=talk, **fields)["choices"][0]["message"]["content"]
        assert said + text == "`sinfo` lists the partitions and the state of their nodes."


def test_errors_of_the_sdk(client: openai.OpenAI) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        client.chat.completions.create(model="demo", messages=TALK, extra_body={"functions": [{}]})
    assert caught.value.param == "functions"
    assert caught.value.request_id
    with pytest.raises(openai.NotFoundError, match="Names: demo"):
        client.chat.completions.create(model="gpt-9", messages=TALK)
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("some/other")


def test_a_client_that_leaves_ends_all_its_answers(demo_server: Server) -> None:
    body = {"messages": STORY, "n": 4, "stream": True, "max_tokens": 900, "ignore_eos": True}
    with demo_server.stream("/v1/chat/completions", body) as response:
        assert response.status == 200
        response.readline()
    demo_server.wait_idle()


def test_events_are_framed_to_the_letter(demo_server: Server) -> None:
    body = {"messages": TALK, "max_tokens": 3, "stream": True}
    raw = demo_server.post("/v1/chat/completions", body).body
    assert b"\r" not in raw
    frames = raw.split(b"\n\n")
    assert frames.pop() == b""
    assert frames.pop() == b"data: [DONE]"
    for frame in frames:
        json.loads(frame.removeprefix(b"data: "))
