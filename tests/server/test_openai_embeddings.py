"""/v1/embeddings, with OpenAI's own client and against transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from transformers import AutoModel

from .running import Server

PROMPTS = [[5, 300, 301, 302, 303], [7, 310], [400, 401, 402, 403, 404, 405, 406, 407, 408] * 9]


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.key, max_retries=0) as found:
        yield found


def test_the_mean_of_the_last_hidden_states_at_length_one(client: openai.OpenAI, tiny_llama: Path) -> None:
    model = AutoModel.from_pretrained(tiny_llama, dtype=torch.float32)
    answer = client.embeddings.create(model="default", input=PROMPTS)
    assert [item.index for item in answer.data] == [0, 1, 2]
    assert answer.usage.prompt_tokens == sum(map(len, PROMPTS))
    for ids, item in zip(PROMPTS, answer.data, strict=True):
        with torch.no_grad():
            mean = model(torch.tensor([ids])).last_hidden_state[0].mean(0)
        torch.testing.assert_close(torch.tensor(item.embedding), mean / mean.norm(), atol=2e-4, rtol=0)


def test_numbers_and_base64_are_the_same(client: openai.OpenAI) -> None:
    texts = ["the quick brown fox", "a lazy dog"] * 10
    packed = client.embeddings.create(model="default", input=texts)  # the client asks for base64 by itself
    plain = client.embeddings.create(model="default", input=texts, encoding_format="float")
    assert [item.embedding for item in packed.data] == [item.embedding for item in plain.data]
    assert plain.data[0].embedding == plain.data[18].embedding
    assert plain.data[0].embedding != plain.data[1].embedding


def test_fewer_dimensions_are_the_first_ones_at_length_one(client: openai.OpenAI) -> None:
    whole = torch.tensor(client.embeddings.create(model="default", input="a lazy dog").data[0].embedding)
    for dimensions in (64, 8):
        short = client.embeddings.create(model="default", input="a lazy dog", dimensions=dimensions).data[0].embedding
        expected = whole[:dimensions] / whole[:dimensions].norm()
        torch.testing.assert_close(torch.tensor(short), expected)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"input": []}, "Empty array detected"),
        ({"input": ""}, "cannot be empty"),
        ({"input": "the", "dimensions": 65}, "`dimensions` must be <= 64"),
        ({"input": "the", "dimensions": 0}, "`dimensions` must be strictly positive"),
        ({"input": [1, "a"]}, "`input` must be a string"),
        ({"input": "the " * 2000}, "`inputs` must have less than"),
        ({"input": "the", "encoding_format": "int8"}, "encoding_format"),
    ],
)
def test_refusals(server: Server, fields: dict[str, Any], words: str) -> None:
    answer = server.post("/v1/embeddings", fields)
    assert answer.status == 422
    assert words in answer.json()["error"]["message"]
