"""LoRA adapters over HTTP: chosen per request, listed, loaded and unloaded at run time, refused by name."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from tests.adapters import merged, save_adapter
from tests.checkpoints import save_tiny
from tests.engine.exactness import foreseen, reference
from tests.process import check_error, penstock

from .conftest import StartServer
from .running import Server, start

PROMPT = "the quick brown fox"
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture(scope="module")
def adapters(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("adapters")
    return {name: save_adapter(tiny_llama, root / name, seed=i) for i, name in enumerate(("one", "two", "three"))}


@pytest.fixture(scope="module")
def lora_server(
    tiny_llama: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server of two adapters."""
    given = f"one={adapters['one']},two={adapters['two']}"
    found = start(tmp_path_factory.mktemp("home"), tiny_llama, "--dtype", "float32", "--lora-adapters", given)
    yield found
    found.kill()


def native(adapter: str | None, new: int = 8, **parameters: Any) -> dict[str, Any]:
    chosen = {} if adapter is None else {"adapter_id": adapter}
    return {"inputs": PROMPT, "parameters": {"max_new_tokens": new, "details": True, **chosen, **parameters}}


def check(model: Any, base: Path, answer: dict[str, Any]) -> None:
    """A native answer is the model's own greedy text, its log-probabilities within 1e-4."""
    row = Tokenizer.from_file(str(base / "tokenizer.json")).encode(PROMPT).ids
    ids = [token["id"] for token in answer["details"]["tokens"]]
    best, scores = foreseen(model, row, ids)
    assert ids == best
    theirs = torch.log_softmax(scores[-len(ids) :], dim=-1)[range(len(ids)), ids].tolist()
    assert [token["logprob"] for token in answer["details"]["tokens"]] == pytest.approx(theirs, abs=1e-4)


def test_each_request_has_its_own(lora_server: Server, tiny_llama: Path, adapters: dict[str, Path]) -> None:
    """Together in one batch, beside requests of the base."""

    async def ask(names: list[str | None]) -> list[dict[str, Any]]:
        answers = await asyncio.gather(*(lora_server.post_async("/generate", native(name)) for name in names))
        assert [answer.status for answer in answers] == [200] * len(names)
        return [answer.json() for answer in answers]

    names: list[str | None] = ["one", None, "two", "one", None, "two"]
    answers = asyncio.run(ask(names))
    models = {name: merged(tiny_llama, adapters[name]) for name in ("one", "two")}
    plain = reference(tiny_llama)
    for name, answer in zip(names, answers, strict=True):
        check(plain if name is None else models[name], tiny_llama, answer)
    assert answers[0]["generated_text"] != answers[1]["generated_text"]


def test_every_route_names_it(lora_server: Server) -> None:
    """OpenAI's and Anthropic's by `model`, which the answer repeats; streams and embeddings too."""
    server = lora_server
    text = server.post("/generate", native("one")).json()["generated_text"]
    asked = {"model": "one", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    answer = server.post("/v1/completions", asked).json()
    assert (answer["model"], answer["choices"][0]["text"]) == ("one", text)
    events = server.post("/v1/completions", {**asked, "stream": True}).events()[:-1]
    assert {event["model"] for event in events} == {"one"}
    assert "".join(event["choices"][0]["text"] for event in events) == text
    streamed = server.post("/generate_stream", native("one")).events()
    assert streamed[-1]["generated_text"] == text
    talk = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "temperature": 0}
    said: dict[str | None, str] = {}
    for name in ("one", "two", str(server.ready["model"]), "tgi"):
        chat = server.post("/v1/chat/completions", {**talk, "model": name}).json()
        assert chat["model"] == (name if name in ("one", "two") else server.ready["model"])
        said[name] = chat["choices"][0]["message"]["content"]
    assert len({said["one"], said["two"], said["tgi"]}) == 3
    assert said["tgi"] == said[server.ready["model"]]
    events = server.post("/v1/chat/completions", {**talk, "model": "two", "stream": True}).events()[:-1]
    assert {event["model"] for event in events} == {"two"}
    assert "".join(event["choices"][0]["delta"].get("content") or "" for event in events) == said["two"]
    message = server.post("/v1/messages", {**talk, "model": "two"}).json()
    assert (message["model"], message["content"][0]["text"]) == ("two", said["two"])
    response = {"model": "one", "input": "hi", "max_output_tokens": 8, "temperature": 0}
    answer = server.post("/v1/responses", response).json()
    assert (answer["model"], answer["output"][0]["content"][0]["text"]) == ("one", said["one"])
    vectors = [server.post("/v1/embeddings", {"input": "fox", "model": name}).json() for name in ("one", "two", "tgi")]
    assert [vector["model"] for vector in vectors] == ["one", "two", server.ready["model"]]
    assert len({tuple(vector["data"][0]["embedding"]) for vector in vectors}) == 3


