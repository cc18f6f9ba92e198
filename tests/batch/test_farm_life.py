"""Workers as processes that die in every way: no row lost, none doubled, none torn, and the status never lies."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from penstock.batch.farm.audit import audit
from penstock.batch.farm.journal import JournalReader, Start
from penstock.batch.farm.ledger import Ledger
from penstock.batch.farm.merge import merge
from penstock.batch.farm.spool import Spool
from penstock.batch.farm.status import Status, status_of
from tests.batch.farms import answer, life_command, live_here, make_farm, start_life
from tests.process import ROOT


def check_output(spool: Spool, aside: int = 0) -> list[dict[str, object]]:
    """Merge, audit, and compare with what an undisturbed run says."""
    output = spool.folder / "output.jsonl"
    assert merge(spool, output).aside == aside
    found, checked = audit(spool, output)
    assert found.sound
    assert found.complete
    assert checked is not None
    assert checked.sound
    lines = output.read_bytes().splitlines()
    rows = [row for shard in spool.shards for row in spool.read(shard)]
    assert len(lines) == len(rows) == spool.total
    results = [msgspec.json.decode(line) for line in lines]
    for result, row in zip(results, rows, strict=True):
        if result.get("error") is None:
            assert result == msgspec.to_builtins(answer(row))
    return results


def run_supervised(spool: Spool, workers: int = 1, seconds: float = 0.005) -> subprocess.Popen[bytes]:
    command = [*life_command(spool, "supervise", seconds), str(workers)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)


def poll_until_complete(spool: Spool, ledger: Ledger, seconds: float = 60) -> Status:
    """Ask again and again; what is said to be done must be, and must stay."""
    until, before = time.monotonic() + seconds, 0
    while True:
        assert time.monotonic() < until
        found = status_of(ledger)
        assert before <= found.done <= found.rows
        assert found.complete == (found.shards_done == found.shards)
        assert not found.complete or found.done == found.rows
        before = found.done
        if found.complete:
            return found
        time.sleep(0.05)


def test_one_life_answers_everything(tmp_path: Path) -> None:
    spool = make_farm(tmp_path, 100)
    assert live_here(spool) == 0
    check_output(spool)
    assert live_here(spool, "again") == 0  # nothing is left: it leaves at once
    assert status_of(Ledger(spool)).repeated == 0


def test_random_events_lose_double_and_tear_nothing(tmp_path: Path) -> None:
    """Lives are killed, told to leave, stopped for longer than their lease, started twice and cut off from the disk."""
    spool, rng, ledger = make_farm(tmp_path, 1000), random.Random(7), None
    lives = {f"life{i}": start_life(spool, f"life{i}", 0.04) for i in range(4)}
    stopped: list[subprocess.Popen[bytes]] = []
    events = 0
    ledger = Ledger(spool)
    while events < 24:
        time.sleep(0.12)
        found = status_of(ledger)
        assert found.done <= found.rows
        if found.complete:
            break
        name, process = rng.choice(list(lives.items()))
        event = rng.choice(["kill", "kill", "term", "usr1", "stop", "full"])
        if process.poll() is None:
            events += 1
            if event == "full":
                journal = spool.journal(name)
                size = journal.stat().st_size if journal.exists() else 0
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, -1))
            else:
                number = {"kill": 9, "term": 15, "usr1": signal.SIGUSR1, "stop": signal.SIGSTOP}[event]
                process.send_signal(number)
            if event == "stop":
                stopped.append(process)
            del lives[name]
        for twin in range(2 if rng.random() < 0.3 else 1):  # sometimes two take the place of one
            lives[f"{events}.{twin}"] = start_life(spool, f"life{events}.{twin}", 0.04)
    assert events >= 12
    for process in stopped:
        process.send_signal(signal.SIGCONT)  # back from the dead, with shards that others have by now
    status = poll_until_complete(spool, ledger)
    for process in [*lives.values(), *stopped]:
        process.wait(20)
    assert status.done == 1000
    check_output(spool)


def test_two_farms_on_one_folder_are_one(tmp_path: Path) -> None:
    """The second command finds the first one's farm, and its workers join."""
    first = make_farm(tmp_path, 300)
    workers = [run_supervised(first), run_supervised(make_farm(tmp_path, 300))]
    assert [worker.wait(60) for worker in workers] == [0, 0]
    check_output(first)
    assert len(list(first.folder.glob("rows-*"))) == 1


