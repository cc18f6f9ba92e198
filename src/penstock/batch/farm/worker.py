"""The loop of one life: claims shards, keeps the engine full with their rows, commits what comes out."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import msgspec

from penstock.batch.farm.claims import Claimed, Claims
from penstock.batch.farm.journal import DISK_IS_FULL, AnyEvent, Done, JournalWriter, RowDone, Start
from penstock.batch.farm.leaving import Leaving
from penstock.batch.farm.manifest import Shard, Timing
from penstock.batch.farm.spool import Spool
from penstock.batch.local import Progress
from penstock.batch.results import Result
from penstock.batch.rows import Row

Generate = Callable[[Iterable[Row]], Iterator[Progress]]  # rows in; after each step of the engine, what it brought
_CHUNK = 16  # rows that are noted as started by one line
_SLACK = 1.2  # a shard may take so much longer than the slowest of late
_ENCODER = msgspec.json.Encoder()


@dataclass
class _Open:
    """A shard that is ours and not complete. missing: its rows without a result."""

    shard: Shard
    since: float
    missing: set[int]


@dataclass(frozen=True)
class _Running:
    """A row that is in the engine, or about to be."""

    shard: int
    row: int
    since: float


class Worker:
    """What one life does between having its engine and leaving. `rows`: how many it has answered."""

    def __init__(
        self,
        spool: Spool,
        claims: Claims,
        journal: JournalWriter,
        generate: Generate,
        leaving: Leaving,
        step: Callable[[], None] = lambda: None,
    ) -> None:
        """step: called whenever something has gone on."""
        self._spool, self._claims, self._journal, self._generate = spool, claims, journal, generate
        self._leaving, self._step = leaving, step
        self._timing: Timing = spool.manifest.timing
        self._open: dict[int, _Open] = {}
        self._queue: deque[tuple[int, int, Row]] = deque()  # rows of open shards that wait: (shard, number in it, row)
        self._suspects: deque[tuple[int, int, Row]] = deque()  # those that must run alone
        self._running: dict[str, _Running] = {}  # by the row's id
        self._whole: list[Shard] = []  # shards whose rows are all written, but perhaps not on disk
        self._slowest = 0.0  # seconds that a shard took
        self._committed = time.monotonic()
        self._no_time = False
        self.rows = 0

    def run(self) -> str:
        """Work until there is nothing left to do here; returns why, in the words of the journal's `End`.

        Raises OSError when results cannot be written, and whatever the engine raises.
        """
        idle_since = time.monotonic()
        while not self._leaving:
            before = self.rows
            self._drain(self._feed())
            while self._suspects and not self._leaving:
                self._drain(iter([self._start([self._suspects.popleft()], alone=True)[0]]))
            self._commit()
            if self._no_time:
                return "time"
            if self._claims.complete():
                return "finished"
            if self.rows > before:
                idle_since = time.monotonic()
            elif time.monotonic() - idle_since > self._timing.idle:
                return "idle"
            else:
                self._nap()
        self._commit()
        return self._leaving.reason

    def _feed(self) -> Iterator[Row]:
        """Rows for the engine as it gets room: of the open shards, then of the next shard that can be had."""
        while not self._leaving and not self._suspects:
            if not self._queue and not self._take_next():
                return
            chunk = [self._queue.popleft() for _ in range(min(_CHUNK, len(self._queue)))]
            yield from self._start(chunk)

    def _take_next(self) -> bool:
        """Claim a shard and queue its rows, if there is one and it can be done in time."""
        self._no_time = not self._leaving.fits(self._slowest * _SLACK)
        if self._no_time:
            return False
        try:
            claimed = self._claims.next()
        except OSError as error:
            if error.errno not in DISK_IS_FULL:
                raise
            return False  # not even a name fits; perhaps later
        if claimed is not None:
            self._take(claimed)
        return claimed is not None

    def _take(self, claimed: Claimed) -> None:
        shard, past = claimed.shard, claimed.past
        rows = self._spool.read(shard)
        missing = set(range(shard.rows)) - past.done
        self._open[shard.number] = _Open(shard, time.monotonic(), missing)
        for number in sorted(missing):
            place = (shard.number, number, rows[number])
            if number not in past.aside:
                (self._suspects if number in past.suspects else self._queue).append(place)
        self._append([self._set_aside(shard, rows[n], n, past.aside[n]) for n in sorted(missing & past.aside.keys())])
        missing.difference_update(past.aside)
        self._close_if_whole(shard.number)

    def _start(self, places: list[tuple[int, int, Row]], alone: bool = False) -> list[Row]:
        """Note that rows go into the engine, so that they are known should the process die of them."""
        since, now = time.monotonic(), self._journal.now()
        by_shard: dict[int, list[int]] = {}
        for shard, number, row in places:
            by_shard.setdefault(shard, []).append(number)
            self._running[str(row.name)] = _Running(shard, number, since)
        self._append([Start(at=now, shard=shard, rows=rows, alone=alone) for shard, rows in by_shard.items()])
        return [row for _, _, row in places]

    def _drain(self, rows: Iterator[Row]) -> None:
        """Run the engine on rows until it is empty, or the grace of leaving is over."""
        for progress in self._generate(rows):
            self._step()
            self._write(progress.results)
            if time.monotonic() - self._committed >= self._timing.commit:
                self._commit()
            if self._leaving.at_once():
                return

    def _write(self, results: list[Result]) -> None:
        """Append results to the journal; a shard that gets its last one is whole."""
        events: list[AnyEvent] = []
        places = []
        now, moment = self._journal.now(), time.monotonic()
        for result in results:
            place = self._running.pop(str(result.id))
            places.append(place)
            events.append(
                RowDone(
                    at=now,
                    shard=place.shard,
                    row=place.row,
                    seconds=round(moment - place.since, 4),
                    tokens=result.generated_tokens,
                    prompt_tokens=result.prompt_tokens,
                    failed=result.error is not None,
                    result=msgspec.Raw(_ENCODER.encode(result)),
                )
            )
        self._append(events)
        for place in places:
            self._open[place.shard].missing.discard(place.row)
            self._close_if_whole(place.shard)

    def _set_aside(self, shard: Shard, row: Row, number: int, why: str) -> RowDone:
        result = Result(row.name, row.prompt, None, [], "error", 0, 0, why, hash=row.identity())
        return RowDone(
            at=self._journal.now(),
            shard=shard.number,
            row=number,
            seconds=0.0,
            tokens=0,
            prompt_tokens=0,
            failed=True,
            aside=True,
            result=msgspec.Raw(_ENCODER.encode(result)),
        )

    def _append(self, events: list[AnyEvent]) -> None:
        self._journal.append(events, keep_on=lambda: not self._leaving)
        self.rows += sum(isinstance(event, RowDone) for event in events)

    def _close_if_whole(self, shard: int) -> None:
        if not self._open[shard].missing:
            whole = self._open.pop(shard)
            self._slowest = max(self._slowest, time.monotonic() - whole.since)
            self._whole.append(whole.shard)

    def _commit(self) -> None:
        """Force everything to disk; then, and only then, whole shards are done."""
        self._append([Done(at=self._journal.now(), shard=shard.number) for shard in self._whole])
        self._journal.sync()
        for shard in self._whole:
            self._claims.finish(shard)
        self._whole.clear()
        self._committed = time.monotonic()

    def _nap(self) -> None:
        """Nothing can be claimed now: others hold what is left."""
        self._step()
        until = time.monotonic() + min(self._timing.beat, 5.0) / 2
        while time.monotonic() < until and not self._leaving:
            time.sleep(0.05)
