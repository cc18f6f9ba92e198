"""langchain-openai: ChatOpenAI and OpenAI, with chunks, tools and structured output."""

from __future__ import annotations

import asyncio
from typing import Literal

from checks import ANSWER, KEY, MODEL, QUESTION, RECORD, SCHEMA, SIGHTING, URL, run
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

chat = ChatOpenAI(model=MODEL, base_url=f"{URL}/v1", api_key=KEY, temperature=0, stream_usage=True)


@tool
def get_weather(city: Literal["Rome", "Oslo"]) -> str:
    """The weather at a place."""
    return f"sunny in {city}"


def check_chat() -> None:
    answer = chat.invoke(QUESTION)
    assert answer.content == ANSWER
    assert answer.usage_metadata["output_tokens"] > 5
    assert answer.response_metadata["finish_reason"] == "stop"
    chat.invoke([SystemMessage("Be brief."), HumanMessage([{"type": "text", "text": QUESTION}])])


def check_chat_stream() -> None:
    chunks = list(chat.stream(QUESTION))
    assert "".join(chunk.content for chunk in chunks) == ANSWER
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert whole.usage_metadata["output_tokens"] > 5


def check_batch_and_async() -> None:
    assert [answer.content for answer in chat.batch([QUESTION] * 4)] == [ANSWER] * 4
    assert asyncio.run(chat.ainvoke(QUESTION)).content == ANSWER


def check_logprobs() -> None:
    answer = chat.bind(logprobs=True, top_logprobs=2, max_tokens=3).invoke(QUESTION)
    assert len(answer.response_metadata["logprobs"]["content"]) == 3


def check_structured_output() -> None:
    schema = {"title": "sighting", "description": "A sighting", **SCHEMA}
    for method in ("json_schema", "function_calling"):
        found = chat.with_structured_output(schema, method=method).invoke(SIGHTING)
        assert set(found) == set(RECORD), (method, found)


def check_tools() -> None:
    answer = chat.bind_tools([get_weather], tool_choice="any", parallel_tool_calls=False).invoke(QUESTION)
    assert answer.tool_calls[0]["name"] == "get_weather"
    assert answer.tool_calls[0]["args"]["city"] in ("Rome", "Oslo")
    assert chat.bind_tools([get_weather]).invoke(QUESTION).content


def check_completions() -> None:
    text = OpenAI(model=MODEL, base_url=f"{URL}/v1", api_key=KEY, temperature=0, max_tokens=12)
    whole = text.invoke("Once upon a time")
    assert len(whole) > 12
    assert "".join(text.stream("Once upon a time")) == whole


def check_embeddings() -> None:
    embeddings = OpenAIEmbeddings(
        model=MODEL, base_url=f"{URL}/v1", api_key=KEY, check_embedding_ctx_length=False
    ).embed_documents(["a fox", "sbatch"])
    assert [len(vector) for vector in embeddings] == [256, 256]


def check_responses() -> None:
    answer = ChatOpenAI(model=MODEL, base_url=f"{URL}/v1", api_key=KEY, temperature=0, use_responses_api=True).invoke(
        QUESTION
    )
    assert answer.text == ANSWER


run(globals())
