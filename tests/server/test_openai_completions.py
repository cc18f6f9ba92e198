"""/v1/completions, with OpenAI's own client, by hand, and against transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from .running import Server

PROMPTS = [[5, 300, 301, 302, 303], [7, 310], [400, 401, 402, 403, 404, 405, 406, 407, 408]]


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.key, max_retries=0) as found:
        yield found


def post(server: Server, status: int = 200, **fields: Any) -> Any:
    answer = server.post("/v1/completions", {"temperature": 0, **fields})
    assert answer.status == status, answer.text
    return answer.json()


def chunks_of(server: Server, **fields: Any) -> list[Any]:
    *chunks, done = server.post("/v1/completions", {"temperature": 0, "stream": True, **fields}).events()
    assert done == "[DONE]"
    return chunks


def joined(chunks: list[Any]) -> dict[int, Any]:
    """The choices that the pieces of a stream make up."""
    found: dict[int, Any] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            whole = found.setdefault(choice["index"], {**choice, "text": "", "logprobs": None})
            whole["text"] += choice["text"]
            whole["finish_reason"] = choice["finish_reason"]
            if choice["logprobs"] is not None:
                before = whole["logprobs"] or {key: [] for key in choice["logprobs"]}
                whole["logprobs"] = {key: before[key] + choice["logprobs"][key] for key in before}
    return found


def test_the_sdk(client: openai.OpenAI, tiny_llama: Path) -> None:
    whole = client.completions.create(model=str(tiny_llama), prompt="the quick", max_tokens=6, temperature=0)
    assert whole.object == "text_completion"
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert (whole.usage.completion_tokens, whole.usage.prompt_tokens) == (6, whole.usage.total_tokens - 6)
    parts = client.completions.create(
        model="tgi",
        prompt="the quick",
        max_tokens=6,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = list(parts)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert (last.choices, last.usage) == ([], whole.usage)


def test_prompts_in_all_shapes(server: Server) -> None:
    ids = server.post("/tokenize", {"prompt": "the quick"}).json()["tokens"]
    text = post(server, prompt="the quick", max_tokens=6)["choices"][0]["text"]
    for prompt in (["the quick"], ids, [ids]):
        assert post(server, prompt=prompt, max_tokens=6)["choices"][0]["text"] == text
    mixed = post(server, prompt=["the quick", ids], max_tokens=6)
    assert [choice["text"] for choice in mixed["choices"]] == [text, text]
    both = post(server, prompt=["the quick", "a lazy dog"], max_tokens=6)
    other = post(server, prompt="a lazy dog", max_tokens=6)
    assert [(c["index"], c["text"]) for c in both["choices"]] == [(0, text), (1, other["choices"][0]["text"])]
    assert both["usage"]["completion_tokens"] == 12
    assert both["usage"]["prompt_tokens"] == len(ids) + other["usage"]["prompt_tokens"]


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_scores_of_text_are_those_of_transformers(server: Server, tiny_llama: Path, max_tokens: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    body = {"prompt": PROMPTS, "max_tokens": max_tokens, "logprobs": 1, "echo": True, "seed": 1234}
    choices = post(server, **body)["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    for ids, choice in zip(PROMPTS, choices, strict=True):
        scores = choice["logprobs"]
        assert {len(values) for values in scores.values()} == {len(ids) + max_tokens}
        assert (scores["token_logprobs"][0], scores["top_logprobs"][0]) == (None, None)
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        for place in range(1, len(ids)):
            row, token = expected[place - 1], ids[place]
            found, top = scores["token_logprobs"][place], scores["top_logprobs"][place]
            assert found == pytest.approx(row[token].item(), abs=2e-4)
            assert max(top.values()) == pytest.approx(row.max().item(), abs=2e-4)
            assert (found == max(top.values())) == (row.argmax().item() == token)  # how lm-eval finds greedy tokens
        if max_tokens:  # greedy, so the generated token is the likeliest: the very same number in both places
            assert scores["token_logprobs"][-1] == max(scores["top_logprobs"][-1].values())
        assert choice["finish_reason"] == "length"


def test_a_likely_token_has_the_same_number_in_both_places(server: Server, tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    ids = [5, 300, 301]
    with torch.no_grad():
        for _ in range(8):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    scores = post(server, prompt=ids, max_tokens=0, echo=True, logprobs=1)["choices"][0]["logprobs"]
    for place in range(3, len(ids)):
        assert scores["token_logprobs"][place] == max(scores["top_logprobs"][place].values())


def test_echo_and_offsets(server: Server) -> None:
    fields = {"prompt": "the quick brown", "max_tokens": 5, "echo": True, "logprobs": 2}
    choice = post(server, **fields)["choices"][0]
    text, scores = choice["text"], choice["logprobs"]
    assert text.startswith("the quick brown")
    visible = [(t, o) for t, o in zip(scores["tokens"], scores["text_offset"], strict=True) if t != "<s>"]
    for token, offset in visible:
        if "\ufffd" not in token:
            assert text[offset : offset + len(token)] == token
    assert all(len(top) <= 3 for top in scores["top_logprobs"][1:])
    assert joined(chunks_of(server, **fields)) == {0: choice}


def test_streams_equal_whole_answers(server: Server) -> None:
    fields = {
        "prompt": ["the quick", "a lazy dog"],
        "n": 2,
        "temperature": 0.9,
        "seed": 5,
        "max_tokens": 7,
        "logprobs": 0,
    }
    whole = post(server, **fields)["choices"]
    assert [choice["index"] for choice in whole] == [0, 1, 2, 3]
    streamed = joined(chunks_of(server, **fields))
    for index, choice in enumerate(whole):
        scores = choice["logprobs"]["token_logprobs"]
        # Another batch may add up in another order: the last digits are free, the tokens are not.
        assert streamed[index]["logprobs"]["token_logprobs"] == pytest.approx(scores, abs=1e-4)
        for name in ("text", "finish_reason", "index"):
            assert streamed[index][name] == choice[name]
        for name in ("tokens", "text_offset"):
            assert streamed[index]["logprobs"][name] == choice["logprobs"][name]
    assert len({choice["text"] for choice in whole}) == 4


def test_the_best_of_several(server: Server) -> None:
    fields = {"prompt": "the quick", "temperature": 1.0, "seed": 9, "max_tokens": 6, "logprobs": 0}
    every = post(server, n=4, **fields)["choices"]
    ranked = sorted(every, key=lambda choice: -sum(choice["logprobs"]["token_logprobs"]))
    best = post(server, n=2, best_of=4, **fields)
    assert [choice["text"] for choice in best["choices"]] == [choice["text"] for choice in ranked[:2]]
    assert [choice["index"] for choice in best["choices"]] == [0, 1]
    assert best["usage"]["completion_tokens"] == 24


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": []}, "Empty array detected. Do not use an empty array for the prompt."),
        ({"prompt": ""}, "`inputs` cannot be empty"),
        ({"prompt": ["a"] * 5}, "Number of prompts exceeds the maximum allowed batch size of 4"),
        ({"prompt": ["a", 3]}, "`prompt` must be a string"),
        ({"prompt": [[]]}, "`prompt` must be a string"),
        ({"prompt": [True]}, "`prompt` must be a string"),
        ({"prompt": [-1]}, "outside the vocabulary"),
        ({"prompt": [10**30]}, ""),
        ({"prompt": "a", "suffix": "b"}, "Suffix is not supported"),
        ({"prompt": "a", "max_tokens": 0}, "strictly positive"),
        ({"prompt": "a", "best_of": 1, "n": 2}, "`best_of` must be >= `n`"),
        ({"prompt": "a", "best_of": 2, "stream": True}, "`best_of` > `n` is not supported when streaming"),
        ({"prompt": "a", "logprobs": 21}, "<= 20"),
        ({"prompt": "a", "max_tokens": 9999}, "must be <= 512"),
        ({"prompt": "a", "truncate_prompt_tokens": 3}, "`truncate_prompt_tokens` is not supported"),
    ],
)
def test_refusals(server: Server, fields: dict[str, Any], words: str) -> None:
    assert words in post(server, 422, **fields)["error"]["message"]


def test_tokens_and_back(server: Server) -> None:
    value = server.post("/tokenize", {"prompt": "the quick", "return_token_strs": True}).json()
    assert list(value) == ["count", "max_model_len", "tokens", "token_strs"]
    assert (value["count"], value["max_model_len"], value["token_strs"][0]) == (len(value["tokens"]), 512, "<s>")
    bare = server.post("/tokenize", {"prompt": "the quick", "add_special_tokens": False}).json()["tokens"]
    assert value["tokens"][1:] == bare
    assert server.post("/detokenize", {"tokens": bare}).json() == {"prompt": "the quick"}
    native = server.post("/tokenize", {"inputs": "the quick"}).json()
    assert [token["id"] for token in native] == value["tokens"]
    talk = server.post("/tokenize", {"messages": [{"role": "user", "content": "the quick"}]}).json()["tokens"]
    assert server.post("/detokenize", {"tokens": talk}).json()["prompt"] == "<s><|user|>the quick\n<|assistant|>"
    assert "missing field `inputs`" in server.post("/tokenize", {}).text
    assert server.post("/detokenize", {"tokens": [10**6]}).status == 422


def test_tokenizer_info(server: Server) -> None:
    info = server.get("/tokenizer_info").json()
    assert (info["eos_token"], info["bos_token"], info["eos_token_id"]) == ("</s>", "<s>", 1)
    assert "add_generation_prompt" in info["chat_template"]
    assert server.get("/tokenizer_info", Authorization="").status == 401
