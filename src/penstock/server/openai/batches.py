"""/v1/batches, and what /v1/files and they share: the shelves of the keys, the batches that run."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import re
import secrets
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from penstock.batch.openai import ENDPOINTS
from penstock.server.body import parse
from penstock.server.exchange import Exchange
from penstock.server.house import House
from penstock.server.openai.batch_run import BatchRun, Gate
from penstock.server.openai.batch_wire import OVER, Batch, BatchList, BatchRequest
from penstock.server.openai.files import MAX_SECONDS, MIN_SECONDS, Files
from penstock.server.openai.lines import LineAnswerer
from penstock.server.openai.pages import page
from penstock.server.openai.store import MAX_OBJECTS, Shelf, owner_of, unstorable
from penstock.server.refusal import Refusal, draining

log = logging.getLogger("penstock.server")

PREFIXES = ("/v1/files", "/v1/batches")
PRIORITY = 1000  # of batches, in the engine's queue: after everything that somebody waits for
MAX_METADATA = (16, 64, 512)  # pairs, characters of a key and of a value, as OpenAI has them
MAX_RUNNING = 64  # batches of one key that are not over
_WINDOW = re.compile(r"([1-9]\d{0,2})([hd])")
_UNPLAIN = re.compile(r"[^A-Za-z0-9._-]+")


class Batches:
    """The routes under /v1/files and /v1/batches."""

    def __init__(self, house: House) -> None:
        self._house = house
        self._shelves: dict[str, Shelf] = {}
        self._runs: dict[str, BatchRun] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="batch-disk")
        # Each request may need several places (`n`), and none of them is taken from those that are waited for.
        self._answerer = LineAnswerer(house.aside(PRIORITY, permits=2**31))
        self._gate = Gate(self._places)
        self.files = Files(house, self.shelf, self._busy)

    def resume(self, salts: Iterable[bytes]) -> None:
        """Go on with the batches of these keys that an earlier server left unfinished."""
        folder = self._folder
        for salt in salts:
            if folder is None or not (folder / owner_of(salt)).is_dir():
                continue
            try:
                shelf = self._of(salt)
                unfinished = [batch for batch in shelf.all_batches() if batch.status not in OVER]
            except (Refusal, OSError) as error:
                log.warning("batches of an earlier server are left as they are: %s", error)
                continue
            for batch in sorted(unfinished, key=lambda b: b.created_at):
                self._start(shelf, batch)

    async def stop(self) -> None:
        """End what runs; the next server goes on with it."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._disk.shutdown()
        for shelf in self._shelves.values():
            shelf.close()

    async def answer(self, exchange: Exchange) -> None:
        """Any request under the prefixes."""
        if self._folder is None:
            raise Refusal(404, "Files and batches are off on this server (--batch-dir)", "not_found")
        kind, _, rest = exchange.path.removeprefix("/v1/").partition("/")
        name, _, verb = rest.partition("/")
        method = "GET" if exchange.method == "HEAD" else exchange.method
        with self._house.presence.enter():
            if method != "GET" and self._house.draining:
                raise draining()
            if kind == "files":
                await self._files(exchange, method, name, verb)
            elif kind == "batches":
                await self._batches(exchange, method, name, verb)
            else:
                raise Refusal(404, "There is no such route", "not_found")

    async def _files(self, exchange: Exchange, method: str, name: str, verb: str) -> None:
        files = self.files
        if not name and method == "POST":
            await files.upload(exchange)
        elif not name and method == "GET":
            await files.list(exchange)
        elif name and not verb and method == "GET":
            await files.one(exchange, name)
        elif name and not verb and method == "DELETE":
            await files.delete(exchange, name)
        elif name and verb == "content" and method == "GET":
            await files.content(exchange, name)
        else:
            await self._refuse(exchange, "GET, POST" if not name else "GET" if verb else "GET, DELETE", verb, "content")

    async def _batches(self, exchange: Exchange, method: str, name: str, verb: str) -> None:
        if not name and method == "POST":
            await self._create(exchange)
        elif not name and method == "GET":
            await self._list(exchange)
        elif name and not verb and method == "GET":
            await exchange.answer_json(self._batch(self.shelf(exchange), name))
        elif name and verb == "cancel" and method == "POST":
            await self._cancel(exchange, name)
        else:
            await self._refuse(exchange, "GET, POST" if not name else "POST" if verb else "GET", verb, "cancel")

    @staticmethod
    async def _refuse(exchange: Exchange, allow: str, verb: str, known: str) -> None:
        """405 with the methods that there are, or 404."""
        if verb and verb != known:
            raise Refusal(404, "There is no such route", "not_found")
        await exchange.answer(405, b"", headers=[(b"allow", allow.encode())])

    async def _create(self, exchange: Exchange) -> None:
        shelf = self.shelf(exchange)
        config = self._house.config
        body = parse(await exchange.body(config.payload_limit, config.body_seconds), BatchRequest)
        hours = _check(body)
        if shelf.file(body.input_file_id).purpose != "batch":
            raise Refusal(400, f"{body.input_file_id} was not uploaded for the purpose `batch`", "invalid_value")
        batches = shelf.all_batches()
        if sum(batch.status not in OVER for batch in batches) >= MAX_RUNNING or len(batches) >= MAX_OBJECTS:
            raise Refusal(
                429, f"{MAX_RUNNING} batches of this key are not over yet", "too_many_batches", retry_after=60
            )
        now = int(time.time())
        batch = Batch(
            id=f"batch_{secrets.token_hex(12)}",
            endpoint=body.endpoint,
            model=config.name,
            input_file_id=body.input_file_id,
            completion_window=body.completion_window,
            created_at=now,
            expires_at=now + hours * 3600,
            metadata=body.metadata,
            output_expires_after=body.output_expires_after,
        )
        try:
            await asyncio.get_running_loop().run_in_executor(self._disk, shelf.save, batch)
        except OSError as error:
            raise unstorable(error.strerror or "the disk refuses") from None
        await exchange.answer_json(batch)
        self._start(shelf, batch)

    async def _list(self, exchange: Exchange) -> None:
        shelf = self.shelf(exchange)
        query = {"limit": "20", **exchange.query}
        shown, more = page([self._live(batch) for batch in shelf.all_batches()], query, 100)
        first, last = (shown[0].id, shown[-1].id) if shown else (None, None)
        await exchange.answer_json(BatchList(data=shown, first_id=first, last_id=last, has_more=more))

    async def _cancel(self, exchange: Exchange, batch_id: str) -> None:
        shelf = self.shelf(exchange)
        batch = self._batch(shelf, batch_id)
        run = self._runs.get(batch.id)
        if batch.status in OVER or run is None:
            raise Refusal(409, f"{batch.id} is over: {batch.status}", "batch_over", param="id")
        batch.cancelling_at = batch.cancelling_at or int(time.time())
        if batch.status != "validating":
            batch.status = "cancelling"
        try:
            await asyncio.get_running_loop().run_in_executor(self._disk, shelf.save, batch)
        except OSError as error:
            raise unstorable(error.strerror or "the disk refuses") from None
        run.cancel()
        await exchange.answer_json(batch)

    def shelf(self, exchange: Exchange) -> Shelf:
        """The shelf of a request's key. Raises Refusal 503."""
        return self._of(exchange.salt)

    def _of(self, salt: bytes) -> Shelf:
        owner = owner_of(salt)
        if owner not in self._shelves:
            if self._folder is None:
                raise ValueError("files and batches are off")
            self._shelves[owner] = Shelf(self._folder / owner, self._house.config.batch_quota)
        return self._shelves[owner]

    @property
    def _folder(self) -> Path | None:
        """Where this model's files lie; None where they are off."""
        given = self._house.config.batch_dir
        return None if given is None else Path(given) / (_UNPLAIN.sub("_", self._house.config.name)[-100:] or "model")

    def _places(self) -> int:
        """How many requests of batches may run: half of the engine's rows, an eighth while somebody waits."""
        rows = self._house.limits.max_batch_size
        return max(1, rows // (8 if self._house.presence.count else 2))

    def _start(self, shelf: Shelf, batch: Batch) -> None:
        run = BatchRun(shelf, batch, self._answerer, self._gate, self._disk)
        if batch.cancelling_at is not None:
            run.cancel()
        self._runs[batch.id] = run
        # In a context of its own: it must not count as part of the request that made it.
        task = asyncio.create_task(run.run(), context=contextvars.Context())
        self._tasks.add(task)

        def forget(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            self._runs.pop(batch.id, None)

        task.add_done_callback(forget)

    def _batch(self, shelf: Shelf, batch_id: str) -> Batch:
        return self._live(shelf.batch(batch_id))

    def _live(self, batch: Batch) -> Batch:
        """The batch as it runs, whose counts are newer than those on disk."""
        run = self._runs.get(batch.id)
        return batch if run is None else run.batch

    def _busy(self, shelf: Shelf, file_id: str) -> bool:
        return any(run.batch.input_file_id == file_id for run in self._runs.values())


def _check(body: BatchRequest) -> int:
    """The hours of a request's completion window. Raises Refusal 400."""
    if body.endpoint not in ENDPOINTS:
        raise Refusal(400, f"`endpoint` must be one of {', '.join(ENDPOINTS)}", "invalid_value", param="endpoint")
    window = _WINDOW.fullmatch(body.completion_window)
    if window is None:
        raise Refusal(400, "`completion_window` is like 24h or 7d", "invalid_value", param="completion_window")
    pairs, key, value = MAX_METADATA
    metadata = body.metadata or {}
    if len(metadata) > pairs or any(len(k) > key or len(v) > value for k, v in metadata.items()):
        text = f"`metadata` has at most {pairs} pairs, keys of {key} and values of {value} characters"
        raise Refusal(400, text, "invalid_value", param="metadata")
    expiry = body.output_expires_after
    if expiry is not None and not MIN_SECONDS <= expiry.seconds <= MAX_SECONDS:
        text = f"`output_expires_after` needs {MIN_SECONDS} to {MAX_SECONDS} seconds"
        raise Refusal(400, text, "invalid_value", param="output_expires_after")
    return int(window[1]) * (24 if window[2] == "d" else 1)