def test_they_are_listed(lora_server: Server) -> None:
    base = lora_server.ready["model"]
    listed = lora_server.get("/v1/models").json()["data"]
    assert [(model["id"], model.get("parent")) for model in listed] == [(base, None), ("one", base), ("two", base)]
    assert lora_server.get("/v1/models/two").json() == listed[2]
    assert lora_server.get("/info").json()["adapters"] == ["one", "two"]


def test_an_unknown_one_is_refused_by_name(lora_server: Server) -> None:
    answer = lora_server.post("/generate", native("nine"))
    assert answer.status == 422
    assert "no adapter `nine` here. Adapters: one, two" in answer.json()["error"]
    for path, body in (
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/embeddings", {"input": "a"}),
        ("/v1/responses", {"input": "a"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3}),
    ):
        answer = lora_server.post(path, {**body, "model": "nine"})
        assert answer.status == 404, (path, answer.text)
        assert "`nine` is not served here" in answer.text
        assert "one, two" in answer.text
    assert lora_server.get("/v1/models/nine").status == 404


def test_loading_and_unloading(lora_server: Server, tiny_llama: Path, adapters: dict[str, Path]) -> None:
    server = lora_server
    for path in (LOAD, UNLOAD):
        assert server.post(path, {"lora_name": "three"}, Authorization="Bearer wrong").status == 401
        assert server.get(path).status == 405
    answer = server.post(LOAD, {"lora_name": "three", "lora_path": str(adapters["three"])})
    assert (answer.status, answer.text) == (200, "Success: LoRA adapter 'three' added successfully.")
    check(merged(tiny_llama, adapters["three"]), tiny_llama, server.post("/generate", native("three")).json())
    assert [model["id"] for model in server.get("/v1/models").json()["data"]][1:] == ["one", "two", "three"]
    again = server.post(LOAD, {"lora_name": "three", "lora_path": str(adapters["one"])})
    assert again.status == 400
    assert "loaded already" in again.json()["error"]["message"]
    answer = server.post(LOAD, {"lora_name": "three", "lora_path": str(adapters["one"]), "load_inplace": True})
    assert answer.status == 200
    check(merged(tiny_llama, adapters["one"]), tiny_llama, server.post("/generate", native("three")).json())
    answer = server.post(UNLOAD, {"lora_name": "three"})
    assert (answer.status, answer.text) == (200, "Success: LoRA adapter 'three' removed successfully.")
    assert server.post("/generate", native("three")).status == 422
    assert server.post(UNLOAD, {"lora_name": "three"}).status == 404
    assert server.get("/info").json()["adapters"] == ["one", "two"]


