"""Farms from Python: `penstock.farm`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Unpack

import msgspec

from penstock.batch.farm.answers import Audit
from penstock.batch.farm.ledger import Ledger
from penstock.batch.farm.local import places_here, run_locally
from penstock.batch.farm.manifest import Timing, as_profile
from penstock.batch.farm.merge import merge
from penstock.batch.farm.prepare import SHARD_ROWS, Order, prepare, prepare_rows, reopen
from penstock.batch.farm.spool import Spool
from penstock.batch.farm.stats import FarmStats, stats_of
from penstock.batch.farm.status import Status, status_of
from penstock.batch.farm.submission import resubmit, shapes, submit_all
from penstock.batch.llm import Asked, Prompt, numbered_row, parameters_of
from penstock.batch.progress import bar
from penstock.batch.results import Result
from penstock.batch.rows import RowShape
from penstock.cluster import slurm
from penstock.cluster.script import Resources
from penstock.cluster.workers import check_can_submit, check_partitions, queue, shares, submissions
from penstock.errors import PartialResults
from penstock.hub.snapshot import resolve

_LOOK_SECONDS = 0.5
_RESULT = msgspec.json.Decoder(Result)


class Farm:
    """A farm on disk, whoever works on it and wherever it was made.

    folder: of any farm. progress: show a bar while it is waited for; None shows it on a terminal and in a notebook.
    Raises UsageError when the folder holds no farm.
    """

    def __init__(self, folder: str | os.PathLike[str], *, progress: bool | None = None) -> None:
        self._spool = Spool(Path(folder).expanduser().resolve())
        self._ledger = Ledger(self._spool)
        self._progress = progress

    def __repr__(self) -> str:
        return f"Farm({str(self.folder)!r})"

    def __len__(self) -> int:
        """How many rows it has."""
        return self._spool.total

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self._spool.folder

    def status(self) -> Status:
        """How it goes. On Slurm this asks squeue once."""
        jobs = queue(submissions(self.folder))
        if jobs is None:
            return status_of(self._ledger)
        return status_of(self._ledger, jobs.waiting, sum(jobs.running.values()))

    def run(self, workers: int | None = None) -> Farm:
        """Work on it with processes of this machine until it is complete. Raises KeyboardInterrupt, PartialResults."""
        with self._bar() as look:
            code = run_locally(self._spool, places_here(workers), look)
        if not self.status().complete:
            if code in (6, 130):
                raise KeyboardInterrupt
            raise PartialResults(
                f"The workers of {self.folder} ended before it was complete (exit code {code}).",
                "; ".join(self.status().failures)[:300],
                f"Farm({str(self.folder)!r}).run() goes on.",
            )
        return self

    def wait(self, seconds: float | None = None) -> bool:
        """Until it is complete, or for so long; returns whether it is. Others do the work; see `resume`."""
        until = None if seconds is None else time.monotonic() + seconds
        with self._bar() as look:
            while True:
                look()
                if len(self._ledger.done_shards) == len(self._spool.shards):
                    return True
                if until is not None and time.monotonic() >= until:
                    return False
                time.sleep(_LOOK_SECONDS)

    def results(self, *, partial: bool = False) -> Iterator[Result]:
        """Every answer, in the order of the prompts. Raises PartialResults when some are missing, unless `partial`."""
        output = self.folder / "output.jsonl"
        merge(self._spool, output, partial)
        with output.open("rb") as file:
            for line in file:
                yield _RESULT.decode(line)

    def merge(self, output: str | os.PathLike[str], *, partial: bool = False) -> Audit:
        """Write every answer to a file, in the order of the prompts."""
        return merge(self._spool, Path(output), partial)

    def stats(self) -> FarmStats:
        """Rates, cost and lost time; `penstock farm report` draws them."""
        self._ledger.update()
        return stats_of(self._ledger, {entry.job: entry.submitted for entry in submissions(self.folder)})

    def resume(self) -> Farm:
        """On Slurm, submit again the workers that are gone; a farm of this machine is run to its end."""
        reopen(self.folder)
        if not submissions(self.folder):
            return self.run()
        resubmit(self._spool)
        return self

    def cancel(self) -> None:
        """Have all workers leave; what is done stays."""
        self._spool.stop.touch(mode=0o600)
        jobs = [entry.job for entry in submissions(self.folder)]
        if jobs:
            slurm.cancel(jobs)

    def _bar(self) -> _Bar:
        return _Bar(self._ledger, len(self), self._progress)


class _Bar:
    """A progress bar over a ledger; what it gives is to be called often."""

    def __init__(self, ledger: Ledger, total: int, shown: bool | None) -> None:
        seen = sys.stderr.isatty() or "ipykernel" in sys.modules
        self._ledger, self._rows, self._tokens = ledger, 0, 0
        self._context = bar(total, "farm", seen if shown is None else shown)

    def __enter__(self) -> Callable[[], None]:
        self._advance = self._context.__enter__()
        return self._look

    def __exit__(self, *exception: object) -> None:
        self._ledger.update()
        self._look()
        self._context.__exit__(None, None, None)

    def _look(self) -> None:
        self._ledger.glance()
        self._advance(self._ledger.rows - self._rows, self._ledger.tokens - self._tokens)
        self._rows, self._tokens = self._ledger.rows, self._ledger.tokens


def farm(
    prompts: str | os.PathLike[str] | Iterable[Prompt],
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    workers: int | None = None,
    partitions: str | None = None,
    profiles: Mapping[str, Mapping[str, object]] | None = None,
    time: str | None = None,
    account: str | None = None,
    gpus: str | None = None,
    cpus: int | None = None,
    mem: str | None = None,
    dtype: str = "auto",
    quantize: str = "none",
    max_batch_size: int | None = None,
    max_batch_total_tokens: int | None = None,
    threads: int | None = None,
    shard_rows: int = SHARD_ROWS,
    progress: bool | None = None,
    **parameters: Unpack[Asked],
) -> Farm:
    """Answer many prompts with many workers, each prompt exactly once, through crashes and preemptions.

    >>> import penstock
    >>> done = penstock.farm(["Once upon a time", "The old lighthouse"], "demo", "out", max_new_tokens=8)
    >>> [result.text for result in done.results()]

    prompts: a file of prompts, or texts, token ids or rows. output: the farm's folder; where it holds the same farm,
    that one goes on. Without `partitions` it runs here, with one process a GPU or memory node (or `workers`), and
    returns when it is complete. With them (`"cpu,gpu"`, `"cpu:2,gpu:6"`, `"all"`) it submits `workers` Slurm jobs and
    returns at once; see `Farm.wait`. profiles: what a partition does differently, by its name, as `Profile`.

    Raises PenstockError.
    """
    here: dict[str, object] = {
        "dtype": dtype,
        "quantize": quantize,
        "max_batch_size": max_batch_size,
        "max_batch_total_tokens": max_batch_total_tokens,
        "threads": threads,
    }
    common = as_profile(here, "penstock.farm")
    own = {name: as_profile(values, f"profiles[{name!r}]") for name, values in (profiles or {}).items()}
    order = Order(
        model=os.fspath(model),
        find=resolve,
        parameters=parameters_of(parameters),
        profiles={"": common, **own},
        shard_rows=shard_rows,
        timing=Timing(),
    )
    counts = None
    if partitions is not None:
        check_can_submit()
        check_partitions(set(own))
        counts = shares(partitions, workers or 1)
    folder = Path(output).expanduser().resolve()
    if isinstance(prompts, str | os.PathLike):
        spool = prepare(order, folder, Path(prompts).expanduser(), "auto", RowShape())
    else:
        rows = [numbered_row(number, prompt) for number, prompt in enumerate(prompts)]
        spool = prepare_rows(order, folder, rows, f"{len(rows)} prompts")
    found = Farm(folder, progress=progress)
    if counts is None:
        return found.run(workers)
    resources = Resources(account=account, time=time, gpus=gpus, cpus=cpus, mem=mem)
    list(submit_all(shapes(spool, counts, resources, None, None)))
    return found
