"""The OpenAPI document: it names every route, and schemathesis finds no answer that it does not name.

100 examples an operation here, some 8,000 requests in a minute; 2,000 examples with PENSTOCK_LONG_TESTS=1.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from penstock.server.openapi import OPERATIONS, document

from .conftest import StartServer
from .running import Server

LONG = os.environ.get("PENSTOCK_LONG_TESTS") == "1"
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def test_it_names_every_route() -> None:
    source = (Path(__file__).parents[2] / "src/penstock/server/app.py").read_text()
    routes = set(re.findall(r'^ +"(/[^"]*)":', source, re.MULTILINE))
    operations = list(OPERATIONS)
    assert len({(o.method, o.path) for o in operations}) == len(operations)
    assert {o.path for o in operations} >= routes
    text = msgspec.json.encode(document(operations)).decode()
    names = set(re.findall(r'"#/components/schemas/([^"]+)"', text))
    assert names <= set(document(operations)["components"]["schemas"])


def test_it_tells_which_streams_end_with_done() -> None:
    paths = document(list(OPERATIONS))["paths"]
    streams = {
        path: json.dumps(methods["post"]["responses"]["200"]["content"]["text/event-stream"])
        for path, methods in paths.items()
        if "text/event-stream" in methods.get("post", {}).get("responses", {}).get("200", {}).get("content", {})
    }
    ending = {path for path, schema in streams.items() if '"[DONE]"' in schema}
    assert ending == {"/invocations", "/v1/chat/completions", "/v1/completions", "/v1/responses"}
    assert set(streams) - ending == {"/", "/generate_stream", "/v1/messages"}


def test_it_is_served_with_a_page(server: Server) -> None:
    answer = server.get("/openapi.json", Authorization="")
    assert answer.json() == server.get("/api-doc/openapi.json").json()
    assert answer.json()["info"]["title"] == "Text Generation Inference"
    lead = server.get("/docs")
    assert (lead.status, lead.headers["location"]) == (303, "/docs/")
    page = server.get("/docs/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert not re.search(r'(src|href)="(https?:)?//', page.text)


@pytest.mark.timeout(3700 if LONG else 300)
def test_schemathesis_finds_nothing(start_server: StartServer, tiny_llama: Path, tmp_path: Path) -> None:
    """Positive and negative data, all phases: no status of 500 or more, none that the document does not name."""
    pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    # A small context, so that answers of unbounded length stay short.
    server = start_server(tiny_llama, "--max-total-tokens", "48", "--max-input-tokens", "32")
    done = subprocess.run(
        [
            sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json",
            "--header", f"Authorization: Bearer {server.key}", "--checks", CHECKS, "--mode", "all",
            "--phases", "examples,coverage,fuzzing,stateful", "--max-examples", "2000" if LONG else "100",
            "--no-shrink", "--generation-deterministic", "--generation-with-security-parameters", "false",
            "--suppress-health-check", "all", "--no-color", "--warnings", "off",
        ],
        cwd=tmp_path, capture_output=True, text=True, timeout=3600 if LONG else 240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "Traceback" not in server.errors
    server.wait_idle()
