"""Farms for tests: real spools and real processes, around an engine that only makes text of the prompt.

Run as a module it is one life of a worker: `python -m tests.batch.farms FARM LIFE SECONDS_A_STEP`.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from penstock.batch.farm.journal import Place
from penstock.batch.farm.life import Engine, live
from penstock.batch.farm.manifest import Manifest, ModelCopy, Timing
from penstock.batch.farm.place import here
from penstock.batch.farm.spool import Spool, create
from penstock.batch.farm.supervisor import Place as Slot
from penstock.batch.farm.supervisor import Supervisor
from penstock.batch.farm.worker import Generate
from penstock.batch.local import Progress
from penstock.batch.parameters import Parameters
from penstock.batch.record import make_record
from penstock.batch.results import Result
from penstock.batch.rows import Row
from penstock.hub.fingerprint import fingerprint
from tests.process import ROOT

FAST = Timing(lease=1.0, beat=0.1, commit=0.1, idle=20.0, grace=0.2, patience=3.0)
BATCH = 8  # rows of a step


def make_farm(
    folder: Path, rows: int, shard_rows: int = 16, timing: Timing = FAST, prompts: str = "prompt {}"
) -> Spool:
    """A farm of short prompts; its model is a folder with a file in it."""
    model = folder / "model"
    model.mkdir(parents=True, exist_ok=True)
    (model / "config.json").write_text("{}")
    sha = fingerprint(model)
    record = make_record("fake", sha, "p.txt", f"{rows}{prompts}", rows, Parameters(), {})
    manifest = Manifest(
        record=record,
        parameters=Parameters(),
        rows="",
        shards="",
        shards_sha256="",
        models={"": ModelCopy(name="fake", path=str(model), sha256=sha)},
        profiles={},
        shard_rows=shard_rows,
        timing=timing,
    )
    return create(folder / "farm", (Row(id=i + 1, prompt=prompts.format(i)) for i in range(rows)), manifest)


def answer(row: Row) -> Result:
    """What the engine of the tests says."""
    text = str(row.prompt)[::-1]
    return Result(row.name, row.prompt, text, [1, 2, 3], "length", 2, 3, hash=row.identity())


def generator(seconds: float = 0.0) -> Generate:
    """An engine that takes `seconds` for a step of BATCH rows. A prompt `die:N` ends the process with signal N,
    and `raise` raises."""

    def generate(rows: Iterable[Row]) -> Iterator[Progress]:
        source = iter(rows)
        while batch := list(itertools.islice(source, BATCH)):
            for row in batch:
                if str(row.prompt).startswith("die:"):
                    os.kill(os.getpid(), int(str(row.prompt)[4:]))
                if row.prompt == "raise":
                    raise RuntimeError("the engine gave up")
            time.sleep(seconds)
            yield Progress([answer(row) for row in batch], 3 * len(batch))

    return generate


def a_place(**fields: object) -> Place:
    """The place of this process, with other values where they are given."""
    return msgspec.structs.replace(here(), **fields)


def live_here(spool: Spool, life: str = "test", seconds: float = 0.0) -> int:
    """One life in this process."""
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)}
    try:
        return live(spool, life, here(), Engine(lambda *_: generator(seconds)), lambda: None, None)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def life_command(spool: Spool, life: str, seconds: float) -> list[str]:
    """The argument list of one life as a process."""
    return [sys.executable, "-m", "tests.batch.farms", str(spool.folder), life, str(seconds)]


def start_life(spool: Spool, life: str, seconds: float = 0.01) -> subprocess.Popen[bytes]:
    """One life as a process."""
    return subprocess.Popen(life_command(spool, life, seconds), cwd=ROOT, stderr=subprocess.DEVNULL)


def supervise_here(spool: Spool, workers: int, seconds: float = 0.01) -> int:
    """Workers under a supervisor, to the end."""
    os.chdir(ROOT)
    slots = [Slot({}, ()) for _ in range(workers)]
    return Supervisor(spool, lambda life, rank, place: life_command(spool, life, seconds), slots).run()


if __name__ == "__main__":
    if sys.argv[2] == "supervise":
        sys.exit(supervise_here(Spool(Path(sys.argv[1])), int(sys.argv[4]), float(sys.argv[3])))
    fake = Engine(lambda *_: generator(float(sys.argv[3])))
    sys.exit(live(Spool(Path(sys.argv[1])), sys.argv[2], here(), fake, lambda: None, None))
