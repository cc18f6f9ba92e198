"""Running a server: keys that nobody sees, logs, traces, TGI's launcher."""

from __future__ import annotations

import http.server
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.process import check_error, penstock

from .conftest import StartServer
from .running import Server, launch

KEY = "a-very-secret-key-0123456789"
PROMPT = "the confidential fox"
SHORT = {"inputs": PROMPT, "parameters": {"max_new_tokens": 2}}


def seen_by_others(server: Server) -> bytes:
    """What the system shows of the server's processes."""
    found = b""
    for pid in (server.process.pid, server.engine_pid()):
        for name in ("cmdline", "environ"):
            found += Path(f"/proc/{pid}/{name}").read_bytes()
    return found


@pytest.mark.parametrize("way", ["flag", "flag=", "API_KEY", "PENSTOCK_API_KEY"])
def test_a_key_given_openly_is_hidden(start_server: StartServer, tiny_llama: Path, way: str) -> None:
    flags = {"flag": ["--api-key", KEY], "flag=": [f"--api-key={KEY}"]}.get(way, [])
    variables = {} if flags else {way: KEY}
    server = start_server(tiny_llama, *flags, **variables)
    assert KEY.encode() not in seen_by_others(server)
    assert ("WARNING: a key on the command line" in server.errors) == bool(flags)
    assert KEY not in server.errors
    assert server.key == KEY  # this user can read it where the server says
    assert server.get("/info", Authorization=f"Bearer {KEY}").status == 200
    assert server.get("/info", Authorization="", x_api_key=KEY).status == 200
    assert server.get("/info", Authorization="", x_api_key=f"{KEY}x").status == 401
    assert server.get("/info", Authorization="Bearer wrong", x_api_key=KEY).status == 401
    server.interrupt()
    assert server.wait() == 0


def test_keys_that_contradict(tmp_path: Path, tiny_llama: Path) -> None:
    done = penstock("serve", tiny_llama, "--api-key", KEY, "--no-auth", home=tmp_path)
    assert KEY not in check_error(done, 2, "contradicts")
    file = tmp_path / "penstock.toml"
    file.write_text(f'[serve]\napi-key = "{KEY}"\n')
    done = penstock("--config", file, "serve", tiny_llama, home=tmp_path)
    assert KEY not in check_error(done, 2, "api-key-file")


