"""What the API process costs for each streamed token: its CPU time at many streams, the engine replaced by a mock.

    python benchmarks/api_overhead.py [--streams 64] [--tokens 500] [--route chat]

Three processes: a mock of the engine, which speaks the engine's wire and makes one token for every stream at each step;
the API process, which is the real server from its socket to the engine's (uvicorn, key check, routes, text); and a
client that counts events. Only the API process is measured, by its own CPU clock, so what runs beside it hardly shows.
--step-ms paces the mock like a model: then every step wakes the API process anew, which costs more than a full queue.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

from penstock.engine import wire
from penstock.engine.client import EngineClient
from penstock.engine.config import EngineConfig
from penstock.engine.limits import Limits
from penstock.engine.messages import Ready
from penstock.engine.output import EngineStats, SequenceOutput, StepOutput, Token
from penstock.engine.request import EngineRequest

MODEL = Path(__file__).parent.parent / "src" / "penstock" / "demo" / "model"
PROMPT = "Once upon a time there was a small fox"
LIMITS = Limits(
    max_input_tokens=65535, max_total_tokens=65536, vocab_size=2560, eos_ids=[1], block_size=16, num_blocks=65536,
    max_batch_prefill_tokens=4096, max_batch_size=256, dtype="float32",
)  # fmt: skip
ROUTES = {
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": PROMPT}]}),
    "completions": ("/v1/completions", {"prompt": PROMPT}),
    "generate": ("/generate_stream", {"inputs": PROMPT}),
    "responses": ("/v1/responses", {"input": PROMPT}),
    "messages": ("/v1/messages", {"messages": [{"role": "user", "content": PROMPT}]}),
}
FIRST_ID, LAST_ID = 300, 2000  # ordinary tokens of the demo model's vocabulary


class MockedEngine(EngineClient):
    """The real client of the engine; the process at the other end is `run_engine`."""

    pace: tuple[str, ...] = ()

    async def _launch(self) -> asyncio.StreamReader:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, __file__, "--engine", str(theirs.fileno()), *self.pace]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        reader, self._writer = await asyncio.open_connection(sock=ours)
        body = await reader.readexactly(wire.body_length(await reader.readexactly(wire.HEADER)))
        ready = wire.from_engine(body)
        assert isinstance(ready, Ready)
        self.limits = ready.limits
        self._heard, self._serving = time.monotonic(), True
        return reader


def run_engine(descriptor: int, step_seconds: float) -> None:
    """A token for every stream at each step; step_seconds 0: as fast as the API process takes them."""
    stream = socket.socket(fileno=descriptor)
    stream.sendall(wire.frame(Ready(LIMITS)))
    left: dict[int, int] = {}  # tokens still to come, by request
    pending = b""
    rng = random.Random(0)
    for step in itertools.count():
        stream.setblocking(not left)
        try:
            data = stream.recv(1 << 20)
            if not data:
                return
            pending += data
        except BlockingIOError:
            pass
        stream.setblocking(True)
        while len(pending) >= wire.HEADER and len(pending) >= wire.HEADER + wire.body_length(pending):
            end = wire.HEADER + wire.body_length(pending)
            message, pending = wire.to_engine(pending[wire.HEADER : end]), pending[end:]
            if isinstance(message, EngineRequest):
                left[message.id] = message.max_new_tokens
            else:
                left.pop(message.id, None)
        outputs = []
        for request, count in list(left.items()):
            left[request] -= 1
            finish = "length" if count == 1 else None
            outputs.append(SequenceOutput(request, [Token(rng.randint(FIRST_ID, LAST_ID), -1.25)], finish))
            if finish:
                del left[request]
        if outputs:
            time.sleep(step_seconds)
            stats = EngineStats(running=len(left), total_blocks=65536, free_blocks=60000, steps=step)
            stream.sendall(wire.frame(StepOutput(outputs, stats)))


async def serve(ready: socket.socket, step_ms: float) -> None:
    """The API process: serves until its parent closes the pipe, answering each line with its CPU seconds so far."""
    from penstock.server.app import App
    from penstock.server.config import ServeConfig
    from penstock.server.guard import Guard
    from penstock.server.house import House
    from penstock.server.launch import load_text
    from penstock.server.protocol import HttpServer

    config = ServeConfig(model="mock", engine=EngineConfig(model_path=str(MODEL)), max_concurrent_requests=4096)
    engine = MockedEngine(config.engine, lambda stage: None)
    engine.pace = ("--step-ms", str(step_ms))
    await engine.start()
    tokenizer, template = load_text(MODEL, config)
    house = House(config, engine, tokenizer, template)
    server = HttpServer(Guard(App(house), config, None), config.header_seconds, config.unread_seconds)
    listening = socket.create_server(("127.0.0.1", 0), backlog=4096)
    serving = asyncio.create_task(server.run_on(listening))
    reader, writer = await asyncio.open_connection(sock=ready)
    writer.write(b"%d\n" % listening.getsockname()[1])
    while await reader.readline():
        writer.write(b"%.6f\n" % time.process_time())
    server.leave.set()
    await serving
    await engine.stop()
    house.close()


async def load(port: int, route: str, streams: int, tokens: int) -> int:
    """Run the streams to their ends; returns how many events came."""
    path, body = ROUTES[route]
    body = {**body, "stream": True, "max_tokens": tokens, "ignore_eos": True, "max_output_tokens": tokens}
    if route == "generate":
        body = {**body, "parameters": {"max_new_tokens": tokens}}
    elif route != "responses":
        del body["max_output_tokens"]
    raw = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(raw)}\r\nConnection: close\r\n\r\n".encode() + raw

    async def one() -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
        writer.write(request)
        answer = await reader.read()
        writer.close()
        assert answer.startswith(b"HTTP/1.1 200"), answer[:500]
        return answer.count(b"data: ")

    return sum(await asyncio.gather(*(one() for _ in range(streams))))


def measure(route: str, streams: int, tokens: int, rounds: int, step_ms: float) -> None:
    """Start the API process, drive it, print its CPU time per event."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, __file__, "--serve", str(theirs.fileno()), "--step-ms", str(step_ms)]
    with subprocess.Popen(command, pass_fds=[theirs.fileno()]) as server:
        theirs.close()
        pipe = ours.makefile("rwb", buffering=0)
        port = int(pipe.readline())

        def cpu_seconds() -> float:
            pipe.write(b"\n")
            return float(pipe.readline())

        asyncio.run(load(port, route, streams, 20))
        costs = []
        for _ in range(rounds):
            before = cpu_seconds()
            events = asyncio.run(load(port, route, streams, tokens))
            assert events >= streams * tokens, events
            costs.append((cpu_seconds() - before) / (streams * tokens))
        ours.shutdown(socket.SHUT_WR)
        server.wait(20)
    cost = statistics.median(costs)
    spread = f"{min(costs) * 1e6:.1f}-{max(costs) * 1e6:.1f}"
    print(
        f"{route}: {streams} streams x {tokens} tokens, {step_ms:g} ms a step, {cost * 1e6:.1f} us of CPU a token "
        f"({spread}, {rounds} rounds), {1 / cost:,.0f} tokens/s on one core",
        flush=True,
    )


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--step-ms", type=float, default=0.0)
    parser.add_argument("--route", choices=sorted(ROUTES), action="append", help="default: all of them")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--engine", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.engine is not None:
        run_engine(arguments.engine, arguments.step_ms / 1000)
    elif arguments.serve is not None:
        from penstock.server.launch import _loop_factory

        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(serve(socket.socket(fileno=arguments.serve), arguments.step_ms))
    else:
        for route in arguments.route or sorted(ROUTES):
            measure(route, arguments.streams, arguments.tokens, arguments.rounds, arguments.step_ms)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
