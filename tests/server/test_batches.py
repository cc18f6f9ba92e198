"""/v1/files and /v1/batches with OpenAI's own client, kills and restarts included."""

from __future__ import annotations

import io
import json
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import StartServer
from .running import Server, start

openai = pytest.importorskip("openai", reason="openai is not installed")

SMALL = ("--max-batch-size", "8", "--max-batch-total-tokens", "8192", "--dtype", "float32")


def client_of(server: Server, key: str | None = None) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key or server.key or "none", max_retries=0)


def chat_lines(count: int, tokens: int = 4) -> bytes:
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": tokens, "temperature": 0}
    return b"".join(
        json.dumps({"custom_id": f"r{n}", "method": "POST", "url": "/v1/chat/completions", "body": body}).encode()
        + b"\n"
        for n in range(count)
    )


def run(client: Any, content: bytes, endpoint: str = "/v1/chat/completions", **more: Any) -> Any:
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **more)


def wait(client: Any, batch: Any, *statuses: str, seconds: float = 30) -> Any:
    until = time.monotonic() + seconds
    while batch.status not in (statuses or ("completed", "failed", "expired", "cancelled")):
        assert time.monotonic() < until, batch
        time.sleep(0.05)
        batch = client.batches.retrieve(batch.id)
    return batch


def answers(client: Any, file_id: str | None) -> dict[str, Any]:
    if file_id is None:
        return {}
    lines = [json.loads(line) for line in client.files.content(file_id).text.splitlines()]
    assert len({line["custom_id"] for line in lines}) == len(lines)
    return {line["custom_id"]: line for line in lines}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def batcher(tiny_llama: Path, home: Path) -> Iterator[Server]:
    keys = home / "keys"
    keys.write_text("anna: key-of-anna-123\nbert: key-of-bert-456\n")
    keys.chmod(0o600)
    found = start(home, tiny_llama, *SMALL, "--api-key-file", str(keys), "--batch-quota", "3000000")
    yield found
    found.kill()


@pytest.fixture
def anna(batcher: Server) -> Any:
    return client_of(batcher, "key-of-anna-123")


@pytest.fixture
def bert(batcher: Server) -> Any:
    return client_of(batcher, "key-of-bert-456")


def test_a_file_from_upload_to_deletion(anna: Any, bert: Any, home: Path) -> None:
    content = chat_lines(3) + "ü\r\n--not-a-boundary\r\n".encode()
    file = anna.files.create(file=("a/../b\x07.jsonl", io.BytesIO(content)), purpose="batch")
    assert (file.bytes, file.purpose, file.status, file.object) == (len(content), "batch", "processed", "file")
    assert "/" not in file.filename
    assert anna.files.retrieve(file.id) == file
    assert anna.files.content(file.id).read() == content
    assert file.id in [found.id for found in anna.files.list(purpose="batch")]
    for path in (home / ".cache/penstock/batches").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    for attempt in (bert.files.retrieve, bert.files.content, bert.files.delete):
        with pytest.raises(openai.NotFoundError):
            attempt(file.id)
    assert list(bert.files.list()) == []
    with pytest.raises(openai.NotFoundError):
        bert.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    assert anna.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        anna.files.retrieve(file.id)


def test_pages_of_files(anna: Any) -> None:
    made = [anna.files.create(file=("x", b"x"), purpose="user_data").id for _ in range(5)]
    found = [file.id for file in anna.files.list(purpose="user_data", limit=2)]
    assert sorted(found) == sorted(made)
    first = anna.files.list(purpose="user_data", limit=2)
    assert (len(first.data), first.has_more) == (2, True)
    for name in made:
        anna.files.delete(name)


