"""The servers as their users see them: what the registry knows, joined with what Slurm says."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from penstock.cluster import registry, slurm, web, words
from penstock.cluster.files import server_time
from penstock.cluster.registry import Launch, Order, Record
from penstock.errors import EnvironmentFault, PenstockError, UsageError

SILENT = 60.0  # seconds without a word from a server that says it is ready
BEING_SUBMITTED = 120.0  # seconds that a launch may be without a job
LOG_LINES = 4  # of a job that ended before it was ready

Jobs = dict[str, slurm.Job] | None  # None: Slurm cannot be asked here


class Server(msgspec.Struct, frozen=True, kw_only=True):
    """One job of a launch. left: seconds until its time limit; key_file: None for a server without a key.

    state: pending, starting, ready, leaving, silent (it says it is ready, but not lately), ended. why: the reason of a
    pending job, how one ended, what the server notes.
    """

    name: str
    job: str
    state: str
    model: str
    node: str
    url: str | None
    socket: str | None
    key_file: str | None
    partition: str = ""
    left: int | None = None
    tokens_per_second: float = 0.0
    running: int = 0
    waiting: int = 0
    why: str = ""
    log: str = ""
    host: str | None = None
    port: int | None = None

    @property
    def alive(self) -> bool:
        return self.state != "ended"


@dataclass(frozen=True)
class Target:
    """A server that takes requests, and where this machine reaches it. reached: False when it does not."""

    server: Server
    endpoint: web.Endpoint
    reached: bool


def ask_slurm() -> Jobs:
    """This user's jobs, or None where Slurm cannot be asked: then the servers' own words must do."""
    try:
        return slurm.jobs()
    except PenstockError:
        return None


def jobs_of(launch: Launch, jobs: dict[str, slurm.Job]) -> dict[str, slurm.Job]:
    """Those jobs of a user that are of a launch. The name counts too: a Slurm that was set up anew gives the same
    numbers again."""
    return {job: jobs[job] for job in launch.jobs() if job in jobs and jobs[job].name == launch.job_name}


def servers(launch: Launch, jobs: Jobs) -> list[Server]:
    """The living jobs of a launch; when none lives, the last one. Empty while it is being submitted."""
    order = launch.order()
    if order is None:
        return []
    records = {record.job: record for record in launch.records()}
    now, jobs = _now(launch), None if jobs is None else jobs_of(launch, jobs)
    ids = sorted({*launch.jobs(), *records}, key=int)
    found = [_server(launch, order, job, records.get(job), jobs, now) for job in ids]
    return [server for server in found if server.alive] or found[-1:]


def all_servers(jobs: Jobs) -> list[Server]:
    """The servers of every name, the accounting asked once for those that ended without a word."""
    found = [server for launch in registry.newest() for server in servers(launch, jobs)]
    unknown = [server.job for server in found if not server.alive and not server.why]
    endings = slurm.endings(unknown)
    return [_with_ending(server, endings.get(server.job)) for server in found]


def reserve(name: str | None, model: str, jobs: Jobs) -> Launch:
    """A new launch under a name; without one, under the first free name made of the model's. Raises UsageError."""
    base = registry.check_name(name) if name is not None else registry.name_for(model)
    for number in range(1, 1000):
        candidate = base if number == 1 else f"{base}-{number}"
        last = next(iter(registry.launches(candidate)[-1:]), None)
        taken = "" if last is None else _taken(last, jobs)
        if not taken:
            launch = registry.claim(candidate, last)
            if launch is not None:
                return launch
            taken = "it is being submitted at this moment"
        if name is not None:
            raise UsageError(
                f"There is already a server {name!r}: {taken}.", "", f"Give another --name, or: penstock stop {name}"
            )
    raise UsageError(f"Too many servers are called {base}.", "", "Give a --name.")


def launch_of(name: str) -> Launch:
    """The last launch of a name. Raises UsageError with the names there are."""
    found = registry.launches(name)
    if found:
        return found[-1]
    known = ", ".join(launch.name for launch in registry.newest())
    raise UsageError(
        f"There is no server {name!r}.",
        f"Servers known here: {known}." if known else f"None is registered in {registry.root()}.",
        "Start one: penstock submit MODEL",
    )


