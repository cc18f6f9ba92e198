"""The openai SDK, 2.x and 3.x: every kind of call it has that the server offers."""

from __future__ import annotations

import asyncio
import importlib
import json
import os

import openai
import pydantic
from checks import ANSWER, KEY, MODEL, QUESTION, RECORD, SCHEMA, SIGHTING, TALK, URL, WEATHER, refused, run

client = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY, timeout=60)


class Sighting(pydantic.BaseModel):
    """What the demo model reads out of a sentence."""

    model_config = pydantic.ConfigDict(extra="forbid")
    location: str
    activity: str
    animals_seen: int
    animals: list[str]


def check_models() -> None:
    assert MODEL in [model.id for model in client.models.list()]
    assert client.models.retrieve(MODEL).id == MODEL


def check_chat() -> None:
    chat = client.chat.completions.create(model=MODEL, messages=TALK, temperature=0, max_tokens=64)
    assert chat.object == "chat.completion"
    assert chat.choices[0].message.content == ANSWER
    assert chat.choices[0].message.role == "assistant"
    assert chat.choices[0].finish_reason == "stop"
    assert chat.usage.total_tokens == chat.usage.prompt_tokens + chat.usage.completion_tokens


def check_chat_stream() -> None:
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=TALK, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == ANSWER
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens > 5
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["stop"]


def check_chat_stream_helper() -> None:
    with client.chat.completions.stream(model=MODEL, messages=TALK, temperature=0) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.content == ANSWER


def check_chat_content_parts_and_roles() -> None:
    parts = [{"type": "text", "text": QUESTION}]
    for role in ("system", "developer"):
        talk = [{"role": role, "content": "Be brief."}, {"role": "user", "content": parts, "name": "ada"}]
        chat = client.chat.completions.create(model=MODEL, messages=talk, temperature=0, max_completion_tokens=8)
        assert chat.choices[0].message.content


def check_chat_sampling() -> None:
    ask = {"model": MODEL, "messages": TALK, "max_tokens": 12, "temperature": 1.5, "top_p": 0.95}
    first, second = (client.chat.completions.create(**ask, seed=7, n=2) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1]
    assert texts == [choice.message.content for choice in second.choices]
    biased = client.chat.completions.create(
        model=MODEL, messages=TALK, temperature=0, max_tokens=3, presence_penalty=0.5, frequency_penalty=0.5,
        logit_bias={"500": 100},
    )  # fmt: skip
    assert biased.choices[0].message.content != ANSWER[: len(biased.choices[0].message.content)]


def check_chat_stop() -> None:
    chat = client.chat.completions.create(model=MODEL, messages=TALK, temperature=0, stop=["lists", "never"])
    assert chat.choices[0].message.content == ANSWER[: ANSWER.index("lists")]
    assert chat.choices[0].finish_reason == "stop"


def check_chat_logprobs() -> None:
    chat = client.chat.completions.create(
        model=MODEL, messages=TALK, temperature=0, max_tokens=5, logprobs=True, top_logprobs=3
    )
    content = chat.choices[0].logprobs.content
    assert len(content) == 5
    for token in content:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob == token.logprob  # greedy takes the best
        assert bytes(token.bytes).decode() == token.token


def check_completions() -> None:
    prompt = "Once upon a time"
    whole = client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=12)
    assert whole.object == "text_completion"
    assert len(whole.choices[0].text) > 12
    assert whole.choices[0].finish_reason == "length"
    stream = client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=12, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text
    many = client.completions.create(model=MODEL, prompt=[prompt, "The old"], temperature=0, max_tokens=4, n=1)
    assert [choice.index for choice in many.choices] == [0, 1]


def check_completions_echo_and_logprobs() -> None:
    done = client.completions.create(
        model=MODEL, prompt="Once upon a time", temperature=0, max_tokens=2, echo=True, logprobs=2
    )
    choice = done.choices[0]
    assert choice.text.startswith("Once upon a time")
    assert choice.logprobs.token_logprobs[0] is None
    assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs) == len(choice.logprobs.text_offset)
    assert len(choice.logprobs.tokens) == done.usage.prompt_tokens + 2


def check_embeddings() -> None:
    one = client.embeddings.create(model=MODEL, input=["a fox", "a red fox", "sbatch"], encoding_format="float")
    assert [item.index for item in one.data] == [0, 1, 2]
    assert len(one.data[0].embedding) == 256
    packed = client.embeddings.create(model=MODEL, input="a fox")  # the SDK asks for base64 here
    assert max(abs(a - b) for a, b in zip(packed.data[0].embedding, one.data[0].embedding, strict=True)) < 1e-6


