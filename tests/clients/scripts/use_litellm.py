"""LiteLLM with the providers that point at a server of one's own."""

from __future__ import annotations

import asyncio
import json

import litellm
from checks import ANSWER, KEY, MODEL, RECORD, SCHEMA, SIGHTING, TALK, URL, WEATHER, refused, run

OURS = {"api_base": f"{URL}/v1", "api_key": KEY, "temperature": 0}
CHAT = (f"openai/{MODEL}", f"hosted_vllm/{MODEL}")


def check_chat() -> None:
    for name in CHAT:
        answer = litellm.completion(model=name, messages=TALK, max_tokens=64, **OURS)
        assert answer.choices[0].message.content == ANSWER
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage.completion_tokens > 5


def check_chat_stream() -> None:
    for name in CHAT:
        chunks = litellm.completion(
            model=name, messages=TALK, stream=True, stream_options={"include_usage": True}, **OURS
        )
        chunks = list(chunks)
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == ANSWER
        assert chunks[-1].usage.completion_tokens > 5


def check_async() -> None:
    async def ask() -> str:
        answer = await litellm.acompletion(model=CHAT[0], messages=TALK, **OURS)
        return answer.choices[0].message.content

    assert asyncio.run(ask()) == ANSWER


def check_completions() -> None:
    ask = {"model": f"text-completion-openai/{MODEL}", "prompt": "Once upon a time", "max_tokens": 8, **OURS}
    whole = litellm.text_completion(**ask).choices[0].text
    assert whole
    assert "".join(chunk.choices[0].text or "" for chunk in litellm.text_completion(**ask, stream=True)) == whole


def check_huggingface() -> None:
    answer = litellm.completion(
        model="huggingface/tgi", messages=TALK, api_base=f"{URL}/v1/chat/completions", api_key=KEY, temperature=0
    )
    assert answer.choices[0].message.content == ANSWER


def check_schema_and_tools() -> None:
    form = {"type": "json_schema", "json_schema": {"name": "sighting", "schema": SCHEMA, "strict": True}}
    talk = [{"role": "user", "content": SIGHTING}]
    answer = litellm.completion(model=CHAT[1], messages=talk, response_format=form, **OURS)
    assert json.loads(answer.choices[0].message.content) == RECORD
    call = litellm.completion(model=CHAT[0], messages=TALK, tools=[WEATHER], tool_choice="required", **OURS)
    assert call.choices[0].message.tool_calls[0].function.name == "get_weather"


def check_embeddings() -> None:
    made = litellm.embedding(model=f"openai/{MODEL}", input=["a fox"], api_base=f"{URL}/v1", api_key=KEY)
    assert len(made.data[0]["embedding"]) == 256


def check_errors() -> None:
    def ask(**fields: object) -> object:
        return litellm.completion(**{"model": CHAT[0], "messages": TALK, "max_retries": 0, **OURS, **fields})

    refused(litellm.AuthenticationError, lambda: ask(api_key="not-the-key"))
    refused(litellm.NotFoundError, lambda: ask(model="openai/gpt-9"))
    # 422 has a class of its own in openai's SDK, and LiteLLM's mapping depends on its version
    refused((litellm.BadRequestError, litellm.UnprocessableEntityError), lambda: ask(top_p=3))


run(globals())