def test_named_keys_are_named_in_the_log(start_server: StartServer, tiny_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# our group\nanna: first-key\n\nben: second-key\nplain-key\n")
    file.chmod(0o600)
    server = start_server(tiny_llama, "--api-key-file", str(file))
    for key in ("first-key", "second-key", "plain-key"):
        assert server.post("/generate", SHORT, Authorization=f"Bearer {key}").status == 200
    assert server.post("/generate", SHORT, Authorization="Bearer anna: first-key").status == 401
    assert server.post("/generate", SHORT, Authorization="Bearer # our group").status == 401
    lines = [line for line in server.errors.splitlines() if "penstock.request" in line and "status=200" in line]
    assert [re.findall("key=(.*?) ", line) for line in lines] == [["anna"], ["ben"], []]


def records(server: Server) -> list[dict[str, Any]]:
    return [json.loads(line) for line in server.errors.splitlines()]


def test_every_request_is_one_line_of_json(start_server: StartServer, tiny_llama: Path) -> None:
    server = start_server(tiny_llama, "--json-output")
    assert server.post("/generate", SHORT, x_request_id="mine-1").status == 200
    assert server.post("/generate", {"inputs": PROMPT, "parameters": {"top_p": 2}}).status == 422
    assert server.post("/v1/chat/completions", "{", x_request_id="bad").status == 400
    assert server.get("/health").status == 200
    hostile = "/%0aINFO%20forged%1b[31m" + "x" * 1000
    assert server.post(hostile, "{}", x_request_id="a b").status == 404
    assert server.post("/generate", SHORT, Authorization="").status == 401
    time.sleep(0.2)
    made = [record for record in records(server) if record["target"] == "penstock.request"]
    assert [record["status"] for record in made] == [200, 422, 400, 404, 401]
    first = made[0]
    assert list(first)[:4] == ["timestamp", "level", "message", "target"]
    assert (first["level"], first["message"], first["request_id"]) == ("INFO", "Success", "mine-1")
    assert (first["method"], first["path"], first["generated_tokens"]) == ("POST", "/generate", 2)
    assert first["prompt_tokens"] > 2
    for name in ("validation_time", "queue_time", "prefill_time", "decode_time", "total_time"):
        assert 0 <= first[name] < 60
    assert len(made[3]["path"]) == 200
    assert made[3]["path"].startswith("/\nINFO forged\x1b[31m")  # inside a JSON string, where it cannot forge anything
    assert PROMPT not in server.errors
    assert {record["message"] for record in records(server)} >= {"Success", "Failure"}


def test_no_control_character_reaches_the_log(start_server: StartServer, tiny_llama: Path) -> None:
    server = start_server(tiny_llama)
    before = len(server.errors.splitlines())
    for path in ("/%0aERROR%20forged", "/%1b[2J", "/%00", "/%c2%9b31m"):
        server.post(path, "{}")
    time.sleep(0.2)
    lines = server.errors.splitlines()[before:]
    assert len(lines) == 4
    assert all(line.startswith("INFO penstock.request: Failure") for line in lines)
    assert all(c.isprintable() for line in lines for c in line)


@contextmanager
def collector() -> Iterator[tuple[str, list[bytes]]]:
    """An OTLP receiver: its address, and the bodies that it gets."""
    bodies: list[bytes] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", bodies
    finally:
        server.shutdown()
        server.server_close()


def test_traces_arrive_at_a_collector(start_server: StartServer, tiny_llama: Path) -> None:
    proto = pytest.importorskip(
        "opentelemetry.proto.collector.trace.v1.trace_service_pb2", reason="the extra `otel` is not installed"
    )
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with collector() as (url, bodies):
        server = start_server(tiny_llama, "--otlp-endpoint", url, "--otlp-service-name", "my-server")
        assert server.post("/generate", SHORT, traceparent=parent).status == 200
        assert server.get("/health").status == 200
        server.interrupt()
        assert server.wait() == 0
    spans: dict[str, Any] = {}
    for body in bodies:
        for resource in proto.ExportTraceServiceRequest.FromString(body).resource_spans:
            names = {a.key: a.value.string_value for a in resource.resource.attributes}
            assert names["service.name"] == "my-server"
            spans |= {span.name: span for scope in resource.scope_spans for span in scope.spans}
    assert set(spans) == {"POST /generate", "validate", "queued", "prefill", "decode"}
    whole = spans.pop("POST /generate")
    assert whole.trace_id.hex() == "0af7651916cd43dd8448eb211c80319c"
    assert whole.parent_span_id.hex() == "b7ad6b7169203331"
    for span in spans.values():
        assert span.parent_span_id == whole.span_id
        assert whole.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
        assert span.end_time_unix_nano <= whole.end_time_unix_nano + 1_000_000
    figures = {a.key: a.value.int_value for a in whole.attributes}
    assert (figures["http.response.status_code"], figures["gen_ai.usage.output_tokens"]) == (200, 2)
    assert PROMPT.encode() not in b"".join(bodies)


def test_traces_need_an_address(tmp_path: Path, tiny_llama: Path) -> None:
    done = penstock("serve", tiny_llama, "--port", "0", "--otlp-endpoint", "localhost:4317", home=tmp_path)
    check_error(done, 2, "not an HTTP address", "http://localhost:4318")


def test_traces_without_the_extra(tmp_path: Path, tiny_llama: Path) -> None:
    package = tmp_path / "site" / "opentelemetry"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError(name='opentelemetry')")
    path = f"{package.parent}:{Path(__file__).parents[2] / 'src'}"
    flags = ["--port", "0", "--otlp-endpoint", "http://localhost:4318"]
    done = penstock("serve", tiny_llama, *flags, home=tmp_path, PYTHONPATH=path)
    check_error(done, 3, "not installed", "pip install 'penstock[otel]'")


LINES = [
    "Args {", "Using attention", "Starting check and download process for", "Files are already present on the host",
    "Successfully downloaded weights for", "Starting shard", "Shard ready in", "Starting Webserver",
    "Warming up model", "KV-cache blocks:", "Setting max batch total tokens to", "Using backend V3",
    "Maximum input tokens defaulted to", "Maximum total tokens defaulted to", "Connected",
]  # fmt: skip


@pytest.mark.parametrize("json_output", [False, True])
def test_the_launcher_says_tgis_lines(tmp_path: Path, tiny_llama: Path, json_output: bool) -> None:
    """text-generation-launcher, as people start it: its flags, its environment, its output."""
    flags = ["--num-shard", "1", "--quantize", "bitsandbytes", "--trust-remote-code", "--cuda-graphs", "0"]
    flags += ["--json-output"] * json_output
    variables = {"MODEL_ID": str(tiny_llama), "PORT": "0", "SPECULATE": "2", "MASTER_ADDR": "x", "API_KEY": KEY}
    server = launch(tmp_path, tiny_llama, module="penstock.cli.serve_tgi", arguments=flags, **variables)
    out = server.process.stdout
    assert out is not None
    try:
        lines: list[str] = []
        while not lines or "Connected" not in lines[-1]:
            lines.append(out.readline().decode())
            assert lines[-1], server.errors
        if json_output:
            lines = [json.loads(line)["message"] for line in lines]
        places = [next(n for n, line in enumerate(lines) if words in line) for words in LINES]
        assert places == sorted(places)
        assert places[-1] == len(lines) - 1
        if not json_output:
            assert re.match(r"\S+Z  INFO text_generation_router: Connected$", lines[-1].strip())
        assert server.errors.count("note: --quantize bitsandbytes means int8 here") == 1
        assert "--cuda-graphs" not in server.errors
        assert "--trust-remote-code" not in server.errors  # nothing to say: this model needs no code
        assert KEY not in server.errors + "".join(lines)
        server.interrupt()
        assert server.wait() == 0
    finally:
        server.kill()


def every_flag() -> list[tuple[str, list[str]]]:
    """The launcher's flags of the reference, with a value that TGI takes."""
    text = """revision main|validation-workers 2|sharded false|num-shard 1|quantize awq|speculate 0|dtype bfloat16
    kv-cache-dtype fp8_e5m2|trust-remote-code|max-concurrent-requests 9|max-best-of 3|max-stop-sequences 5
    max-top-n-tokens 4|max-input-tokens 99|max-total-tokens 100|waiting-served-ratio 0.3|max-batch-prefill-tokens 4096
    max-batch-total-tokens 4096|max-waiting-tokens 20|max-batch-size 4|cuda-graphs 1,2|hostname 127.0.0.1
    prometheus-port 9000|shard-uds-path /tmp/x|master-addr localhost|master-port 29500|huggingface-hub-cache /tmp/x
    disable-custom-kernels|cuda-memory-fraction 1.0|rope-scaling linear|rope-factor 1.0|json-output
    otlp-service-name x|cors-allow-origin http://a|watermark-gamma 0.5|watermark-delta 2.0|ngrok-authtoken x
    ngrok-edge x|disable-grammar-support|env|max-client-batch-size 4|usage-stats off|payload-limit 2000000
    enable-prefill-logprobs|graceful-termination-timeout 9"""
    words = [entry.split() for line in text.splitlines() for entry in line.strip().split("|")]
    return [(name, value) for name, *value in words]


def test_every_flag_of_the_launcher_is_taken(tmp_path: Path, tiny_llama: Path) -> None:
    flags: list[str] = []
    for name, value in every_flag():
        flags += [f"--{name}", *value]
    server = launch(
        tmp_path,
        tiny_llama,
        "--json",
        module="penstock.cli.serve_tgi",
        arguments=["--model-id", str(tiny_llama), *flags],
    )
    out = server.process.stdout
    assert out is not None
    try:
        while not (line := out.readline()).startswith(b'{"url"'):
            assert line, server.errors
        server.ready = json.loads(line)
        info = server.get("/info").json()
        assert (info["max_concurrent_requests"], info["max_total_tokens"], info["max_input_tokens"]) == (9, 100, 99)
        refused = server.post("/generate", {"inputs": "a", "parameters": {"grammar": {"type": "regex", "value": "a"}}})
        assert refused.json()["error"] == "Input validation error: grammar is not supported"
    finally:
        server.kill()


def test_the_launcher_is_called_by_its_own_name(tmp_path: Path) -> None:
    shown = penstock("--help", home=tmp_path, module="penstock.cli.serve_tgi").stdout.decode()
    assert shown.startswith("Usage: text-generation-launcher [OPTIONS] [MODEL]\n")
    wrong = penstock("--nothing", home=tmp_path, module="penstock.cli.serve_tgi")
    assert wrong.returncode == 2
    assert "Try 'text-generation-launcher --help'" in wrong.stderr.decode()


def test_every_flag_has_tgis_environment_name(tmp_path: Path) -> None:
    """A wrong value of a typed one is refused with the name of the variable."""
    for name in ("MAX_TOTAL_TOKENS", "NUM_SHARD", "QUANTIZE", "MASTER_PORT", "CUDA_MEMORY_FRACTION", "SPECULATE"):
        done = penstock("serve", "demo", home=tmp_path, **{name: "nonsense"})
        assert done.returncode == 2
        assert name in done.stderr.decode()


def test_a_template_from_another_tokenizer_config(start_server: StartServer, tiny_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({"chat_template": "MINE {{ messages[0]['content'] }}"}))
    server = start_server(tiny_llama, "--tokenizer-config-path", str(file))
    answer = server.post("/chat_tokenize", {"messages": [{"role": "user", "content": "fox"}]})
    assert answer.json()["templated_text"] == "MINE fox"


def test_the_arguments_of_the_command_are_kept(tmp_path: Path, tiny_llama: Path) -> None:
    """The new process is the same command; and an error in it is one for people."""
    done = penstock("serve", tiny_llama, "--api-key", KEY, "--hostname", "no.such.host.invalid", home=tmp_path)
    assert KEY not in check_error(done, 3, "no.such.host.invalid")
