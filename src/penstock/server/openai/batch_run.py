"""A batch from its first line to its output files, beside requests that people wait for, through restarts.

Answers are appended to `work/ID/output.jsonl` and `error.jsonl` as they come, whole lines, so a server that was killed
goes on behind them. The outputs become files when the batch is over.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress

from penstock.batch.lines import LineFile
from penstock.batch.openai import (
    AnswerLine,
    BatchLine,
    Fault,
    LineError,
    LineFileReader,
    answer_line,
    custom_key,
    done_of_answer,
    encoded,
)
from penstock.batch.sources import open_source
from penstock.errors import PenstockError
from penstock.server.openai.batch_wire import Batch, BatchError, BatchErrors, RequestCounts, Status
from penstock.server.openai.lines import LineAnswerer
from penstock.server.openai.store import Shelf

log = logging.getLogger("penstock.server")

MAX_ERRORS = 50  # that a failed batch tells of
_GOOD, _BAD = "output.jsonl", "error.jsonl"
_LOOK = 0.2  # seconds between two looks at whether somebody else waits
_STRIDE = 256  # lines that are checked before others get their turn
_EXPIRED = LineError("batch_expired", "This request could not be executed before the completion window expired.")


class Gate:
    """Places in the engine for requests of batches. limit: how many there are now; it changes with the traffic."""

    def __init__(self, limit: Callable[[], int]) -> None:
        self._limit, self._inside = limit, 0
        self._left = asyncio.Event()

    async def __aenter__(self) -> None:
        while self._inside >= self._limit():
            self._left.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK):
                    await self._left.wait()
        self._inside += 1

    async def __aexit__(self, *_: object) -> None:
        self._inside -= 1
        self._left.set()


class BatchRun:
    """One batch. `run` ends when the batch is over; cancelled (the server stops), a later run goes on."""

    def __init__(
        self, shelf: Shelf, batch: Batch, answerer: LineAnswerer, gate: Gate, disk: ThreadPoolExecutor
    ) -> None:
        self.batch = batch
        self._shelf, self._answerer, self._gate, self._disk = shelf, answerer, gate, disk
        self._salt = b"batch" + shelf.folder.name.encode()
        self._cancelled = asyncio.Event()
        self._puts: set[asyncio.Future[None]] = set()  # answers on their way to the disk
        self._broken: OSError | None = None

    def cancel(self) -> None:
        """Start nothing new; what is done stays."""
        self._cancelled.set()

    async def run(self) -> None:
        """Everything from where the batch stands. Never raises but CancelledError."""
        batch = self.batch
        try:
            if batch.status == "validating" and not await self._validate():
                return
            if batch.status == "cancelling":
                self._cancelled.set()
            await self._work()
        except (OSError, PenstockError) as error:
            log.error("batch %s failed: %s", batch.id, error)
            with suppress(OSError):
                await self._fail([BatchError("storage", "The server could not read or write the batch's files")])
        except Exception:
            log.exception("batch %s failed", batch.id)
            with suppress(OSError):
                await self._fail([BatchError("internal", "The server could not run the batch")])

    async def _validate(self) -> bool:
        """Read every line once. A batch with a bad line fails as a whole, before anything runs."""
        faults: list[BatchError] = []
        names: set[int] = set()
        total = 0
        with closing(self._lines()) as lines:
            for number, line in lines.judged():
                total += 1
                fault = self._fault(number, line, names)
                if fault is not None:
                    faults.append(BatchError(fault.code, fault.message, fault.line))
                    if len(faults) == MAX_ERRORS:
                        break
                if total % _STRIDE == 0:
                    await asyncio.sleep(0)
        if not total:
            faults.append(BatchError("empty_file", "The input file holds no requests."))
        if faults:
            await self._fail(faults)
            return False
        self.batch.request_counts.total = total
        if self._cancelled.is_set():  # asked for while the lines were read
            self.batch.status = "cancelling"
        else:
            await self._enter("in_progress")
        return True

    def _fault(self, number: int, line: BatchLine | Fault, names: set[int]) -> Fault | None:
        """What is wrong with a line, if anything. names: of the lines before it."""
        if isinstance(line, Fault):
            return line
        if line.url != self.batch.endpoint:
            return Fault(number, "mismatched_url", f"its url is {line.url}, but the batch is for {self.batch.endpoint}")
        key = custom_key(line.custom_id)
        if key in names:
            return Fault(number, "duplicate_custom_id", f"the custom_id {line.custom_id!r:.80} was there before")
        names.add(key)
        return None

    async def _work(self) -> None:
        """Answer the lines that have no answer yet, then make files of the outputs."""
        batch = self.batch
        desk = self._shelf.desk(batch)
        if batch.status != "finalizing" and batch.output_file_id is None and batch.error_file_id is None:
            with closing(LineFile(desk / _GOOD)) as good, closing(LineFile(desk / _BAD)) as bad:
                await self._answer_all(good, bad, self._done(good, bad))
            for name, field in ((_GOOD, "output_file_id"), (_BAD, "error_file_id")):
                if (desk / name).stat().st_size:
                    setattr(batch, field, self._shelf.new_file(name, "batch_output").id)
            # From here on a crash is followed by nothing but what follows here.
            await self._enter("cancelling" if self._cancelled.is_set() else "finalizing")
        for name, file_id in ((_GOOD, batch.output_file_id), (_BAD, batch.error_file_id)):
            if file_id is not None:
                self._shelf.adopt(desk / name, file_id, f"{batch.id}_{name}", batch.output_expires_after)
        over: Status = "cancelled" if batch.cancelling_at else "expired" if batch.expired_at else "completed"
        await self._enter("failed" if batch.errors else over)
        self._shelf.clear(batch)
        counts = batch.request_counts
        log.info("batch %s %s: %d of %d answered", batch.id, batch.status, counts.completed, counts.total)

    def _done(self, good: LineFile, bad: LineFile) -> set[str]:
        """The identities of the lines that have their answers; counts them anew."""
        done = set[str]()
        counts = RequestCounts(self.batch.request_counts.total)
        for file in (good, bad):
            for identity, failed in _trimmed(file):
                done.add(identity)
                counts.failed += failed
                counts.completed += not failed
        self.batch.request_counts = counts
        return done

    async def _answer_all(self, good: LineFile, bad: LineFile, done: set[str]) -> None:
        tasks: set[asyncio.Task[None]] = set()
        try:
            with closing(self._lines()) as lines:
                for _, line in lines.numbered():
                    if line.identity() in done:
                        continue
                    if self._late():
                        self.batch.expired_at = self.batch.expired_at or int(time.time())
                        await self._put(bad, answer_line(line, None, _EXPIRED))
                        continue
                    await self._gate.__aenter__()
                    if self._cancelled.is_set() or self._broken is not None:
                        await self._gate.__aexit__()
                        break
                    task = asyncio.create_task(self._one(line, good, bad))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
            while tasks and not self._cancelled.is_set():
                await asyncio.wait(tasks, timeout=_LOOK)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.gather(*self._puts)  # nothing may be written to a file that is closed
        if self._broken is not None:
            text = f"The outputs are cut short: {self._broken.strerror}"
            self.batch.errors = BatchErrors([BatchError("storage", text)])

    async def _one(self, line: BatchLine, good: LineFile, bad: LineFile) -> None:
        """Answer one line; the caller has taken its place in the engine."""
        try:
            answer = await self._answerer.answer(line, self._salt)
            put = asyncio.ensure_future(self._put(bad if answer.failed else good, answer))
            self._puts.add(put)
            put.add_done_callback(self._puts.discard)
            await asyncio.shield(put)
        finally:
            await self._gate.__aexit__()

    async def _put(self, file: LineFile, answer: AnswerLine) -> None:
        """Append an answer, on the thread that may wait for the disk."""
        raw = encoded(answer)
        try:
            if self._shelf.used + len(raw) > self._shelf.quota:
                raise OSError(0, "this key's storage is full (--batch-quota); delete some files")
            await asyncio.get_running_loop().run_in_executor(self._disk, file.append, [raw])
        except OSError as error:
            self._broken = self._broken or error
            return
        self._shelf.used += len(raw)
        self.batch.request_counts.failed += answer.failed
        self.batch.request_counts.completed += not answer.failed

    def _lines(self) -> LineFileReader:
        return LineFileReader(open_source(self._shelf.path(self.batch.input_file_id), "openai"))

    def _late(self) -> bool:
        return self.batch.expires_at is not None and time.time() >= self.batch.expires_at

    async def _enter(self, status: Status) -> None:
        """Begin a part of the batch's life, durably."""
        self.batch.status = status
        setattr(self.batch, f"{status}_at", int(time.time()))
        await asyncio.get_running_loop().run_in_executor(self._disk, self._shelf.save, self.batch)

    async def _fail(self, errors: list[BatchError]) -> None:
        self.batch.errors = BatchErrors(errors)
        await self._enter("failed")


def _trimmed(file: LineFile) -> Iterator[tuple[str, bool]]:
    """(identity, failed) of the answers that are there already; a torn last line is cut off."""
    end = 0
    for start, raw in file.lines():
        done = done_of_answer(raw) if raw.endswith(b"\n") else None
        if done is None:
            break
        end = start + len(raw)
        yield done.hash, done.failed
    file.trim(end)
