"""The engine in its own process: requests over the socket pair, crashes, and an end with no orphans."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import time
from pathlib import Path

import pytest

from penstock.engine.client import EngineClient, EngineUnavailable
from penstock.engine.config import EngineConfig
from penstock.engine.output import SequenceOutput
from penstock.engine.request import EngineRequest, Sampling
from penstock.errors import ModelError


def ask(client: EngineClient, new: int = 16, **options: object) -> EngineRequest:
    return EngineRequest(client.next_id(), [3, 4, 5], new, ignore_eos=True, **options)  # type: ignore[arg-type]


async def collect(client: EngineClient, request: EngineRequest) -> list[SequenceOutput]:
    return [output async for output in client.submit(request)]


async def until_idle(client: EngineClient) -> None:
    """Wait for the engine to say that nothing runs and every block is back."""
    async with asyncio.timeout(10):
        while client.stats.running or client.stats.waiting or client.stats.used_blocks:
            await asyncio.sleep(0.01)


def test_requests_aborts_and_refusals(tiny_llama: Path) -> None:
    async def scenario() -> None:
        stages: list[str] = []
        client = EngineClient(EngineConfig(str(tiny_llama), threads=1), lambda stage: stages.append(stage.name))
        limits = await client.start()
        try:
            assert stages == ["engine", "model", "KV memory", "load", "warm"]
            assert limits.vocab_size == 512
            assert client.healthy

            first, second = await asyncio.gather(*(collect(client, ask(client)) for _ in range(2)))
            ids = [t.id for output in first for t in output.tokens]
            assert len(ids) == 16
            assert ids == [t.id for output in second for t in output.tokens]
            assert first[-1].finish == "length"

            refused = await collect(client, ask(client, sampling=Sampling(temperature=float("nan"))))
            assert refused[-1].finish == "error"
            assert refused[-1].invalid
            assert "temperature" in (refused[-1].error or "")

            endless = ask(client, new=400)
            results = client.submit(endless)
            await anext(results)
            client.abort(endless.id)
            client.abort(endless.id)
            await until_idle(client)
            assert client.stats.free_blocks + client.stats.cached_blocks == client.stats.total_blocks
        finally:
            await client.stop()
        assert client.pid is not None
        with pytest.raises(ProcessLookupError):
            os.kill(client.pid, 0)

    asyncio.run(scenario())


def test_a_killed_engine_fails_its_requests_and_comes_back(tiny_llama: Path) -> None:
    async def scenario() -> None:
        client = EngineClient(EngineConfig(str(tiny_llama), threads=1), lambda stage: None)
        await client.start()
        try:
            running = [client.submit(ask(client, new=480)) for _ in range(8)]
            for results in running:
                await anext(results)
            old = client.pid
            assert old is not None
            killed = time.monotonic()
            os.kill(old, signal.SIGKILL)
            for results in running:
                last = [output async for output in results][-1]
                assert last.finish == "error"
                assert not last.invalid
            assert time.monotonic() - killed < 2
            assert not client.healthy
            with pytest.raises(EngineUnavailable):
                client.submit(ask(client))
            async with asyncio.timeout(30):
                while not client.healthy:
                    await asyncio.sleep(0.05)
            assert client.restarts == 1
            assert client.pid != old
            assert (await collect(client, ask(client)))[-1].finish == "length"
        finally:
            await client.stop()

    asyncio.run(scenario())


def test_what_is_not_a_request_harms_nobody(tiny_llama: Path) -> None:
    async def scenario() -> None:
        client = EngineClient(EngineConfig(str(tiny_llama), threads=1), lambda stage: None)
        await client.start()
        bystander = client.submit(ask(client, new=300))
        await anext(bystander)
        wrong = ask(client, sampling=Sampling(temperature=None))  # type: ignore[arg-type]
        refused = await collect(client, wrong)
        assert refused[-1].invalid
        with pytest.raises(OverflowError):
            client.submit(EngineRequest(client.next_id(), [3], 2**70))
        assert [output async for output in bystander][-1].finish == "length"
        waiting = client.submit(ask(client, new=400))
        await anext(waiting)
        await client.stop()
        async with asyncio.timeout(2):
            assert [output async for output in waiting][-1].finish == "error"

    asyncio.run(scenario())


def test_many_open_files_do_not_stop_a_start(tiny_llama: Path) -> None:
    """Descriptors above 1023, as a server with a thousand clients has them."""

    async def scenario() -> None:
        client = EngineClient(EngineConfig(str(tiny_llama), threads=1), lambda stage: None)
        await client.start()
        assert (await collect(client, ask(client)))[-1].finish == "length"
        await client.stop()

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    held = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]
    try:
        asyncio.run(scenario())
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_model_that_cannot_load_says_why(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nothing-we-know", "architectures": ["Unheard"]}')

    async def scenario() -> None:
        client = EngineClient(EngineConfig(str(tmp_path), threads=1), lambda stage: None)
        with pytest.raises(ModelError, match="Unheard"):
            await client.start()

    asyncio.run(scenario())


def test_the_engine_dies_with_its_parent(tiny_llama: Path) -> None:
    """kill -9 of the parent leaves no engine behind."""
    parent = os.fork()
    if parent == 0:
        try:

            async def hold() -> None:
                client = EngineClient(EngineConfig(str(tiny_llama), threads=1), lambda stage: None)
                await client.start()
                (tiny_llama / "child.pid").write_text(str(client.pid))
                await asyncio.sleep(60)

            asyncio.run(hold())
        finally:
            os._exit(0)
    note = tiny_llama / "child.pid"
    deadline = time.monotonic() + 60
    while not note.exists() or not note.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child = int(note.read_text())
    note.unlink()
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    deadline = time.monotonic() + 5
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split(") ")[1][:1]:
        assert time.monotonic() < deadline, "the engine outlived its parent"
        time.sleep(0.05)
