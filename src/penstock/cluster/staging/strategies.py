"""Ways to bring a model to the nodes of a job, and the choice between them on pieces of that very model.

Nothing is copied for the measurement alone: each way brings some pieces, the fastest brings the rest. (Only sbcast's
sample is extra: it copies whole files.) Different pieces for each, so that none profits from a cache that another one
filled.
"""

from __future__ import annotations

import secrets
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from penstock.cluster import slurm
from penstock.cluster.staging import copying
from penstock.cluster.staging.crew import Crew, LeaderFailed
from penstock.cluster.staging.manifest import Manifest
from penstock.errors import PenstockError, UsageError

SHORT, LONG = 1, 4  # pieces of the two rounds
HOPELESS = 2.0  # times slower than the best after the first round: left out of the second
SMALL = 32 * 2**20  # bytes that are brought faster than they are measured


@dataclass(frozen=True)
class Strategy:
    """One way. fanout: leaders fed by each leader (1: a chain); None where no leader feeds another."""

    name: str
    meaning: str
    fanout: int | None = None


DIRECT = Strategy("direct", "every node reads the shared file system")
SBCAST = Strategy("sbcast", "Slurm's own broadcast, file by file")


@dataclass(frozen=True)
class Ground:
    """Where a model goes: the leaders, the nodes that lack it, and the folder on each of them."""

    crew: Crew
    manifest: Manifest
    who: Sequence[str]
    part: str


@dataclass(frozen=True)
class Timing:
    """What a way took, by pieces: seconds for so many bytes. problem: why it cannot be used here."""

    strategy: Strategy
    seconds: float
    size: int
    problem: str = ""

    @property
    def gb_s(self) -> float:
        """10^9 bytes a second that arrived, on each node."""
        return self.size / max(self.seconds, 1e-9) / 1e9


def candidates(nodes: int, all_nodes: bool) -> list[Strategy]:
    """The ways that differ for so many nodes. all_nodes: whether these are all of the step's, as sbcast needs."""
    found = [DIRECT]
    if nodes < 2:
        return found
    star, tree = max(nodes - 1, 1), 2
    relays = {1: "chain: one node reads, each passes it on to the next"}
    relays.setdefault(star, "broadcast: one node reads and sends to all others")
    if tree < star:
        relays[tree] = "tree: one node reads, each passes it on to two"
    found += [Strategy(text.partition(":")[0], text.partition(": ")[2], fanout) for fanout, text in relays.items()]
    if all_nodes and slurm.available("sbcast"):
        found.append(SBCAST)
    return found


def named(name: str, known: Sequence[Strategy]) -> Strategy:
    """The strategy of a name. Raises UsageError when it makes no sense here."""
    for strategy in known:
        if strategy.name == name:
            return strategy
    raise UsageError(
        f"The strategy {name!r} cannot be used here.", f"Those that can: {', '.join(s.name for s in known)}."
    )


def bring(strategy: Strategy, ground: Ground, first: int, last: int) -> Timing:
    """Bring the pieces first..last to the nodes. Raises PenstockError."""
    pieces = ground.manifest.pieces()[first:last]
    size = sum(piece.length for piece in pieces)
    began = time.monotonic()
    if strategy is SBCAST:
        files = dict.fromkeys(piece.file for piece in pieces)
        for index in files:
            _sbcast(ground, ground.manifest.sources[index], ground.manifest.names[index])
        size = sum(ground.manifest.sizes[index] for index in files)
    elif strategy.fanout is None:
        ground.crew.ask("direct", first=first, last=last, who=list(ground.who))
    else:
        doors = ground.crew.ask("listen")
        ground.crew.ask(
            "relay",
            first=first,
            last=last,
            order=list(ground.who),
            fanout=strategy.fanout,
            doors=doors,
            token=secrets.token_hex(16),
        )
    return Timing(strategy, time.monotonic() - began, size)


