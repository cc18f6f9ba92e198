"""What the journals say together: which rows are answered, by whom, and when what happened.

It reads each journal on from where it stopped, so that it can be asked again at little cost. The folder's listing is
a hint here too: journals are also found through the claims of the shards that are not done.
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from dataclasses import dataclass, field

import msgspec

from penstock.batch.farm.journal import (
    AnyEvent,
    Begin,
    Claim,
    Done,
    End,
    JournalReader,
    Loaded,
    RowDone,
    first_event,
)
from penstock.batch.farm.spool import Spool

LATENCY_STEPS = 8  # bins of the latency histogram between a value and its double


@dataclass
class Life:
    """One life as its journal tells it. Times are seconds by the file server's clock."""

    begin: Begin
    seen: float  # the last sign
    loaded: Loaded | None = None
    end: End | None = None
    rows: int = 0
    tokens: int = 0
    last_row: float = 0.0
    open: set[int] = field(default_factory=set)  # shards that are claimed and not done
    claims: list[tuple[float, int]] = field(default_factory=list)
    tokens_at: Counter[int] = field(default_factory=Counter)  # by whole second
    rows_at: Counter[int] = field(default_factory=Counter)

    @property
    def until(self) -> float:
        """When it ended, or gave its last sign."""
        return self.end.at if self.end is not None else self.seen

    def state(self, now: float, lease: float) -> str:
        """In a word: loading, working, waiting; silent; or why it ended."""
        if self.end is not None:
            return self.end.reason
        if now - self.seen > lease:
            return "silent"
        if self.loaded is None:
            return "loading"
        return "working" if self.open else "waiting"

    def alive(self, now: float, lease: float) -> bool:
        """Whether it has not ended and gives signs."""
        return self.end is None and now - self.seen <= lease


class Ledger:
    """The journals of a farm. Rows count once, whoever else has answered them too."""

    def __init__(self, spool: Spool) -> None:
        self.spool = spool
        self.lives: dict[str, Life] = {}
        self.done_shards: set[int] = set()
        self.rows = self.tokens = self.prompt_tokens = self.repeated = 0
        self.failed: dict[tuple[int, int], str] = {}  # (shard, row): its error
        self.aside: set[tuple[int, int]] = set()
        self.latency: Counter[int] = Counter()  # bin: rows; see `latency_bin`
        self._answered = [bytearray(shard.rows) for shard in spool.shards]
        self._readers: dict[str, JournalReader] = {}
        self._looked, self._took = -math.inf, 0.0
        self._claims = [0] * len(spool.shards)  # claims of each shard that were seen

    def update(self) -> None:
        """Read what is new."""
        names = self.spool.names()
        done = {name[:-5] for name in names if name.endswith(".done")}
        for name in names:
            if name.endswith(".jsonl"):
                self._know(name[:-6])
        for shard in range(len(self.spool.shards)):
            if shard in self.done_shards:
                continue
            if f"{shard:06}" in done or self.spool.done(shard).exists():
                self.done_shards.add(shard)
            else:
                self._follow_claims(shard)
        for life, reader in self._readers.items():
            for _, _, event in reader.read():
                self._take(life, event)
            if life in self.lives:
                self.lives[life].seen = max(self.lives[life].seen, _modified(reader))

    def glance(self) -> None:
        """Update, unless that was less than a second ago, or took more than a twentieth of the time since."""
        since = time.monotonic()
        if since - self._looked >= max(1.0, 20 * self._took):
            self.update()
            self._looked = time.monotonic()
            self._took = self._looked - since

    def _know(self, life: str) -> None:
        if life not in self._readers:
            self._readers[life] = JournalReader(self.spool.journal(life))

    def _follow_claims(self, shard: int) -> None:
        while True:
            try:
                fd = os.open(self.spool.claim(shard, self._claims[shard]), os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                return
            try:
                begin = first_event(fd)
            finally:
                os.close(fd)
            if begin is not None:
                self._know(begin.life)
            self._claims[shard] += 1

    def _take(self, name: str, event: AnyEvent) -> None:
        if isinstance(event, Begin):
            self.lives[name] = Life(event, event.at)
            return
        life = self.lives.get(name)
        if life is None:  # a journal without its first line, which no life can have written
            return
        life.seen = max(life.seen, event.at)
        if isinstance(event, RowDone):
            self._take_row(life, event)
        elif isinstance(event, Claim):
            life.open.add(event.shard)
            life.claims.append((event.at, event.shard))
        elif isinstance(event, Done):
            life.open.discard(event.shard)
        elif isinstance(event, Loaded):
            life.loaded = event
        elif isinstance(event, End):
            life.end = event

    def _take_row(self, life: Life, event: RowDone) -> None:
        life.rows += 1
        life.tokens += event.tokens
        life.last_row = event.at
        life.rows_at[int(event.at)] += 1
        life.tokens_at[int(event.at)] += event.tokens
        answered = self._answered[event.shard]
        if answered[event.row]:
            self.repeated += 1
            return
        answered[event.row] = 1
        self.rows += 1
        self.tokens += event.tokens
        self.prompt_tokens += event.prompt_tokens
        if event.failed:
            self.failed[event.shard, event.row] = error_of(event)
        if event.aside:
            self.aside.add((event.shard, event.row))
        if event.seconds > 0:
            self.latency[latency_bin(event.seconds)] += 1


def latency_bin(seconds: float) -> int:
    """The bin of the latency histogram: bin b begins at 2**(b / LATENCY_STEPS) seconds."""
    return math.floor(math.log2(seconds) * LATENCY_STEPS)


def error_of(event: RowDone) -> str:
    """The error in a row's result."""
    return msgspec.json.decode(event.result, type=_Error).error or ""


class _Error(msgspec.Struct):
    error: str | None = None


def _modified(reader: JournalReader) -> float:
    try:
        return os.stat(reader.path).st_mtime
    except OSError:
        return 0.0
