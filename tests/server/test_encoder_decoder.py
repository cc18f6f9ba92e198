"""An encoder-decoder on the same routes and commands as every other model: texts are transformers'."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForSeq2SeqLM

from tests.encoder_decoders import SHAPES, save_encoder_decoder, save_unigram
from tests.process import penstock

from .running import Server, start

TEXTS = ["the quick brown fox", "over a lazy dog", "seven wizards make toxic brew for an evil queen", "fox " * 40]
NEW = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_encoder_decoder(tmp_path_factory.mktemp("models") / "tiny-flan", SHAPES["flan-t5"], seed=4)
    save_unigram(folder)
    return folder


@pytest.fixture(scope="module")
def truth(model: Path) -> list[tuple[str, list[int], list[int]]]:
    """For each text transformers' greedy answer: its text, its tokens, and those of the prompt."""
    torch.set_num_threads(1)
    network = AutoModelForSeq2SeqLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    found = []
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        made = network.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)[0, 1:].tolist()
        found.append((tokenizer.decode(made), made, ids))
    assert any(len(made) == NEW for _text, made, _ids in found)
    return found


@pytest.fixture(scope="module")
def flan(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    found = start(tmp_path_factory.mktemp("home"), model, "--enable-prefill-logprobs", "--dtype", "float32")
    yield found
    found.kill()


def test_native_routes(flan: Server, truth: list[tuple[str, list[int], list[int]]]) -> None:
    """Together and streamed; the prefill is what the decoder was given, as TGI has it for such models."""
    parameters = {"max_new_tokens": NEW, "details": True, "decoder_input_details": True}

    def ask(text: str) -> dict[str, object]:
        answer: dict[str, object] = flan.ask("POST", "/generate", {"inputs": text, "parameters": parameters}).json()
        return answer

    with ThreadPoolExecutor(len(TEXTS)) as pool:
        answers = list(pool.map(ask, TEXTS))
    for answer, (text, ids, prompt) in zip(answers, truth, strict=True):
        details = answer["details"]
        assert isinstance(details, dict)
        assert answer["generated_text"] == text
        assert [token["id"] for token in details["tokens"]] == ids
        assert details["prefill"] == [{"id": 0, "text": "<pad>", "logprob": None}]
        assert details["finish_reason"] == ("length" if len(ids) == NEW and ids[-1] != 1 else "eos_token")
        streamed = flan.ask(
            "POST",
            "/generate_stream",
            {"inputs": TEXTS[truth.index((text, ids, prompt))], "parameters": {"max_new_tokens": NEW, "details": True}},
        )
        *tokens, last = streamed.events()
        shown = "".join(e["token"]["text"] for e in [*tokens, last] if not e["token"]["special"])
        assert shown == text == last["generated_text"]
        assert last["details"]["input_length"] == len(prompt)


def test_the_root_route(flan: Server, truth: list[tuple[str, list[int], list[int]]]) -> None:
    body = {"inputs": TEXTS[1], "parameters": {"max_new_tokens": NEW, "return_full_text": True}}
    assert flan.ask("POST", "/", body).json() == [{"generated_text": TEXTS[1] + truth[1][0]}]


def test_completions(flan: Server, truth: list[tuple[str, list[int], list[int]]]) -> None:
    body = {"model": "tgi", "prompt": TEXTS, "max_tokens": NEW, "temperature": 0, "logprobs": 1}
    answer = flan.ask("POST", "/v1/completions", body).json()
    assert [choice["text"] for choice in answer["choices"]] == [text for text, _ids, _prompt in truth]
    assert answer["usage"]["prompt_tokens"] == sum(len(prompt) for _text, _ids, prompt in truth)
    echo = flan.ask("POST", "/v1/completions", {**body, "echo": True})
    assert echo.status == 422
    assert "scores the prompt" in echo.text


def test_sampling_stop_strings_and_grammars(flan: Server, truth: list[tuple[str, list[int], list[int]]]) -> None:
    parameters: dict[str, object] = {"max_new_tokens": NEW, "do_sample": True, "seed": 5, "temperature": 2.0}
    first, again = (flan.ask("POST", "/generate", {"inputs": "dog", "parameters": parameters}).json() for _ in "ab")
    assert first == again
    text, _ids, _prompt = next(answer for answer in truth if len(answer[0]) > 10)
    stop = text[6:9]
    body = {"inputs": TEXTS[[t for t, _i, _p in truth].index(text)], "parameters": {"max_new_tokens": NEW}}
    body["parameters"]["stop"] = [stop]  # type: ignore[index]
    assert flan.ask("POST", "/generate", body).json()["generated_text"] == text[: text.index(stop) + 3]
    grammar = {"type": "regex", "value": "a (brown|lazy) fox"}
    body = {"inputs": "dog", "parameters": {"max_new_tokens": 30, "grammar": grammar}}
    assert flan.ask("POST", "/generate", body).json()["generated_text"] in ("a brown fox", "a lazy fox")


def test_chats_are_refused_without_a_template(flan: Server) -> None:
    body = {"model": "tgi", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    refused = flan.ask("POST", "/v1/chat/completions", body)
    assert refused.status == 422
    assert "template not found" in refused.text
    assert "/v1/completions -H" in flan.errors  # what there is to paste
    assert "/v1/chat/completions -H" not in flan.errors


def test_too_much_is_refused_and_the_rest_goes_on(flan: Server, truth: list[tuple[str, list[int], list[int]]]) -> None:
    body = {"inputs": "fox " * 400, "parameters": {"max_new_tokens": 4}}
    assert flan.ask("POST", "/generate", body).status == 422
    body = {"inputs": TEXTS[0], "parameters": {"max_new_tokens": NEW}}
    assert flan.ask("POST", "/generate", body).json() == {"generated_text": truth[0][0]}


def test_commands(model: Path, truth: list[tuple[str, list[int], list[int]]], tmp_path: Path) -> None:
    """generate, embed and plan."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    common = ("--input", rows, "--dtype", "float32")
    done = penstock(
        "generate", model, *common, "--output", tmp_path / "o.jsonl", "--max-new-tokens", NEW, home=tmp_path
    )
    assert done.returncode == 0, done.stderr.decode()
    results = {r["prompt"]: r for r in map(json.loads, (tmp_path / "o.jsonl").read_text().splitlines())}
    assert [(results[t]["text"], results[t]["token_ids"]) for t in TEXTS] == [(text, ids) for text, ids, _p in truth]

    done = penstock("embed", model, *common, "--output", tmp_path / "o.npz", home=tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    network = AutoModelForSeq2SeqLM.from_pretrained(model, dtype=torch.float32)
    with torch.inference_mode(), np.load(tmp_path / "o.npz") as states:
        for row, (_text, _ids, prompt) in zip(states["layer_3"], truth, strict=True):
            expected = network.encoder(torch.tensor([prompt])).last_hidden_state[0].mean(0).numpy()
            np.testing.assert_allclose(row, expected, atol=1e-4, rtol=1e-4)

    done = penstock("plan", model, "--json", home=tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    assert json.loads(done.stdout)["family"] == "t5"