@pytest.mark.parametrize(
    ("poison", "deaths", "cause"),
    [("die:11", 2, "SIGSEGV"), ("raise", 2, "RuntimeError: the engine gave up"), ("die:9", 6, "SIGKILL")],
)
def test_a_row_that_kills_workers_is_set_aside_and_the_rest_goes_on(
    tmp_path: Path, poison: str, deaths: int, cause: str
) -> None:
    """A crash convicts at the second time; kill -9, which may have come from outside, needs three in company and three
    alone."""
    spool = make_farm(tmp_path, 60)
    rows = (spool.folder / spool.manifest.rows).read_bytes().replace(b"prompt 33", poison.encode())
    spool = rewritten(spool, rows)
    worker = run_supervised(spool)
    assert worker.wait(60) == 0
    results = check_output(spool, aside=1)
    assert results[33]["finish_reason"] == "error"
    assert f"died {deaths} times on this row ({cause})" in str(results[33]["error"])
    assert sum("error" in result for result in results) == 1
    status = status_of(Ledger(spool))
    assert (status.failed, status.aside) == (1, 1)
    assert any(cause in sentence for sentence in status.failures)


def rewritten(spool: Spool, rows: bytes) -> Spool:
    """The farm with other rows, made anew."""
    import shutil

    from penstock.batch.farm.spool import create
    from penstock.batch.rows import Row

    manifest, folder = spool.manifest, spool.folder
    shutil.rmtree(folder)
    return create(folder, [msgspec.json.decode(line, type=Row) for line in rows.splitlines()], manifest)


def test_a_model_that_kills_every_worker_is_given_up(tmp_path: Path) -> None:
    spool = make_farm(tmp_path, 10, prompts="die:11 {}")
    spool = rewritten(spool, (spool.folder / spool.manifest.rows).read_bytes().replace(b"die:11 ", b"die:11x"))
    worker = subprocess.Popen(
        [sys.executable, "-c", _BROKEN, str(spool.folder)], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    _, stderr = worker.communicate(timeout=60)
    assert worker.returncode == 7
    assert "giving up" in stderr
    assert status_of(Ledger(spool)).ends == {}  # no life came as far as its journal


_BROKEN = """
import sys
from pathlib import Path
from penstock.batch.farm import supervisor
from penstock.batch.farm.spool import Spool
supervisor._BACKOFF = 0.01
slots = [supervisor.Place({}, ())]
command = lambda life, rank, place: [sys.executable, "-c", "raise SystemExit(7)"]
sys.exit(supervisor.Supervisor(Spool(Path(sys.argv[1])), command, slots).run())
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 6), (signal.SIGTERM, 130)])
def test_a_signal_hands_back(tmp_path: Path, number: signal.Signals, code: int) -> None:
    spool = make_farm(tmp_path, 400)
    worker = run_supervised(spool, seconds=0.05)
    ledger = Ledger(spool)
    until = time.monotonic() + 20
    while status_of(ledger).done < 20:
        assert time.monotonic() < until
        time.sleep(0.02)
    since = time.monotonic()
    worker.send_signal(number)
    assert worker.wait(10) == code
    assert time.monotonic() - since < 2
    (life,) = ledger.lives.values()
    ledger.update()
    assert life.end is not None
    assert life.end.reason == "asked"
    since = time.monotonic()
    assert live_here(spool, "next") == 0  # nothing waits for a lease
    assert time.monotonic() - since < 3
    check_output(spool)
    assert status_of(ledger).repeated == 0


def test_work_is_not_begun_that_cannot_end_in_time(tmp_path: Path) -> None:
    from penstock.batch.farm.leaving import Leaving

    leaving = Leaving(lambda: False, deadline=time.monotonic() + 20, grace=2.0)
    assert leaving.fits(10)
    assert not leaving.fits(15)
    assert not leaving
    late = Leaving(lambda: False, deadline=time.monotonic() + 6, grace=2.0)
    assert late
    assert late.reason == "time"


def test_a_full_disk_is_waited_for(tmp_path: Path) -> None:
    """A file system of its own that another file fills; the worker goes on when there is room again."""
    if os.getuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "x", tmp_path]).returncode:
        pytest.skip("needs a small file system of its own, which only root may mount")
    try:
        spool = make_farm(tmp_path, 200)
        worker = run_supervised(spool, seconds=0.03)
        ledger = Ledger(spool)
        while status_of(ledger).done < 16:
            time.sleep(0.02)
        with contextlib.suppress(OSError), (tmp_path / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
        time.sleep(0.7)
        stuck = status_of(ledger).done
        time.sleep(0.4)
        assert status_of(ledger).done == stuck < 200
        assert worker.poll() is None
        (tmp_path / "filler").unlink()
        poll_until_complete(spool, ledger)
        assert worker.wait(20) == 0
        check_output(spool)
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


def test_rows_are_noted_before_the_engine_gets_them(tmp_path: Path) -> None:
    spool = make_farm(tmp_path, 20)
    live_here(spool, "test")
    started = [event for _, _, event in JournalReader(spool.journal("test")).read() if isinstance(event, Start)]
    assert sum(len(event.rows) for event in started) == 20