def bring_all(ground: Ground, known: Sequence[Strategy], say: Callable[[str], None]) -> Timing:
    """Bring the whole model by the way that proves the fastest. Returns its timing over everything it brought."""
    pieces = ground.manifest.pieces()
    if len(known) == 1 or ground.manifest.total < SMALL:
        return bring(known[0], ground, 0, len(pieces))
    cursor, left = 0, list(known)
    timings: dict[str, list[Timing]] = {strategy.name: [] for strategy in known}
    for count in (SHORT, LONG):
        for strategy in list(left):
            timing = _sample(strategy, ground, cursor, min(cursor + count, len(pieces)))
            if timing.problem:
                left.remove(strategy)
                say(f"{strategy.name} cannot be used here: {timing.problem}")
                continue
            timings[strategy.name].append(timing)
            cursor += 0 if strategy is SBCAST else count
        rates = {strategy: _predicted(timings[strategy.name], ground.manifest.total) for strategy in left}
        left = [strategy for strategy in left if rates[strategy] <= HOPELESS * min(rates.values())]
    best = min(left, key=lambda strategy: rates[strategy])
    shown = ", ".join(f"{s.name} {rates[s]:.1f} s" for s in sorted(left, key=lambda strategy: rates[strategy]))
    say(f"{best.name} ({best.meaning}); predicted for all of it: {shown}")
    return bring(best, ground, min(cursor, len(pieces)), len(pieces))


def _sample(strategy: Strategy, ground: Ground, first: int, last: int) -> Timing:
    """Bring a few pieces; what goes wrong is in the timing."""
    try:
        if strategy is SBCAST:
            return _sample_sbcast(ground, first, last)
        return bring(strategy, ground, first, last)
    except PenstockError as error:
        if isinstance(error, LeaderFailed) and strategy is DIRECT:
            raise  # the source cannot be read or the copy not written: no other way will do better
        return Timing(strategy, 0.0, 0, str(error).splitlines()[0])


def _predicted(timings: Sequence[Timing], total: int) -> float:
    """Seconds for the whole model: from two sizes, a fixed part and a part that grows."""
    if len(timings) == 1 or timings[-1].size <= timings[0].size:
        return timings[-1].seconds * total / max(timings[-1].size, 1)
    short, long = timings[0], timings[-1]
    rate = (long.seconds - short.seconds) / (long.size - short.size)
    if rate <= 0:  # noise: then the longer one counts
        return long.seconds * total / long.size
    return max(short.seconds - rate * short.size, 0.0) + rate * total


def _sample_sbcast(ground: Ground, first: int, last: int) -> Timing:
    """Some pieces as a file of their own, read from the shared file system within the time that counts."""
    began = time.monotonic()
    size = 0
    with tempfile.NamedTemporaryFile(prefix="penstock-") as sample:  # sbcast reads it here
        for piece in ground.manifest.pieces()[first:last]:
            with open(ground.manifest.sources[piece.file], "rb") as source:
                source.seek(piece.offset)
                for offset in range(0, piece.length, copying.CHUNK):
                    size += sample.write(source.read(min(copying.CHUNK, piece.length - offset)))
        sample.flush()
        _sbcast(ground, sample.name, ".sample")
        return Timing(SBCAST, time.monotonic() - began, size)


def _sbcast(ground: Ground, source: str, name: str) -> None:
    target = str(Path(ground.part) / name)
    slurm.run("sbcast", "--force", f"--jobid={ground.crew.step}", source, target, timeout=7200)


def check(ground: Ground) -> None:
    """Read every copy back and compare it with the source. Raises LeaderFailed with the file that differs."""
    answers = ground.crew.ask("check", who=list(ground.who))
    digests = {answers[node]["digest"] for node in ground.who}
    wrong = sorted({name for node in ground.who for name in answers[node]["wrong"]})
    if wrong or len(digests) != 1:
        where = ", ".join(wrong) or "a file"
        raise LeaderFailed(
            f"The copy of {where} differs from {Path(ground.manifest.sources[0]).parent}.",
            "Nothing is kept of it.",
            "Try again; if it happens again, a node's memory or disk is faulty.",
        )


def prepared(crew: Crew, manifest: Manifest, who: Sequence[str], part: str) -> Ground:
    """Empty files on the nodes that lack the model. Raises LeaderFailed."""
    crew.ask("prepare", manifest=msgspec.to_builtins(manifest), who=list(who))
    return Ground(crew, manifest, who, part)
