"""The main process of a server's job: starts the server, publishes what it does, and decides how the job ends.

    python -m penstock.cluster.keeper LAUNCH [--staged FOLDER] -- COMMAND...

COMMAND is `penstock serve ... --json`. The server is ready when its own /health says so, and gone when its process is;
what it logs means nothing here. Needs no command of Slurm on the node; where there are some, renewal and a polite
requeue use them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from urllib.parse import urlsplit

import msgspec

from penstock.cluster import slurm, web
from penstock.cluster.registry import Launch, Order, Record
from penstock.errors import PenstockError

BEAT = 5.0  # seconds between two looks at the server
LAST_WAIT = 600.0  # seconds that a preempted job waits for Slurm to end it
_GAUGES = {
    "running": "tgi_batch_current_size",
    "waiting": "tgi_queue_size",
    "generated": "penstock_generated_tokens_total",
}


class Keeper:
    """One life of one server."""

    def __init__(self, launch: Launch, order: Order, command: list[str], staged: Path | None) -> None:
        self._launch, self._order, self._command, self._staged = launch, order, command, staged
        job, node = os.environ.get("SLURM_JOB_ID", "0"), os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        self._record = Record(job, restart, node, "starting", order.model, time.time(), key_file=order.key_file)
        self._endpoint: web.Endpoint | None = None
        self._leaving = ""  # why
        self._counted: tuple[float, float] | None = None  # tokens generated, when

    def run(self) -> int:
        """Until the server has ended. Returns the job's exit code."""
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._signalled)
        wake, waker = socket.socketpair()
        for end in (wake, waker):
            end.setblocking(False)
        signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
        self._publish()
        # USR1 means nothing to a server that has not begun to listen for it
        server = subprocess.Popen(self._command, stdout=subprocess.PIPE, preexec_fn=_ignore_warning)
        out = server.stdout
        assert out is not None  # noqa: S101 (for mypy)
        watched = selectors.DefaultSelector()
        watched.register(out, selectors.EVENT_READ)
        watched.register(wake, selectors.EVENT_READ)
        while server.poll() is None:
            for key, _ in watched.select(BEAT if self._endpoint is not None else 1.0):
                if key.fileobj is wake:
                    with suppress(BlockingIOError):
                        wake.recv(64)
                elif line := out.readline():
                    self._opened(line)
                else:
                    watched.unregister(out)
            self._look(server)
        return self._end(server.returncode)

    def _opened(self, line: bytes) -> None:
        """The server has printed where it listens, which it does once it takes requests."""
        try:
            ready = json.loads(line)
            url, path = urlsplit(str(ready["url"])), ready["uds"]
        except (ValueError, KeyError, TypeError):
            return
        host = url.hostname or "localhost"
        reached = "127.0.0.1" if host == socket.gethostname().lower() else host  # a wildcard has our name there
        self._endpoint = web.Endpoint(reached, url.port or 80, path)
        self._set(host=host, port=None if path else url.port, socket=path)

    def _look(self, server: subprocess.Popen[bytes]) -> None:
        """Publish how the server is, and see whether it is time to go."""
        if self._leaving:
            if self._record.state != "leaving":
                _say(f"leaving: {self._leaving}")
                self._set(state="leaving", note=self._leaving)
            server.send_signal(signal.SIGUSR1)
        elif self._endpoint is not None:
            if self._record.state == "starting" and web.healthy(self._endpoint):
                self._set(state="ready", ready_at=time.time())
                self._renew()
            elif self._record.state == "ready":
                self._measure(self._endpoint)
        if not self._leaving and self._launch.stopped:
            self._leaving = "stopped"
        elif not self._leaving and self._relieved():
            self._leaving = "a successor has taken over"

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        self._leaving = self._leaving or f"Slurm sent {signal.Signals(number).name}"

    def _measure(self, endpoint: web.Endpoint) -> None:
        """Tokens a second since the last look, from the server's own counters."""
        try:
            status, body = web.get(endpoint, "/metrics", _key(self._order.key_file), timeout=BEAT)
        except OSError:
            return
        values = {name: _sample(body.decode(), series) for name, series in _GAUGES.items()}
        if status != 200:
            return
        now, generated = time.monotonic(), values.pop("generated")
        if self._counted is not None:
            before, since = self._counted
            rate = round((generated - before) / max(now - since, 0.001), 1)
            self._set(tokens_per_second=max(rate, 0.0), **{name: int(value) for name, value in values.items()})
        self._counted = (generated, now)

    def _relieved(self) -> bool:
        """Whether a job of this launch that came after ours is ready. Job numbers only grow."""
        mine = int(self._record.job)
        return any(record.state == "ready" and int(record.job) > mine for record in self._launch.records())

    def _renew(self) -> None:
        """Ask Slurm for the successor, unless it is there: a server that never got ready has none."""
        minutes, mine = self._order.renew_minutes, self._record.job
        if minutes is None or self._launch.stopped or any(int(job) > int(mine) for job in self._launch.jobs()):
            return
        try:
            job = slurm.submit(self._launch.script, f"--dependency=after:{mine}+{minutes}")
            self._launch.add_job(job)
            _say(f"job {job} takes over {minutes} minutes after the start of this one")
        except (PenstockError, OSError) as error:
            _say(f"WARNING: no successor could be submitted from this node: {error}")
            self._set(note="no successor: submit with --renewals N")

    def _end(self, code: int) -> int:
        """Publish the end, clean up, and leave the job as its end asks."""
        self._set(state="ended", exit_code=code, tokens_per_second=0.0, running=0, waiting=0)
        if self._record.socket is not None:
            with suppress(OSError):
                Path(self._record.socket).parent.rmdir()
        if self._staged is not None:
            self._unstage(self._staged)
        _say(f"the server has ended (exit code {code})")
        if not self._leaving.startswith("Slurm") or self._launch.stopped:
            return code if code >= 0 else 128 - code
        return self._wait_for_slurm()

    @staticmethod
    def _unstage(staged: Path) -> None:
        """The copy of the model goes with the last job that uses it."""
        from penstock.cluster.staging.store import release

        with suppress(PenstockError, OSError):
            release(staged, [job for job, found in slurm.jobs().items() if found.alive])

    def _wait_for_slurm(self) -> int:
        """The requests are done, and Slurm wants the node. Only a job that still lives is put back into the queue."""
        job = slurm.one(self._record.job)
        lead = self._order.drain_seconds + 60
        if job is not None and job.state != "RUNNING":
            return 0  # cancelled or out of time
        if job is not None and job.left is not None and job.left <= lead:
            return 0  # its time is over in a moment
        if job is not None:
            with suppress(PenstockError):
                slurm.run("scontrol", "requeue", self._record.job)
        # Leaving now would look like the end of the work: Slurm puts back only jobs that it had to end.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(LAST_WAIT)
        return 0

    def _set(self, **changes: str | float | int | None) -> None:
        changed = msgspec.structs.replace(self._record, **changes)
        if changed != self._record:
            self._record = changed
            self._publish()

    def _publish(self) -> None:
        try:
            self._launch.publish(self._record)
        except OSError as error:  # a full quota must not end the server
            _say(f"WARNING: {self._launch.path} cannot be written ({error.strerror}): nobody learns of this server")