def test_a_batch_of_conversations(anna: Any, bert: Any, batcher: Server) -> None:
    bad = {"custom_id": "bad", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": []}}
    streams = {**bad, "custom_id": "streams", "body": {"messages": [{"role": "user", "content": "x"}], "stream": True}}
    other = {**bad, "custom_id": "other", "body": {"model": "gpt-9", "messages": [{"role": "user", "content": "x"}]}}
    extra = b"".join(json.dumps(line).encode() + b"\n" for line in (bad, streams, other))
    batch = run(anna, chat_lines(40) + b"\n" + extra, metadata={"study": "7"})
    assert (batch.object, batch.endpoint, batch.metadata) == ("batch", "/v1/chat/completions", {"study": "7"})
    assert anna.files.retrieve(batch.input_file_id)
    done = wait(anna, batch)
    assert done.status == "completed"
    counts = done.request_counts
    assert (counts.total, counts.completed, counts.failed) == (43, 40, 3)
    assert done.created_at <= done.in_progress_at <= done.finalizing_at <= done.completed_at
    good, failed = answers(anna, done.output_file_id), answers(anna, done.error_file_id)
    assert set(good) == {f"r{n}" for n in range(40)}
    whole = anna.chat.completions.create(
        model="tgi", messages=[{"role": "user", "content": "hello"}], max_tokens=4, temperature=0
    )
    for line in good.values():
        assert (line["response"]["status_code"], line["error"]) == (200, None)
        body = line["response"]["body"]
        assert body["object"] == "chat.completion"
        assert body["choices"][0]["message"]["content"] == whole.choices[0].message.content
    assert {name: line["response"]["status_code"] for name, line in failed.items()} == {
        "bad": 422, "streams": 400, "other": 404,
    }  # fmt: skip
    assert "gpt-9" in failed["other"]["response"]["body"]["error"]["message"]
    assert done.id in [found.id for found in anna.batches.list(limit=1)]
    assert list(bert.batches.list()) == []
    for attempt in (bert.batches.retrieve, bert.batches.cancel):
        with pytest.raises(openai.NotFoundError):
            attempt(done.id)
    with pytest.raises(openai.ConflictError):
        anna.batches.cancel(done.id)
    batcher.wait_idle()


@pytest.mark.parametrize(
    ("endpoint", "body", "kind"),
    [
        ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 2, "n": 3, "logprobs": 1}, "text_completion"),
        ("/v1/embeddings", {"input": "the fox"}, "list"),
        ("/v1/responses", {"input": "hello", "max_output_tokens": 3}, "response"),
    ],
)
def test_other_endpoints(anna: Any, endpoint: str, body: Any, kind: str) -> None:
    line = json.dumps({"custom_id": "x", "method": "POST", "url": endpoint, "body": body}).encode()
    done = wait(anna, run(anna, line, endpoint))
    assert answers(anna, done.output_file_id)["x"]["response"]["body"]["object"] == kind, answers(
        anna, done.error_file_id
    )


@pytest.mark.parametrize(
    ("content", "code", "line"),
    [
        (b"", "empty_file", None),
        (chat_lines(2) + b"{]\n", "invalid_json_line", 3),
        (chat_lines(1) * 2, "duplicate_custom_id", 2),
        (b'{"custom_id": "a", "url": "/v1/embeddings", "body": {}}', "mismatched_url", 1),
        (b'{"custom_id": "a", "url": "/v1/files", "body": {}}', "invalid_json_line", 1),
        (b'{"custom_id": "a", "url": "/v1/chat/completions", "body": []}', "invalid_json_line", 1),
        (b"\xff\xfe\n", "invalid_json_line", 1),
    ],
)
def test_a_batch_with_a_bad_line_fails_as_a_whole(anna: Any, content: bytes, code: str, line: int | None) -> None:
    done = wait(anna, run(anna, content or b"\n"))
    assert done.status == "failed"
    assert (done.errors.data[0].code, done.errors.data[0].line) == (code, line)
    assert done.output_file_id is None


