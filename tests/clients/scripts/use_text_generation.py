"""TGI's own client, text-generation 0.7.0, as its users have it.

Its `chat(stream=True)` is left out: it demands a field `tool_calls` in every chunk, which TGI does not send either.
"""

from __future__ import annotations

import asyncio

from checks import ANSWER, KEY, TALK, URL, WEATHER, refused, run
from text_generation import AsyncClient, Client
from text_generation.errors import ValidationError

HEADERS = {"Authorization": f"Bearer {KEY}"}
client = Client(URL, headers=HEADERS, timeout=60)
PROMPT = "Once upon a time"


def check_generate() -> None:
    whole = client.generate(PROMPT, max_new_tokens=10, decoder_input_details=True)
    assert whole.details.finish_reason == "length"
    assert whole.details.generated_tokens == len(whole.details.tokens) == 10
    events = list(client.generate_stream(PROMPT, max_new_tokens=10))
    assert "".join(event.token.text for event in events) == whole.generated_text
    assert events[-1].generated_text == whole.generated_text
    assert events[-1].details.generated_tokens == 10


def check_parameters() -> None:
    best = client.generate(
        PROMPT, do_sample=True, best_of=2, temperature=0.9, top_k=30, top_p=0.9, typical_p=0.95, truncate=6,
        repetition_penalty=1.1, max_new_tokens=6, watermark=True, top_n_tokens=2,
    )  # fmt: skip
    assert len(best.details.best_of_sequences) == 1
    assert best.details.seed is not None
    stopped = client.generate(PROMPT, max_new_tokens=60, stop_sequences=["."])
    assert stopped.details.finish_reason == "stop_sequence"


def check_async() -> None:
    async def ask() -> None:
        other = AsyncClient(URL, headers=HEADERS, timeout=60)
        whole = await other.generate(PROMPT, max_new_tokens=6)
        text = ""
        async for event in other.generate_stream(PROMPT, max_new_tokens=6):
            text += event.token.text
        assert text == whole.generated_text

    asyncio.run(ask())


def check_chat() -> None:
    chat = client.chat(TALK, max_tokens=40, temperature=0.0001, seed=1)
    assert chat.choices[0].message.content == ANSWER
    assert chat.usage["completion_tokens"] > 5


def check_chat_tools() -> None:
    chat = client.chat(TALK, max_tokens=60, seed=1, tools=[WEATHER], tool_choice="get_weather")
    assert chat.choices[0].message.tool_calls[0]["function"]["name"] == "get_weather"


def check_errors() -> None:
    many = ["a", "b", "c", "d", "e"]
    error = refused(ValidationError, lambda: client.generate(PROMPT, max_new_tokens=4, stop_sequences=many))
    assert "stop" in str(error)


run(globals())