def check_structured_output() -> None:
    talk = [{"role": "user", "content": SIGHTING}]
    chat = client.chat.completions.create(
        model=MODEL, messages=talk, temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "sighting", "strict": True, "schema": SCHEMA}},
    )  # fmt: skip
    assert json.loads(chat.choices[0].message.content) == RECORD
    parsed = client.chat.completions.parse(model=MODEL, messages=talk, temperature=0, response_format=Sighting)
    assert parsed.choices[0].message.parsed == Sighting(**RECORD)
    free = client.chat.completions.create(
        model=MODEL, messages=talk, temperature=0, response_format={"type": "json_object"}
    )
    assert isinstance(json.loads(free.choices[0].message.content), dict)


def check_tools() -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    ask = {"model": MODEL, "messages": TALK, "tools": [WEATHER], "temperature": 0, "parallel_tool_calls": False}
    for choice in ("required", named):
        chat = client.chat.completions.create(**ask, tool_choice=choice)
        (call,) = chat.choices[0].message.tool_calls
        assert (call.type, call.function.name) == ("function", "get_weather")
        assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")
        assert chat.choices[0].finish_reason in ("tool_calls", "stop")
        chunks = list(client.chat.completions.create(**ask, tool_choice=choice, stream=True))
        deltas = [d for c in chunks if c.choices for d in c.choices[0].delta.tool_calls or []]
        assert {delta.index for delta in deltas} == {0}
        assert "".join(delta.function.name or "" for delta in deltas) == "get_weather"
        assert "".join(delta.function.arguments or "" for delta in deltas) == call.function.arguments
        assert [delta.id for delta in deltas if delta.id]
    talk = [
        *TALK,
        {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    after = client.chat.completions.create(model=MODEL, messages=talk, tools=[WEATHER], max_tokens=16)
    assert after.choices[0].finish_reason
    assert client.chat.completions.create(**ask, tool_choice="auto").choices[0].message.content == ANSWER
    assert client.chat.completions.create(**ask, tool_choice="none").choices[0].message.content == ANSWER


def check_responses() -> None:
    ask = {"model": MODEL, "input": QUESTION, "instructions": "Answer.", "temperature": 0}
    done = client.responses.create(**ask)
    assert done.status == "completed"
    assert done.output_text
    assert done.usage.output_tokens > 0
    events = list(client.responses.create(**ask, stream=True))
    assert events[0].type == "response.created"
    assert events[-1].type == "response.completed"
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == done.output_text
    with client.responses.stream(model=MODEL, input=TALK, temperature=0) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == ANSWER


def check_async() -> None:
    async def both() -> None:
        async with openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key=KEY) as other:

            async def one() -> str:
                parts = []
                async for chunk in await other.chat.completions.create(
                    model=MODEL, messages=TALK, temperature=0, stream=True
                ):
                    parts += [choice.delta.content or "" for choice in chunk.choices]
                return "".join(parts)

            assert await asyncio.gather(*(one() for _ in range(8))) == [ANSWER] * 8

    asyncio.run(both())


def check_unix_socket() -> None:
    http = openai.DefaultHttpxClient  # 2.x builds on httpx, 3.x on httpx2
    library = importlib.import_module(http.__mro__[1].__module__.partition(".")[0])
    connection = library.HTTPTransport(uds=os.environ["PENSTOCK_UDS"])
    other = openai.OpenAI(
        base_url="http://localhost/v1", api_key=os.environ["PENSTOCK_UDS_KEY"], http_client=http(transport=connection)
    )
    chat = other.chat.completions.create(model=MODEL, messages=TALK, temperature=0)
    assert chat.choices[0].message.content == ANSWER


def check_raw_headers() -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=TALK, max_tokens=1, extra_headers={"X-Request-ID": "mine-1"}
    )
    assert raw.headers["x-request-id"] == "mine-1"
    assert raw.parse()._request_id == "mine-1"


def check_vendor_fields() -> None:
    chat = client.chat.completions.create(
        model=MODEL, messages=TALK, max_tokens=40,
        extra_body={"ignore_eos": True, "top_k": 1, "repetition_penalty": 1.0, "min_p": 0.01, "made_up_field": 1},
    )  # fmt: skip
    assert chat.usage.completion_tokens == 40


def check_errors() -> None:
    def ask(other: openai.OpenAI = client, **fields: object) -> object:
        return other.chat.completions.create(**{"model": MODEL, "messages": TALK, **fields})

    assert refused(openai.NotFoundError, lambda: ask(model="gpt-9")).body["code"]
    assert "top_p" in refused(openai.APIStatusError, lambda: ask(top_p=3)).body["message"]
    assert refused(openai.APIStatusError, lambda: ask(messages=[])).status_code in (400, 422)
    # known before the stream starts, so a status and not an event
    assert refused(openai.APIStatusError, lambda: ask(top_p=3, stream=True)).status_code in (400, 422)
    stranger = openai.OpenAI(base_url=f"{URL}/v1", api_key="not-the-key", max_retries=0)
    assert refused(openai.AuthenticationError, lambda: ask(stranger)).status_code == 401


run(globals())