def test_what_cannot_be_created(anna: Any, batcher: Server) -> None:
    file = anna.files.create(file=("in.jsonl", chat_lines(1)), purpose="batch")
    data = anna.files.create(file=("x", b"x"), purpose="user_data")
    good = {"input_file_id": file.id, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    for wrong in (
        {"endpoint": "/v1/images"},
        {"completion_window": "soon"},
        {"metadata": {"k" * 65: "v"}},
        {"input_file_id": data.id},
        {"output_expires_after": {"anchor": "created_at", "seconds": 5}},
    ):
        with pytest.raises(openai.BadRequestError):
            anna.batches.create(**{**good, **wrong})
    for name in ("file-nothing", "file-" + "0" * 24, "../../../etc/passwd"):
        with pytest.raises(openai.NotFoundError):
            anna.batches.create(**{**good, "input_file_id": name})
    key = {"Authorization": "Bearer key-of-anna-123"}
    for method, path, status in (
        ("GET", "/v1/files/..%2f..%2fx", 404),
        ("DELETE", "/v1/files", 405),
        ("PUT", "/v1/batches", 405),
        ("GET", "/v1/files/x/y", 404),
        ("GET", "/v1/filesystem", 404),
        ("GET", "/v1/files?limit=0", 400),
        ("GET", "/v1/batches?after=nobody", 404),
    ):
        assert batcher.ask(method, path, None, **key).status == status, path
    assert batcher.ask("GET", "/v1/files", None, Authorization="").status == 401


def test_forms_that_are_no_uploads(anna: Any, batcher: Server, home: Path) -> None:
    before = sorted(path.name for path in (home / ".cache/penstock/batches").rglob("file-*"))
    part = b'--b\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n%b\r\n'
    purpose, end = part % (b"purpose", b"", b"batch"), b"--b--\r\n"
    file = part % (b"file", b'; filename="f"', b"x")
    for body, status in (
        (purpose + end, 400),
        (file + end, 400),
        (purpose + file, 400),
        (purpose + file + file + end, 400),
        (purpose.replace(b"batch", b"evil") + file + end, 400),
        (part % (b"purpose", b"", b"x" * 5000) + file + end, 400),
        (b"not a form", 400),
        (b"", 400),
        (purpose + part % (b"file", b"", b"x" * 4_000_000) + end, 413),
        (purpose + file + end, 200),
    ):
        answer = batcher.ask(
            "POST", "/v1/files", body, Authorization="Bearer key-of-bert-456",
            Content_Type="multipart/form-data; boundary=b",
        )  # fmt: skip
        assert answer.status == status, (body[:200], answer.body)
    headers = {"Authorization": "Bearer key-of-bert-456", "Content_Type": "application/json"}
    assert batcher.ask("POST", "/v1/files", b"{}", **headers).status == 415
    after = {path.name for path in (home / ".cache/penstock/batches").rglob("file-*")} - set(before)
    assert len(after) == 2  # the good one's bytes and what is known of it


def test_the_quota_counts_what_is_kept(anna: Any) -> None:
    made = [anna.files.create(file=("x", b"x" * 900_000), purpose="user_data").id for _ in range(2)]
    with pytest.raises(openai.APIStatusError) as caught:
        anna.files.create(file=("x", b"x" * 1_500_000), purpose="user_data")
    assert caught.value.status_code == 413
    for name in made:
        anna.files.delete(name)
    anna.files.delete(anna.files.create(file=("x", b"x" * 1_500_000), purpose="user_data").id)


def test_interactive_requests_go_first(long_llama: Path, start_server: StartServer, tmp_path: Path) -> None:
    """A full batch beside it costs a person's request little more than the longer steps."""
    server = start_server(long_llama, *SMALL)
    client = client_of(server)
    batch = wait(client, run(client, chat_lines(200, tokens=400)), "in_progress")
    time.sleep(0.3)
    assert 0 < server.metric("tgi_batch_current_size") <= 4
    since = time.monotonic()
    answer = server.post("/generate", {"inputs": "fox", "parameters": {"max_new_tokens": 4}})
    assert answer.status == 200
    assert time.monotonic() - since < 1.0
    with pytest.raises(openai.ConflictError):
        client.files.delete(batch.input_file_id)
    cancelling = client.batches.cancel(batch.id)
    assert cancelling.status == "cancelling"
    done = wait(client, cancelling)
    assert done.status == "cancelled"
    assert done.request_counts.completed < 200
    assert len(answers(client, done.output_file_id)) == done.request_counts.completed
    server.wait_idle()


def test_a_batch_survives_kills_and_restarts(tiny_llama: Path, tmp_path: Path) -> None:
    """The server is killed three times in the midst of it, once politely: every line is answered exactly once."""
    keys = tmp_path / "keys"
    keys.write_text("the-key-123456\n")
    keys.chmod(0o600)
    flags = (*SMALL, "--api-key-file", str(keys), "--batch-dir", str(tmp_path / "kept"))
    server = start(tmp_path, tiny_llama, *flags)
    client = client_of(server)
    batch = run(client, chat_lines(400, tokens=24))
    done = 0
    for polite in (False, True, False):
        until = time.monotonic() + 20
        while done + 20 > (done_now := client.batches.retrieve(batch.id).request_counts.completed):
            assert time.monotonic() < until
            time.sleep(0.02)
        done = done_now
        assert done < 400
        if polite:
            server.interrupt()
            assert server.wait() == 0
        server.kill()
        server = start(tmp_path, tiny_llama, *flags)
        client = client_of(server)
        assert client.batches.retrieve(batch.id).request_counts.completed >= done - 1
    over = wait(client, batch, seconds=60)
    server.kill()
    assert over.status == "completed"
    assert over.request_counts.completed == 400


def test_a_line_that_was_running_when_the_engine_died_is_tried_again(
    tiny_llama: Path, start_server: StartServer
) -> None:
    import os
    import signal

    server = start_server(tiny_llama, *SMALL)
    client = client_of(server)
    batch = wait(client, run(client, chat_lines(300, tokens=24)), "in_progress")
    time.sleep(0.3)
    os.kill(server.engine_pid(), signal.SIGKILL)
    done = wait(client, batch, seconds=60)
    assert (done.request_counts.completed, done.request_counts.failed) == (300, 0)


def test_files_can_be_off(tiny_llama: Path, start_server: StartServer) -> None:
    server = start_server(tiny_llama, "--batch-dir", "off")
    assert server.get("/v1/files").status == 404