def find(name: str, jobs: Jobs) -> Target:
    """The server of a name that takes requests; of several, the one that came last. Raises EnvironmentFault."""
    found = servers(launch_of(name), jobs)
    ready = [server for server in found if server.state == "ready"]
    if not ready:
        state = "; ".join(f"job {s.job} is {s.state}" + (f" ({s.why})" if s.why else "") for s in found)
        _check_submitted(launch_of(name), found)
        raise EnvironmentFault(
            f"The server {name!r} does not take requests now.",
            f"{state[:1].upper()}{state[1:]}." if state else "It is being submitted.",
            f"`penstock url {name} --wait` waits for it."
            if any(s.alive for s in found) or not found
            else "Start it: penstock submit",
        )
    for server in sorted(ready, key=lambda s: int(s.job), reverse=True):
        endpoint = reach(server)
        if endpoint is not None:
            return Target(server, endpoint, reached=True)
    server = ready[-1]
    return Target(server, web.Endpoint(server.host or "", server.port or 0, server.socket), reached=False)


def reach(server: Server) -> web.Endpoint | None:
    """Where this machine talks to a server: its address, or what Slurm has for its node; None when it cannot."""
    if server.socket is not None:
        here = web.Endpoint(socket=server.socket)
        return here if web.healthy(here) else None
    if server.host in (None, "127.0.0.1", "localhost", "::1"):
        return None  # only on its node; here, another program may listen there
    address = web.Endpoint(server.host, server.port or 0)
    if web.healthy(address):
        return address
    known = slurm.node_address(server.node)
    if known is None or known == server.host:
        return None
    address = web.Endpoint(known, server.port or 0)
    return address if web.healthy(address) else None


def wait(launch: Launch, say: Callable[[str], None], patience: float | None = None) -> Server:
    """Until a server of a launch is ready; say is told what changes. Asks Slurm every few seconds, files more often.

    Raises PenstockError when it ended, will never start, or `patience` seconds are over.
    """
    began = time.monotonic()
    told, told_at = "", began
    while True:
        jobs = ask_slurm()
        for _ in range(8):
            found = servers(launch, jobs)
            ready = [server for server in found if server.state == "ready"]
            if ready:
                return ready[-1]
            _check_alive(launch, found)
            line = "; ".join(_progress(server) for server in found[:1])
            if line and (line != told or time.monotonic() - told_at > 15):
                say(f"{line} ({time.monotonic() - began:.0f} s)" if line == told else line)
                told, told_at = line, time.monotonic()
            if patience is not None and time.monotonic() - began > patience:
                raise EnvironmentFault(
                    f"The server {launch.name!r} was not ready within {patience:g} s.",
                    f"Now: {line}." if line else "",
                    f"It goes on; look again with: penstock url {launch.name} --wait",
                )
            time.sleep(0.5)


def _progress(server: Server) -> str:
    where = f" on {server.node}" if server.node else ""
    return f"job {server.job}: {server.state}{where}" + (f", {server.why}" if server.why else "")


def _check_alive(launch: Launch, found: list[Server]) -> None:
    """Raises PenstockError for a launch that will never be ready."""
    _check_submitted(launch, found)
    if found and not found[-1].alive:
        last = _with_ending(found[-1], slurm.endings([found[-1].job]).get(found[-1].job))
        raise EnvironmentFault(
            f"The server {launch.name!r} ended before it was ready (job {last.job}): {last.why}.",
            "\n".join(log_tail(launch, last.job)),
            f"Its log: penstock logs {launch.name}",
        )
    reason = found[0].why.partition(":")[0] if found and found[0].state == "pending" else ""
    if words.hopeless(reason):
        raise UsageError(
            f"Job {found[0].job} will never start. {found[0].why[:1].upper()}{found[0].why[1:]}.",
            hint=f"Take it back: penstock stop {launch.name}",
        )


