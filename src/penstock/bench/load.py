"""Load on a server: requests in open or closed loop, and what became of each.

A *closed* loop keeps so many requests in the air; an *open* one sends at a given rate whether the server keeps up or
not, and counts latencies from the moment when a request was due, so that a slow server cannot slow its own
measurement down.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from penstock.bench.http import Address, Pool
from penstock.bench.statistics import Summary
from penstock.bench.wire import Api, Tally
from penstock.errors import EnvironmentFault

Outcome = Literal["ok", "refused", "failed", "cancelled"]

MAX_PAUSE = 5.0  # seconds that a refused stream waits at most, whatever the server says
HOPELESS = 10  # failures in a row, and more than there are streams, end a stage


@dataclass(frozen=True)
class Level:
    """One stage of load. Either `concurrency` streams in a closed loop, or `rate` requests a second, at random moments
    (poisson) or evenly."""

    concurrency: int | None = None
    rate: float | None = None
    poisson: bool = True

    def __str__(self) -> str:
        if self.rate is None:
            return f"{self.concurrency} streams"
        return f"{self.rate:g}/s {'poisson' if self.poisson else 'constant'}"


@dataclass(frozen=True)
class Plan:
    """What every stage does. requests and seconds: whichever comes first ends it, and without either some requests a
    stream, or some seconds of an open loop; cancel: the share of requests that leave after a random part of their
    tokens."""

    new_tokens: int
    requests: int | None = None
    seconds: float | None = None
    cancel: float = 0.0
    ignore_eos: bool = True
    timeout: float = 600.0
    seed: int = 0


@dataclass(frozen=True)
class Slo:
    """What an answer must keep to count as good, in milliseconds; None does not matter. itl is the mean of an
    answer."""

    ttft: float | None = None
    itl: float | None = None
    e2e: float | None = None

    @property
    def asked(self) -> bool:
        return (self.ttft, self.itl, self.e2e) != (None, None, None)

    def kept(self, record: Record) -> bool:
        pairs = ((self.ttft, record.ttft), (self.itl, record.mean_gap), (self.e2e, record.e2e))
        return all(limit is None or (value is not None and 1e3 * value <= limit) for limit, value in pairs)


@dataclass
class Record:
    """One request. Moments in seconds of one clock; `due` is when it should have been sent."""

    due: float
    sent: float
    end: float
    outcome: Outcome
    status: int = 0
    error: str = ""
    first: float | None = None
    output_tokens: int = 0
    prompt_tokens: int | None = None
    told: bool = True
    gaps: list[tuple[float, int]] = field(default_factory=list)

    @property
    def ttft(self) -> float | None:
        return None if self.first is None else self.first - self.due

    @property
    def e2e(self) -> float:
        return self.end - self.due

    @property
    def mean_gap(self) -> float | None:
        if self.first is None or self.output_tokens < 2:
            return None
        return (self.end - self.first) / (self.output_tokens - 1)


@dataclass
class StageResult:
    """What one stage came to. Latencies in milliseconds, of the requests that were answered in full."""

    level: str
    concurrency: int | None
    rate: float | None
    seconds: float
    outcomes: dict[str, int]
    errors: dict[str, int]
    requests_per_second: float
    output_tokens: int
    output_tokens_per_second: float
    prompt_tokens: int | None
    prompt_tokens_per_second: float | None
    tokens_told: bool
    ttft: Summary
    itl: Summary
    e2e: Summary
    lateness: Summary  # of sending, after it was due: the generator's own
    good_requests_per_second: float | None
    good_share: float | None
    generator_cpu: float  # share of one core that the generator took
    timeline: list[tuple[int, int]]  # (second, tokens that came in it)
    bytes_per_second: float | None = None  # moved by the engine, where the server tells
    flops_per_second: float | None = None


class Target:
    """A server, its way to be asked, and what is sent."""

    def __init__(self, address: Address, api: Api, model: str) -> None:
        self.address, self.api, self.model = address, api, model
        self.pool = Pool(address)
        self.timeline: Counter[int] = Counter()

    async def ask(self, prompt: str, new_tokens: int, due: float, plan: Plan, leave_after: int | None) -> Record:
        """One request. leave_after: hang up after so many tokens. Never raises for what the server does."""
        request = self.address.request(
            "POST", self.api.path, self.api.request(self.model, prompt, new_tokens, plan.ignore_eos)
        )
        tally, timeline, read = Tally(), self.timeline, self.api.read

        def on_event(data: bytes, now: float) -> bool:
            before = tally.seen
            read(data, now, tally)
            timeline[int(now)] += tally.seen - before
            return leave_after is not None and tally.seen >= leave_after

        sent = time.perf_counter()
        status, body, error = 0, b"", ""
        hung_up = complete = False
        retry = None
        try:
            async with asyncio.timeout(plan.timeout):
                reply = await self.pool.exchange(request, on_event)
            status, body, retry, error = reply.status, reply.body, reply.retry_after, reply.error
            hung_up, complete = reply.hung_up, reply.complete
        except TimeoutError:
            error = f"no answer within {plan.timeout:g} s"
        except OSError as broken:
            error = str(broken) or type(broken).__name__
        outcome: Outcome = "ok"
        if hung_up:
            outcome = "cancelled"
        elif status == 429:
            outcome, error = "refused", "429 too many requests"
        elif error or tally.error or status != 200 or not complete or not tally.seen:
            outcome = "failed"
            error = (
                error or tally.error or (f"status {status}: {message_of(body)}" if status != 200 else "it broke off")
            )
        record = Record(
            due, sent, time.perf_counter(), outcome, status, error[:200], tally.times[0][0] if tally.times else None
        )
        record.output_tokens, record.prompt_tokens, record.told = tally.tokens, tally.prompt_tokens, tally.told
        record.gaps = tally.gaps()
        if outcome == "refused":
            await asyncio.sleep(min(MAX_PAUSE, 1.0 if retry is None else retry))
        return record


def message_of(body: bytes) -> str:
    """The words of an error's body."""
    try:
        answer = msgspec.json.decode(body)
    except msgspec.MsgspecError:
        return body[:200].decode(errors="replace").strip()
    found = answer.get("error", answer.get("message", answer.get("detail"))) if isinstance(answer, dict) else answer
    return str(found.get("message", found) if isinstance(found, dict) else found)[:200]