def _ignore_warning() -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _key(file: str | None) -> str | None:
    """The first key of a key file; None when there is none to be read."""
    try:
        lines = [] if file is None else Path(file).read_text().splitlines()
    except OSError:
        return None
    return next((line.split()[-1] for line in lines if line.strip() and not line.startswith("#")), None)


def _sample(text: str, series: str) -> float:
    match = re.search(rf"^{re.escape(series)} (\S+)$", text, re.MULTILINE)
    return float(match[1]) if match else 0.0


def _say(line: str) -> None:
    print(f"keeper: {line}", file=sys.stderr, flush=True)


def main() -> int:
    """The job's command."""
    parser = argparse.ArgumentParser(prog="penstock.cluster.keeper")
    parser.add_argument("launch", type=Path)
    parser.add_argument("--staged", type=Path)
    parser.add_argument("command", nargs="+")
    given = parser.parse_args()
    launch = Launch(given.launch.parent.name, given.launch)
    order = launch.order()
    if order is None or shutil.which(given.command[0]) is None:
        _say(f"{given.launch} is no launch of Penstock's, or Python has moved: submit again")
        return 3
    if launch.stopped:
        _say("stopped before it began")
        return 0
    with suppress(OSError):
        launch.add_job(os.environ.get("SLURM_JOB_ID", "0"))
    return Keeper(launch, order, given.command, given.staged).run()


if __name__ == "__main__":
    sys.exit(main())