def _check_submitted(launch: Launch, found: list[Server]) -> None:
    """Raises EnvironmentFault for a launch without a job that is too old to be getting one."""
    if not found and _age(launch) > BEING_SUBMITTED:
        raise EnvironmentFault(
            f"The server {launch.name!r} was never submitted.",
            f"Its submission was broken off, or {launch.path} is damaged.",
            f"Submit it again: penstock submit MODEL --name {launch.name}",
        )


def log_tail(launch: Launch, job: str, count: int = LOG_LINES) -> list[str]:
    """The last lines of a job's log."""
    try:
        with launch.log(job).open("rb") as stream:
            stream.seek(max(0, stream.seek(0, 2) - 8192))
            lines = stream.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return []
    return [line[:200] for line in lines if line.strip() and not line.startswith("keeper:")][-count:]


def _taken(launch: Launch, jobs: Jobs) -> str:
    """Why a name is taken by its last launch; nothing when it is free."""
    living = [server for server in servers(launch, jobs) if server.alive]
    if living:
        return f"job {living[-1].job} is {living[-1].state}"
    # A young launch of which Slurm said nothing may have got its job after Slurm was asked.
    if jobs_of(launch, jobs or {}) or any(record.state == "ended" for record in launch.records()):
        return ""
    return "it is being submitted at this moment" if _age(launch) < BEING_SUBMITTED else ""


def _age(launch: Launch) -> float:
    """Seconds since it was claimed; a launch that cannot be looked at is old."""
    try:
        return launch.age()
    except OSError:
        return math.inf


def _server(launch: Launch, order: Order, job: str, record: Record | None, jobs: Jobs, now: float) -> Server:
    """One job, from what both sides say. Slurm knows whether it lives, the server whether it is ready."""
    known = None if jobs is None else jobs.get(job)
    state, why = _state(record, known, jobs is not None, now)
    speaks = record is not None and state in ("ready", "leaving", "silent", "starting")
    url = None
    if record is not None and speaks and record.port is not None:
        url = f"http://{record.host}:{record.port}"
    if state == "pending" and launch.jobs()[:1] != [job] and known is not None and known.reason == "Dependency":
        why = "it takes over before the time limit of the job before it"
    return Server(
        name=launch.name,
        job=job,
        state=state,
        model=order.model,
        node=record.node if record is not None and state != "pending" else (known.node if known else ""),
        url=url,
        socket=record.socket if record is not None and speaks else None,
        key_file=order.key_file,
        partition=known.partition if known else "",
        left=known.left if known else None,
        tokens_per_second=record.tokens_per_second if record is not None and state == "ready" else 0.0,
        running=record.running if record is not None and state == "ready" else 0,
        waiting=record.waiting if record is not None and state == "ready" else 0,
        why=why,
        log=str(launch.log(job)),
        host=record.host if record is not None else None,
        port=record.port if record is not None else None,
    )


def _state(record: Record | None, job: slurm.Job | None, slurm_asked: bool, now: float) -> tuple[str, str]:
    """The state of a server, and why."""
    if job is not None and job.state in slurm.WAITING:
        return "pending", words.pending(job.reason, job.id)
    lives = job is not None and job.state in slurm.RUNNING
    if slurm_asked and not lives:
        code = record.exit_code if record is not None else None
        if job is None and code is None:
            return "ended", ""
        return "ended", words.ending(job.state if job is not None else "", code)
    if record is None:
        return "starting" if lives else "pending", ""
    if record.state == "ready" and now - record.written > SILENT:
        return "silent", f"no word for {now - record.written:.0f} s"
    if record.state == "ended":
        code = record.exit_code
        return ("leaving" if lives else "ended"), words.exit_meaning(code) if code is not None else ""
    return record.state, record.note


def _with_ending(server: Server, ending: slurm.Ending | None) -> Server:
    if server.alive or server.why:
        return server
    why = words.ending(ending.state) if ending is not None else "Slurm has forgotten it, and it left no word"
    return msgspec.structs.replace(server, why=why)


def _now(launch: Launch) -> float:
    try:
        return server_time(launch.path.parent)
    except OSError:  # a full quota, or somebody else's directory: the clocks of a cluster differ by less than SILENT
        return time.time()