def test_bad_ones_are_refused_with_the_cause(
    lora_server: Server, adapters: dict[str, Path], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = save_tiny(tmp_path_factory.mktemp("other"), "llama", hidden_size=32)
    wrong = save_adapter(other, tmp_path / "wrong")
    dora = tmp_path / "dora"
    shutil.copytree(adapters["one"], dora)
    settings = json.loads((dora / "adapter_config.json").read_text())
    (dora / "adapter_config.json").write_text(json.dumps({**settings, "use_dora": True}))
    (tmp_path / "empty").mkdir()
    name = str(lora_server.ready["model"])
    for asked, status, words in (
        ({"lora_name": "x", "lora_path": str(wrong)}, 400, "the model's matrix is 64 x 64"),
        ({"lora_name": "x", "lora_path": str(dora)}, 400, "`use_dora`"),
        ({"lora_name": "x", "lora_path": str(tmp_path / "empty")}, 400, "no adapter_config.json"),
        ({"lora_name": "x", "lora_path": "/no/such/folder"}, 404, "neither a folder"),
        ({"lora_name": "x", "lora_path": "org/name"}, 404, "download it there first"),
        ({"lora_name": "x", "lora_path": ""}, 400, "must be provided"),
        ({"lora_name": "", "lora_path": "y"}, 400, "must be provided"),
        ({"lora_name": "x\n", "lora_path": "y"}, 400, "printable"),
        ({"lora_name": "tgi", "lora_path": "y"}, 400, "that of the model itself"),
        ({"lora_name": name, "lora_path": "y"}, 400, "that of the model itself"),
        ({"lora_name": "x"}, 422, "lora_path"),
        ({"lora_path": "x"}, 422, "lora_name"),
        ({"lora_name": 3, "lora_path": "x"}, 422, "lora_name"),
    ):
        answer = lora_server.post(LOAD, asked)
        assert answer.status == status, (asked, answer.text)
        assert words in answer.json()["error"]["message"]
    assert lora_server.get("/info").json()["adapters"] == ["one", "two"]
    assert lora_server.post("/generate", native("one")).status == 200


def test_unloading_under_a_running_request(start_server: StartServer, long_llama: Path, tmp_path: Path) -> None:
    """It finishes with the adapter that it began with."""
    adapter = save_adapter(long_llama, tmp_path / "adapter")
    server = start_server(long_llama, "--dtype", "float32", "--lora-adapters", f"x={adapter}")
    expected = server.post("/generate", native("x", new=400)).json()["generated_text"]
    with server.stream("/generate_stream", native("x", new=400)) as response:
        begun = response.readline()
        assert server.post(UNLOAD, {"lora_name": "x"}).status == 200
        assert server.post("/generate", native("x")).status == 422
        events = begun + response.read()
    last = json.loads(events.strip().split(b"\n\n")[-1].removeprefix(b"data:"))
    assert last["generated_text"] == expected
    server.wait_idle()


def test_a_new_engine_process_has_them_again(
    start_server: StartServer, tiny_llama: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """Those of the start and those that came later, but for one that was unloaded, and one whose folder is gone."""
    gone = tmp_path / "gone"
    shutil.copytree(adapters["two"], gone)
    server = start_server(tiny_llama, "--dtype", "float32", "--lora-adapters", f"one={adapters['one']},gone={gone}")
    for name in ("two", "three"):
        assert server.post(LOAD, {"lora_name": name, "lora_path": str(adapters[name])}).status == 200
    assert server.post(UNLOAD, {"lora_name": "two"}).status == 200
    expected = {name: server.post("/generate", native(name)).json() for name in ("one", "three")}
    shutil.rmtree(gone)
    os.kill(server.engine_pid(), signal.SIGKILL)
    server.wait_health(503, 10)
    server.wait_health(200, 60)
    for name, before in expected.items():
        assert server.post("/generate", native(name)).json()["generated_text"] == before["generated_text"]
    assert server.post("/generate", native("gone")).status == 422
    assert set(server.get("/info").json()["adapters"]) == {"one", "three"}


def test_tgis_environment(start_server: StartServer, tiny_llama: Path, adapters: dict[str, Path]) -> None:
    """LORA_ADAPTERS, with a name and without."""
    path = str(adapters["two"])
    server = start_server(tiny_llama, LORA_ADAPTERS=f"one={adapters['one']},{path}")
    assert server.get("/info").json()["adapters"] == ["one", path]
    assert server.post("/generate", native(path)).status == 200
    assert "adapters" in server.errors


def test_a_start_that_cannot_be(tiny_llama: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    other = save_adapter(save_tiny(tmp_path / "other", "llama", hidden_size=32), tmp_path / "wrong")
    serve = ("serve", tiny_llama, "--port", "0", "--threads", "1")
    one = str(adapters["one"])
    for flags, code, words in (
        (["--lora-adapters", f"x={other}"], 4, "does not fit this model"),
        (["--lora-adapters", f"x={one}", "--max-adapter-rank", "3"], 5, "has rank 4, more than 3"),
        (["--lora-adapters", f"m={one}", "--served-model-name", "m"], 2, "An adapter has the model's name"),
    ):
        check_error(penstock(*serve, *flags, home=tmp_path), code, words)
    check_error(penstock("serve", one, home=tmp_path), 4, "LoRA adapter", "--lora-adapters")


def test_generate_with_adapters(tiny_llama: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    """One for every row; of several, each row names its own. A rerun with another one is another run."""
    rows = [{"id": i, "prompt": PROMPT} for i in range(2)]
    source = tmp_path / "rows.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)))
    common = ("generate", tiny_llama, "-i", source, "--max-new-tokens", "6", "--dtype", "float32", "--threads", "1")

    def run(output: str, *flags: str) -> dict[int, Any]:
        done = penstock(*common, "-o", tmp_path / output, *flags, home=tmp_path)
        assert done.returncode in (0, 6), done.stderr.decode()
        found = map(json.loads, (tmp_path / output).read_text().splitlines())
        return {row["id"]: row for row in found}

    plain, one = run("plain"), run("one", "--adapter", str(adapters["one"]))
    assert one[0]["text"] == one[1]["text"] != plain[0]["text"]
    rows[0]["adapter"], rows[1]["adapter"] = "a", "nine"
    source.write_text("\n".join(map(json.dumps, [*rows, {"id": 2, "prompt": PROMPT}])))
    several = run("several", "--adapter", f"a={adapters['one']}", "--adapter", f"b={adapters['two']}")
    assert (several[0]["text"], several[2]["text"]) == (one[0]["text"], plain[0]["text"])
    assert "no adapter `nine`; loaded: a, b" in several[1]["error"]
    source.write_text("\n".join(json.dumps({"id": i, "prompt": PROMPT}) for i in range(3)))
    done = penstock(*common, "-o", tmp_path / "one", "--adapter", str(adapters["two"]), home=tmp_path)
    check_error(done, 2, "belongs to another run", "adapter")


def test_from_python_and_in_the_terminal(tiny_llama: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    from penstock import LLM
    from penstock.errors import InvalidRequest, PenstockError

    with LLM(tiny_llama, dtype="float32", threads=1, adapters={"one": adapters["one"]}) as llm:
        plain, one = (llm.generate(PROMPT, max_new_tokens=6, adapter=name).text for name in (None, "one"))
        assert plain != one
        for result in llm.each([PROMPT] * 3, max_new_tokens=6, adapter="one"):
            if "two" not in llm.adapters:  # while others of the call still run
                llm.load_adapter("two", adapters["two"])
            assert result.text == one
        assert llm.adapters == ["one", "two"]
        assert llm.generate(PROMPT, max_new_tokens=6, adapter="two").text not in (plain, one)
        rows = llm.generate([{"prompt": PROMPT, "adapter": "one"}, {"prompt": PROMPT}], max_new_tokens=6)
        assert [row.text for row in rows] == [one, plain]
        said = llm.chat(PROMPT, max_new_tokens=6, adapter="one").text
        llm.unload_adapter("two")
        with pytest.raises(InvalidRequest, match="no adapter `two`"):
            llm.generate(PROMPT, adapter="two")
        with pytest.raises(PenstockError, match="no adapter `two`"):
            llm.unload_adapter("two")
    flags = ("--adapter", str(adapters["one"]), "--max-new-tokens", "6", "--dtype", "float32", "--threads", "1")
    done = penstock("chat", tiny_llama, PROMPT, *flags, home=tmp_path)
    assert done.stdout.decode().strip() == str(said).strip()
    check_error(
        penstock("chat", "--url", "http://x", "--adapter", "y", "hi", home=tmp_path), 2, "give the adapter's name"
    )
