"""What the load generator of `penstock bench load` costs itself: CPU time for each event, with many streams at once.

    python benchmarks/load_generator.py --streams 64 --rate 20000

A second process plays the server: it sends prepared events in TGI's or OpenAI's shape, one to each stream in turn, at
the given rate in all. Printed are the events that arrived a second and the generator's share of one core.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys

import uvloop

from penstock.bench.http import Address
from penstock.bench.load import Level, Plan, Slo, Stage, Target
from penstock.bench.wire import APIS

TOKEN = {
    "index": 1,
    "token": {"id": 481, "text": " at", "logprob": -0.86671543, "special": False},
    "generated_text": None,
}
CHUNK = {
    "id": "cmpl-1",
    "object": "text_completion",
    "created": 1,
    "model": "demo",
    "choices": [{"index": 0, "text": " at", "finish_reason": None, "logprobs": None}],
}


async def play(api: str, rate: float, tokens: int) -> None:
    """Serve events until the parent ends us."""
    streams: dict[asyncio.StreamWriter, int] = {}

    def event(n: int) -> bytes:
        usage = {"usage": {"prompt_tokens": 8, "completion_tokens": n, "total_tokens": n + 8}}
        data = b"data: " + json.dumps(TOKEN if api == "tgi" else {**CHUNK, **usage}).encode() + b"\n\n"
        return b"%x\r\n%b\r\n" % (len(data), data)

    events = [event(n) for n in range(1, tokens + 1)]

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError:
                return
            length = next(
                int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"content-length")
            )
            await reader.readexactly(length)
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
            streams[writer] = 0

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    loop = asyncio.get_running_loop()
    due = loop.time()
    while True:
        for writer, n in list(streams.items()):
            if n == tokens:
                del streams[writer]
                writer.write(b"0\r\n\r\n")
            else:
                streams[writer] = n + 1
                writer.write(events[n])
        due = max(due + max(1, len(streams)) / rate, loop.time() - 0.05)
        await asyncio.sleep(max(0.0, due - loop.time()))


async def load(port: int, api: str, streams: int, tokens: int, seconds: float) -> None:
    target = Target(Address("127.0.0.1", port), APIS[api], "demo")
    stage = Stage(target, Level(concurrency=streams), Plan(tokens, seconds=seconds), iter(lambda: "Hello", None))
    await stage.run(lambda record: None)
    result = stage.result(Slo())
    assert result.outcomes == {"ok": len(stage.records)}, result.errors
    assert result.output_tokens == tokens * len(stage.records)
    rate = result.output_tokens_per_second
    print(
        f"{api}: {streams} streams, {rate:,.0f} events/s, generator {result.generator_cpu:.0%} of a core, "
        f"{1e6 * result.generator_cpu / rate:.1f} us an event; "
        f"inter-token p50 {result.itl.p50:.2f} ms, p99 {result.itl.p99:.2f} ms"
    )
    target.pool.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--rate", type=float, default=20000, help="events a second, all streams together")
    parser.add_argument("--tokens", type=int, default=500, help="events of an answer")
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--api", choices=("tgi", "completions"), default="tgi")
    parser.add_argument("--play", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.play:
        uvloop.run(play(args.api, args.rate, args.tokens))
        return
    command = [
        sys.executable,
        __file__,
        "--play",
        "--api",
        args.api,
        "--rate",
        str(args.rate),
        "--tokens",
        str(args.tokens),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        try:
            uvloop.run(load(port, args.api, args.streams, args.tokens, args.seconds))
        finally:
            server.kill()


if __name__ == "__main__":
    main()
