"""What clients of the OpenAI and Anthropic routes see when the engine dies in the midst of their streams."""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from .conftest import StartServer
from .running import events_of

TALK = [{"role": "user", "content": "the quick"}]
LONG: dict[str, Any] = {"max_tokens": 60000, "ignore_eos": True, "stream": True}
ASKED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": TALK, "n": 2, **LONG},
    "/v1/completions": {"prompt": "the quick", **LONG},
    "/v1/responses": {"input": "the quick", "max_output_tokens": 60000, "ignore_eos": True, "stream": True},
    "/v1/messages": {"messages": TALK, "max_tokens": 60000, "stream": True},
}


def test_streams_end_with_an_error_in_their_own_shape(start_server: StartServer, long_llama: Path) -> None:
    server = start_server(long_llama)
    with ExitStack() as stack:
        streams = {path: stack.enter_context(server.stream(path, body)) for path, body in ASKED.items()}
        for stream in streams.values():
            assert stream.status == 200
            for _ in range(6):
                stream.readline()
        os.kill(server.engine_pid(), signal.SIGKILL)
        rests = {path: stream.read() for path, stream in streams.items()}
    for path in ("/v1/chat/completions", "/v1/completions"):
        *_, failure, done = events_of(rests[path])
        assert done == "[DONE]"
        assert "the engine stopped" in failure["error"]["message"]
        assert failure["error"]["type"] == "server_error"
    *_, failed, done = events_of(rests["/v1/responses"])
    assert done == "[DONE]"
    assert (failed["type"], failed["response"]["status"]) == ("response.failed", "failed")
    assert "the engine stopped" in failed["response"]["error"]["message"]
    last = rests["/v1/messages"].decode().rstrip("\n").rsplit("\n\n", 1)[-1]
    assert last.startswith('event: error\ndata: {"type":"error","error":{"type":"api_error"')
    server.wait_health(200, 30)
    assert server.post("/v1/completions", {"prompt": "the quick", "max_tokens": 2}).status == 200