class Stage:
    """One level of load on a target, while it runs and after."""

    def __init__(self, target: Target, level: Level, plan: Plan, prompts: Iterator[str]) -> None:
        self._target, self._level, self._plan, self._prompts = target, level, plan, prompts
        self._draw = random.Random(plan.seed)  # noqa: S311 (not a secret)
        self._limit = plan.requests
        if plan.requests is None and plan.seconds is None:
            self._limit = max(20, 4 * (level.concurrency or 0), round(10 * (level.rate or 0)))
        self._taken = 0
        self._since = 0.0
        self.records: list[Record] = []
        self._failed_in_a_row = 0
        self.hopeless = False

    async def run(self, on_record: Callable[[Record], None]) -> None:
        """Until the plan is done, or nothing answers any more. Raises EnvironmentFault when the key is refused."""
        self._target.timeline.clear()
        self._since, self._cpu = time.perf_counter(), time.process_time()
        async with asyncio.TaskGroup() as group:
            if self._level.rate is None:
                for _ in range(self._level.concurrency or 1):
                    group.create_task(self._stream(on_record))
            else:
                async for due in self._moments(self._level.rate):
                    group.create_task(self._one(due, on_record))

    def _more(self) -> bool:
        """Whether one more request is to be sent; takes it if so."""
        if self.hopeless or (self._limit is not None and self._taken >= self._limit):
            return False
        if self._plan.seconds is not None and time.perf_counter() - self._since >= self._plan.seconds:
            return False
        self._taken += 1
        return True

    async def _stream(self, on_record: Callable[[Record], None]) -> None:
        while self._more():
            await self._one(time.perf_counter(), on_record)

    async def _moments(self, rate: float) -> AsyncIterator[float]:
        due = self._since
        while self._more():
            pause = due - time.perf_counter()
            if pause > 0:
                await asyncio.sleep(pause)
            yield due
            due += self._draw.expovariate(rate) if self._level.poisson else 1 / rate

    async def _one(self, due: float, on_record: Callable[[Record], None]) -> None:
        leaves = self._draw.random() < self._plan.cancel
        after = self._draw.randint(1, max(1, self._plan.new_tokens - 1)) if leaves else None
        record = await self._target.ask(next(self._prompts), self._plan.new_tokens, due, self._plan, after)
        if record.status in (401, 403):
            raise key_refused(self._target.address, record.status)
        self.records.append(record)
        self._failed_in_a_row = self._failed_in_a_row + 1 if record.outcome == "failed" else 0
        self.hopeless |= self._failed_in_a_row > max(HOPELESS, self._level.concurrency or 0)
        on_record(record)

    def result(self, slo: Slo) -> StageResult:
        """What there is so far."""
        end = max((r.end for r in self.records), default=time.perf_counter())
        seconds = max(end - self._since, 1e-9)
        ok = [r for r in self.records if r.outcome == "ok"]
        output = sum(r.output_tokens for r in self.records)
        known = [r.prompt_tokens for r in ok if r.prompt_tokens is not None]
        good = sum(slo.kept(r) for r in ok) if slo.asked else None
        first = min(self._target.timeline, default=0)
        return StageResult(
            level=str(self._level),
            concurrency=self._level.concurrency,
            rate=self._level.rate,
            seconds=seconds,
            outcomes=dict(Counter(r.outcome for r in self.records)),
            errors=dict(Counter(r.error for r in self.records if r.error).most_common(10)),
            requests_per_second=len(ok) / seconds,
            output_tokens=output,
            output_tokens_per_second=output / seconds,
            prompt_tokens=sum(known) if known else None,
            prompt_tokens_per_second=sum(known) / seconds if known else None,
            tokens_told=all(r.told for r in ok),
            ttft=Summary.of(1e3 * r.ttft for r in ok if r.ttft is not None),
            itl=Summary.of(1e3 * gap for r in ok for gap, n in r.gaps for _ in range(n)),
            e2e=Summary.of(1e3 * r.e2e for r in ok),
            lateness=Summary.of(1e3 * (r.sent - r.due) for r in self.records),
            good_requests_per_second=None if good is None else good / seconds,
            good_share=None if good is None or not self.records else good / len(self.records),
            generator_cpu=(time.process_time() - self._cpu) / seconds,
            timeline=[(second - first, n) for second, n in sorted(self._target.timeline.items())],
        )


def key_refused(address: Address, status: int) -> EnvironmentFault:
    return EnvironmentFault(
        f"The server at {address.host}:{address.port} refuses the key (status {status}).",
        "No key was found." if address.key is None else "The key is not this server's.",
        "Give the key file that the server printed: --api-key-file FILE",
    )
