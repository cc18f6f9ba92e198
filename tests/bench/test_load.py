"""`penstock bench load` against real servers: ours over all three routes, one that is started for it, and bad ones."""

from __future__ import annotations

import http.server
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.process import check_error, command, environment, penstock
from tests.server.running import Server, start


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    found = start(tmp_path_factory.mktemp("home"), "demo", "--threads", "1")
    yield found
    found.kill()


def key_file(server: Server) -> tuple[str, str]:
    return "--api-key-file", str(server.ready["key_file"])


def run(server: Server, home: Path, *flags: str | Path) -> subprocess.CompletedProcess[bytes]:
    return penstock("bench", "load", "--url", server.url, *key_file(server), "--no-limits", *flags, home=home)


def stages(done: subprocess.CompletedProcess[bytes]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr.decode()
    found: list[dict[str, Any]] = json.loads(done.stdout)["stages"]
    return found


def generated(server: Server) -> int:
    """Tokens that a server has made so far."""
    return int(re.findall(r"^penstock_generated_tokens_total (\d+)", server.ask("GET", "/metrics").text, re.M)[0])


@pytest.mark.parametrize(("api", "exact"), [("auto", False), ("completions", True), ("chat", True)])
def test_closed_loop(demo: Server, tmp_path: Path, api: str, exact: bool) -> None:
    """Every route; where the end of sequence can be ignored, every answer has all of its tokens."""
    before = generated(demo)
    flags = ("--api", api, "-c", "4", "-n", "12", "--prompt-tokens", "40", "--output-tokens", "24", "--json")
    done = run(demo, tmp_path, *flags)
    (stage,) = stages(done)
    assert json.loads(done.stdout)["api"] == ("tgi" if api == "auto" else api)
    assert stage["outcomes"] == {"ok": 12}
    assert stage["tokens_told"]
    if exact:
        assert stage["output_tokens"] == 12 * 24
    made = generated(demo) - before
    assert stage["output_tokens"] <= made <= stage["output_tokens"] + 4  # and those that fitted the prompts
    assert abs(stage["prompt_tokens"] / 12 - 40) < (12 if api == "chat" else 4)
    assert 0 < stage["ttft"]["p50"] <= stage["e2e"]["p50"]
    assert 0 < stage["itl"]["p50"] <= stage["itl"]["p99"]
    assert stage["bytes_per_second"] > 0
    assert sum(n for _, n in stage["timeline"]) == stage["output_tokens"]


def test_open_loop_and_slo(demo: Server, tmp_path: Path) -> None:
    """Requests leave at their rate; latencies count from when they were due."""
    flags = ("--rate", "40", "--arrivals", "constant", "-n", "20", "--prompt", "Once upon", "--output-tokens", "4")
    (stage,) = stages(run(demo, tmp_path, *flags, "--slo-ttft", "60000", "--slo-e2e", "0.001", "--json"))
    assert stage["outcomes"] == {"ok": 20}
    assert 19 / 40 <= stage["seconds"] < 5
    assert stage["good_share"] == 0
    assert stage["lateness"]["p50"] < 50
    (stage,) = stages(run(demo, tmp_path, *flags, "--slo-ttft", "60000", "--json"))
    assert stage["good_share"] == 1


def test_sweep_report_and_plots(demo: Server, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "The fox"}\n{"prompt": "A lake"}\n')
    flags = ("--prompts", tmp_path / "p.jsonl", "-c", "1", "-c", "3", "-n", "6", "--output-tokens", "8")
    done = run(demo, tmp_path, *flags, "--html", tmp_path / "r.html", "--csv", tmp_path / "r.csv")
    assert done.returncode == 0, done.stderr.decode()
    load, latency = done.stdout.decode().split("\n\n")[:2]
    assert "| 1 streams |" in load
    assert "| 3 streams |" in load
    assert "inter-token" in latency
    page = (tmp_path / "r.html").read_text()
    assert page.count("<svg") == page.count("</svg>") >= 6
    assert not re.search(r"(src|href)=|@import|url\(", page)  # one file that needs no other
    assert "nan" not in page
    assert (tmp_path / "r.csv").read_text().count("\n") == 3


def test_cancellations(demo: Server, tmp_path: Path) -> None:
    flags = ("-c", "3", "-n", "15", "--cancel", "1", "--output-tokens", "50", "--prompt", "Once")
    (stage,) = stages(run(demo, tmp_path, *flags, "--api", "completions", "--json"))
    assert stage["outcomes"] == {"cancelled": 15}
    deadline = time.monotonic() + 10
    while "tgi_batch_current_size 0" not in demo.ask("GET", "/metrics").text:
        assert time.monotonic() < deadline, "the server went on with requests whose clients had left"
        time.sleep(0.1)


def test_png_without_matplotlib(demo: Server, tmp_path: Path) -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        check_error(run(demo, tmp_path, "--png", tmp_path / "r.png"), 3, "matplotlib", "penstock[plot]")
        return
    done = run(demo, tmp_path, "-n", "4", "--prompt", "Once", "--output-tokens", "4", "--png", tmp_path / "r.png")
    assert done.returncode == 0, done.stderr.decode()
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_wrong_key(demo: Server, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("wrong\n")
    done = penstock("bench", "load", "--url", demo.url, "--api-key-file", tmp_path / "key", home=tmp_path)
    check_error(done, 3, "refuses the key", "401", "--api-key-file")


def test_nobody_listens(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        done = penstock("bench", "load", "--url", url, home=tmp_path)
    check_error(done, 3, "No server answers")


def test_too_many_requests(tmp_path: Path) -> None:
    """A server of one place: the others are refused, wait, and are no failures."""
    server = start(tmp_path, "demo", "--threads", "1", "--max-concurrent-requests", "1")
    try:
        (stage,) = stages(run(server, tmp_path, "-c", "3", "--prompt", "Once", "--duration", "2", "--json"))
    finally:
        server.kill()
    assert stage["outcomes"]["ok"] > 0
    assert stage["outcomes"]["refused"] > 0
    assert "failed" not in stage["outcomes"]
    assert stage["errors"] == {"429 too many requests": stage["outcomes"]["refused"]}


def wait_for_tokens(server: Server, count: int) -> None:
    """Until the server has made so many."""
    deadline = time.monotonic() + 20
    while generated(server) < count:
        assert time.monotonic() < deadline, "the load does not arrive"
        time.sleep(0.05)


def endless(server: Server) -> list[str]:
    """A load that goes on for a minute."""
    flags = ("-c", "2", "--duration", "60", "--json", "--prompt", "Once")
    return command("bench", "load", "--url", server.url, *key_file(server), *flags)


def test_the_server_dies(tmp_path: Path) -> None:
    server = start(tmp_path, "demo", "--threads", "1")
    args = endless(server)
    with subprocess.Popen(args, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait_for_tokens(server, 500)
        server.kill()
        out, error = process.communicate(timeout=30)
    assert process.returncode == 6, error.decode()
    assert b"stopped answering" in error
    (stage,) = json.loads(out)["stages"]
    assert stage["outcomes"]["ok"] > 0
    assert stage["outcomes"]["failed"] > 0


def test_ctrl_c(demo: Server, tmp_path: Path) -> None:
    args, generated_before = endless(demo), generated(demo)
    with subprocess.Popen(args, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait_for_tokens(demo, generated_before + 500)
        os.kill(process.pid, signal.SIGINT)
        out, error = process.communicate(timeout=20)
    assert process.returncode == 130, error.decode()
    found = json.loads(out)
    assert found["interrupted"]
    assert found["stages"][0]["outcomes"]["ok"] > 0


def test_a_server_of_its_own(tmp_path: Path) -> None:
    """MODEL instead of --url: started, loaded, ended, with its run report."""
    done = penstock(
        "bench", "load", "demo", "--threads", "1", "-c", "4", "-n", "8", "--output-tokens", "16", "--report",
        "--prompt-tokens", "30", "--shared-prefix-tokens", "20", home=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    text = done.stdout.decode()
    assert re.search(r"of [\d.]+ GB/s", text)
    assert "TFLOP/s" in text
    assert "bottleneck" in done.stderr.decode()
    assert not list(tmp_path.glob("config/penstock/keys/*.key"))  # it has ended in order


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    done = penstock("bench", "load", "./nothing", home=tmp_path)
    assert done.returncode == 4
    assert b"nothing" in done.stderr


class Strange(http.server.BaseHTTPRequestHandler):
    """An OpenAI server of another make: no /info, no chat of usage with each chunk, CRLF, no `ignore_eos`."""

    protocol_version = "HTTP/1.1"
    asked: list[dict[str, Any]] = []  # noqa: RUF012

    def log_message(self, *args: Any) -> None:
        pass

    def _json(self, status: int, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._json(200, {"data": [{"id": "strange"}]})
        else:
            self._json(404, {"error": {"message": "not here"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/chat/completions":
            self._json(404, {"error": {"message": "not here"}})
            return
        self.asked.append(body)
        if "ignore_eos" in body:
            self._json(400, {"error": {"message": "Unrecognized request argument supplied: ignore_eos"}})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        words = len(body["messages"][0]["content"].split())
        events: list[Any] = [{"choices": [{"delta": {"content": "two tokens"}}]} for _ in range(3)]
        events.append({"choices": [], "usage": {"prompt_tokens": 5 + 2 * words, "completion_tokens": 6}})
        for event in events:
            self.wfile.write(b"data: " + json.dumps(event).encode() + b"\r\n\r\n")
        self.wfile.write(b"data: [DONE]\r\n\r\n")
        self.close_connection = True


def test_a_server_of_another_make(tmp_path: Path) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Strange) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        done = penstock("bench", "load", "--url", url, "-n", "5", "--prompt-tokens", "45", "--json", home=tmp_path)
        server.shutdown()
    (stage,) = stages(done)
    assert json.loads(done.stdout)["api"] == "chat"
    assert stage["outcomes"] == {"ok": 5}
    assert stage["output_tokens"] == 5 * 6
    assert stage["prompt_tokens"] == 5 * 45  # 5 + 2 x 20 words
    assert stage["bytes_per_second"] is None
    assert "ignore_eos" not in Strange.asked[-1]
    assert Strange.asked[-1]["model"] == "strange"


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ((), "Give one of MODEL, --url and --uds"),
        (("demo", "--url", "http://x"), "Give one of"),
        (("demo", "--rate", "1", "-c", "2"), "open loop"),
        (("--url", "ftp://x"), "not the URL"),
        (("--url", "http://x", "--report"), "started here"),
    ],
)
def test_contradictions(tmp_path: Path, flags: tuple[str, ...], word: str) -> None:
    check_error(penstock("bench", "load", *flags, home=tmp_path), 2, word)
