"""huggingface_hub's InferenceClient: text generation on TGI's root path, chat on /v1."""

from __future__ import annotations

import json

from checks import ANSWER, KEY, QUESTION, RECORD, SCHEMA, SIGHTING, TALK, URL, WEATHER, refused, run
from huggingface_hub import InferenceClient
from huggingface_hub.errors import ValidationError

client = InferenceClient(model=URL, token=KEY, timeout=60)
PROMPT = "Once upon a time"


def check_text_generation() -> None:
    text = client.text_generation(PROMPT, max_new_tokens=12, return_full_text=False)
    assert len(text) > 12
    assert client.text_generation(PROMPT, max_new_tokens=12) == PROMPT + text  # TGI's root path gives the whole
    assert "".join(client.text_generation(PROMPT, max_new_tokens=12, stream=True)) == text


def check_text_generation_details() -> None:
    whole = client.text_generation(PROMPT, max_new_tokens=12, details=True, decoder_input_details=True, top_n_tokens=2)
    assert whole.details.finish_reason == "length"
    assert whole.details.generated_tokens == len(whole.details.tokens) == 12
    assert len(whole.details.top_tokens) == 12
    assert min(len(top) for top in whole.details.top_tokens) >= 2  # equal scores come together
    assert whole.details.prefill is not None
    events = list(client.text_generation(PROMPT, max_new_tokens=12, details=True, stream=True))
    assert [e.token.id for e in events] == [t.id for t in whole.details.tokens]
    assert events[-1].details.finish_reason == "length"
    assert events[-1].generated_text == whole.generated_text


def check_text_generation_parameters() -> None:
    ask = {
        "do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "typical_p": 0.9, "repetition_penalty": 1.1,
        "frequency_penalty": 0.1, "seed": 5, "truncate": 8, "watermark": True, "max_new_tokens": 10,
    }  # fmt: skip
    assert client.text_generation(PROMPT, **ask) == client.text_generation(PROMPT, **ask)
    best = client.text_generation(PROMPT, max_new_tokens=8, best_of=2, do_sample=True, details=True)
    assert len(best.details.best_of_sequences) == 1
    stopped = client.text_generation(PROMPT, max_new_tokens=60, stop=["."], details=True)
    assert stopped.details.finish_reason == "stop_sequence"
    assert stopped.generated_text.endswith(".")


def check_grammars() -> None:
    ask = {"max_new_tokens": 80, "return_full_text": False}
    record = client.text_generation(SIGHTING, grammar={"type": "json", "value": SCHEMA}, **ask)
    assert json.loads(record) == RECORD
    digits = client.text_generation(PROMPT, grammar={"type": "regex", "value": "[0-9]{3}"}, **ask)
    assert len(digits) == 3
    assert digits.isdigit()


def check_chat() -> None:
    whole = client.chat_completion(TALK, max_tokens=64, temperature=0)
    assert whole.choices[0].message.content == ANSWER
    assert whole.usage.completion_tokens > 5
    chunks = list(client.chat_completion(TALK, max_tokens=64, temperature=0, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == ANSWER
    usage = list(client.chat_completion(TALK, temperature=0, stream=True, stream_options={"include_usage": True}))
    assert usage[-1].usage.completion_tokens == whole.usage.completion_tokens


def check_chat_as_openai() -> None:
    other = InferenceClient(base_url=f"{URL}/v1", api_key=KEY)
    chat = other.chat.completions.create(model="tgi", messages=TALK, temperature=0)
    assert chat.choices[0].message.content == ANSWER


def check_chat_logprobs() -> None:
    chat = client.chat_completion(TALK, max_tokens=4, temperature=0, logprobs=True, top_logprobs=2)
    assert [len(token.top_logprobs) for token in chat.choices[0].logprobs.content] == [2] * 4


def check_chat_schema() -> None:
    talk = [{"role": "user", "content": SIGHTING}]
    for form in (
        {"type": "json_schema", "json_schema": {"name": "sighting", "schema": SCHEMA}},
        {"type": "json_object", "value": SCHEMA},
        {"type": "json", "value": SCHEMA},
    ):
        chat = client.chat_completion(talk, temperature=0, max_tokens=100, response_format=form)
        assert json.loads(chat.choices[0].message.content) == RECORD, form


def check_chat_tools() -> None:
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        chat = client.chat_completion(TALK, temperature=0, tools=[WEATHER], tool_choice=choice)
        call = chat.choices[0].message.tool_calls[0]
        assert call.function.name == "get_weather"


def check_health_and_info() -> None:
    endpoint = InferenceClient(model=URL, token=KEY, provider="hf-inference")
    assert endpoint.health_check()
    info = endpoint.get_endpoint_info()
    assert info["model_id"] == "demo"
    assert info["router"] == "text-generation-router"


def check_errors() -> None:
    for stream in (False, True):
        error = refused(ValidationError, lambda: list(client.text_generation(QUESTION, top_p=2.0, stream=stream)))  # noqa: B023
        assert "top_p" in str(error)


run(globals())
