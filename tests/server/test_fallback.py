"""Models that run through transformers, over HTTP: what clients see does not depend on who computes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import save_model, save_tokenizer
from tests.engine.exactness import generated
from tests.others import OTHERS

from .conftest import StartServer

WORDS = ["the quick brown fox", "a lazy dog", "seven wizards make toxic brew", "an evil queen jumps over"]


@pytest.mark.parametrize("name", ["glm", "mamba"])
def test_every_route_works(name: str, tmp_path: Path, start_server: StartServer) -> None:
    folder = save_model(tmp_path / "model", OTHERS[name])
    save_tokenizer(folder)
    server = start_server(folder, "--dtype", "float32", "--max-total-tokens", "256")
    way = "our paged cache" if name == "glm" else "in static batches: it keeps a state"
    assert f"by transformers (no description of ours); in float32: asked for (--dtype); {way}" in server.errors

    def ask(words: str, **parameters: Any) -> dict[str, Any]:
        body = {"inputs": words, "parameters": {"max_new_tokens": 20, "details": True, **parameters}}
        answer = server.post("/generate", body)
        assert answer.status == 200, answer.text
        return dict(answer.json())

    def tokens(answers: Iterable[dict[str, Any]]) -> list[list[int]]:
        return [[token["id"] for token in answer["details"]["tokens"]] for answer in answers]

    single = [ask(words) for words in WORDS]
    draws = [ask(words, do_sample=True, temperature=0.7, seed=3) for words in WORDS]
    with ThreadPoolExecutor(8) as pool:
        assert tokens(pool.map(ask, WORDS)) == tokens(single)
        again = pool.map(lambda words: ask(words, do_sample=True, temperature=0.7, seed=3), WORDS)
        assert tokens(again) == tokens(draws)
    ids = server.post("/tokenize", {"inputs": WORDS[0]}).json()
    prompt = [token["id"] for token in ids]
    ours = tokens(single)[0]
    assert ours == generated(folder, prompt, 20)[0][: len(ours)]

    events = server.post("/generate_stream", {"inputs": WORDS[1], "parameters": {"max_new_tokens": 20}}).events()
    assert events[-1]["generated_text"] == single[1]["generated_text"]
    stop = single[2]["generated_text"][4:8]
    assert ask(WORDS[2], stop=[stop])["details"]["finish_reason"] == "stop_sequence"
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
    made = ask(WORDS[3], max_new_tokens=60, grammar={"type": "json", "value": schema})
    assert json.loads(made["generated_text"])["a"] in ("x", "y")
    chat = server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "fox"}], "max_tokens": 5})
    assert chat.status == 200, chat.text
    answer = server.post("/v1/embeddings", {"input": WORDS})
    assert answer.status == 200, answer.text
    embedding = answer.json()
    assert [len(row["embedding"]) for row in embedding["data"]] == [64] * len(WORDS)
