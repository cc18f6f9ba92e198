"""An unmodified client of TGI: huggingface_hub's InferenceClient."""

from __future__ import annotations

import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import ValidationError

from .running import Server

PROMPT = "the quick brown"


@pytest.fixture
def client(server: Server, monkeypatch: pytest.MonkeyPatch) -> InferenceClient:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # it would block loopback too
    return InferenceClient(model=server.url, token=server.key, timeout=30)


def test_text_generation(client: InferenceClient) -> None:
    whole = client.text_generation(PROMPT, max_new_tokens=6, return_full_text=False, details=True)
    assert whole.details.finish_reason == "length"
    assert len(whole.details.tokens) == 6
    assert client.text_generation(PROMPT, max_new_tokens=6) == PROMPT + whole.generated_text
    parts = client.text_generation(PROMPT, max_new_tokens=6, return_full_text=False, stream=True, details=True)
    events = list(parts)
    assert [event.token.id for event in events] == [token.id for token in whole.details.tokens]
    assert events[-1].generated_text == whole.generated_text


def test_errors_are_told_apart(client: InferenceClient) -> None:
    for stream in (False, True):
        with pytest.raises(ValidationError, match="`top_p` must be > 0"):
            list(client.text_generation(PROMPT, top_p=2.0, stream=stream))


def test_chat_completion(client: InferenceClient) -> None:
    talk = [{"role": "user", "content": "the quick"}]
    whole = client.chat_completion(talk, max_tokens=6, temperature=0)
    assert whole.usage.completion_tokens == 6
    chunks = list(client.chat_completion(talk, max_tokens=6, temperature=0, stream=True))
    text = "".join(chunk.choices[0].delta.content for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "length"
