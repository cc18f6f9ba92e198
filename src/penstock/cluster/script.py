"""The batch script of a server: made to be read, kept beside the launch, submitted as it is."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from penstock import __version__
from penstock.cluster.registry import Launch
from penstock.errors import UsageError
from penstock.plan.site import Ports, duration_seconds

# What the job may take over from the submitting shell: where things lie, never a secret.
CARRIED = (
    "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "PENSTOCK_SITE", "PYTHONPATH", "SLURM_CONF", "XDG_CACHE_HOME",
    "XDG_CONFIG_HOME",
)  # fmt: skip
WARNING_SLACK = 35  # seconds: Slurm looks at time limits every 30


@dataclass(frozen=True)
class Resources:
    """What the job asks Slurm for. None: the site's default. gpus: `2`, `a100:2` or `a100l.3:1` (a MIG slice).

    gpu_flag: how the site wants cards asked for (gres, gpus-per-node); more: further flags, each as `--name=value`.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    gpus: str | None = None
    cpus: int | None = None
    mem: str | None = None
    constraint: str | None = None
    gpu_flag: str = "gres"
    more: tuple[str, ...] = ()

    def flags(self) -> list[str]:
        """The lines for `#SBATCH`."""
        named = {
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "time": self.time,
            self.gpu_flag: None if self.gpus is None else f"gpu:{self.gpus}" if self.gpu_flag == "gres" else self.gpus,
            "cpus-per-task": self.cpus,
            "mem": self.mem,
            "constraint": self.constraint,
        }
        return [f"--{name}={value}" for name, value in named.items() if value is not None] + list(self.more)


@dataclass(frozen=True)
class Service:
    """What runs in the job. options: of `penstock serve`; socket: a unix socket on the node instead of a port.

    modules: lines of shell before anything else (`module load ...`); stage: from the RAM disk of the node.
    """

    model: str
    options: tuple[str, ...]
    key_file: str | None
    host: str
    socket: bool
    drain_seconds: float
    requeue: bool
    stage: bool
    ports: Ports = Ports()
    modules: tuple[str, ...] = ()


def seconds_of(time: str) -> int:
    """Slurm's notation of a time limit in seconds. Raises UsageError."""
    found = duration_seconds(time)
    if not found:
        raise UsageError(
            f"--time {time!r} is not a time limit of Slurm's.",
            "Its forms: MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS, DAYS-HOURS[:MINUTES[:SECONDS]].",
            "For example: --time 3:00:00",
        )
    return found


def warning_seconds(drain_seconds: float, limit: int | None) -> int:
    """How long before its end the job is warned: enough to drain, but never most of its life."""
    wanted = int(drain_seconds) + WARNING_SLACK
    return wanted if limit is None else max(5, min(wanted, limit // 4))


def script(launch: Launch, resources: Resources, service: Service) -> str:
    """The text of the batch script."""
    limit = None if resources.time is None else seconds_of(resources.time)
    flags = [
        f"--job-name=penstock-{launch.name}",
        f"--output={launch.path}/%j.log",
        "--open-mode=append",
        f"--chdir={launch.path}",
        *resources.flags(),
        "--nodes=1",
        "--ntasks=1",
        "--requeue" if service.requeue else "--no-requeue",
        f"--signal=B:USR1@{warning_seconds(service.drain_seconds, limit)}",
        "--export=NONE",
    ]
    lines = [
        "#!/bin/bash",
        f'# The server "{launch.name}" of {_comment(service.model)}. Written by Penstock {__version__}; see it with '
        "`penstock jobs`,",
        f"# end it with `penstock stop {launch.name}`.",
        *(f"#SBATCH {flag}" for flag in flags),
        "",
        "# Nothing of the submitting shell comes along (--export=NONE), but steps of this job shall see what is set here.",
        "export SLURM_EXPORT_ENV=ALL",
        "umask 077",
        "# USR1 warns of the end (time limit, preemption). It is for the keeper below, which lets requests finish.",
        "trap '' USR1",
        f"export PENSTOCK_JOBS_DIR={shlex.quote(str(launch.path.parent.parent))}",
        *(f"export {name}={shlex.quote(os.environ[name])}" for name in CARRIED if os.environ.get(name)),
        *service.modules,
        "",
        *_serving(launch, service),
    ]
    return "\n".join(lines) + "\n"


def _serving(launch: Launch, service: Service) -> list[str]:
    """The lines that start the server under its keeper."""
    python = shlex.quote(sys.executable)
    lines, model = [], shlex.quote(service.model)
    keeper = ["penstock.cluster.keeper", shlex.quote(str(launch.path))]
    named: list[str] = []
    if service.stage:
        lines += [f"staged=$({python} -m penstock.cli.main stage {model}) || exit", ""]
        model = '"$staged"'
        keeper.append('--staged "$staged"')
        if "--served-model-name" not in service.options:
            named = ["--served-model-name", shlex.quote(service.model)]
    if service.socket:
        lines += ['socket=$(mktemp -d "${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/penstock-XXXXXXXX")/server || exit', ""]
        address = '--uds "$socket"'
    else:
        ports = service.ports
        lines += [
            f"# The port: {ports.base} + the last four digits of the job's number; where that is taken, a free one."
        ]
        port = f"--port $(({ports.base} + SLURM_JOB_ID % 10000)) --fallback-ports {ports.low}-{ports.high}"
        address = f'--hostname {shlex.quote(service.host)} {port} --allow-host "$SLURMD_NODENAME"'
    key = "--no-auth" if service.key_file is None else f"--api-key-file {shlex.quote(service.key_file)}"
    options = " ".join([*named, *map(shlex.quote, service.options)])
    served = [address, key, f"--drain-seconds {service.drain_seconds:g}", *([options] if options else [])]
    lines += [f"exec {python} -m {' '.join(keeper)} -- \\", f"  {python} -m penstock.cli.main serve {model} --json \\"]
    return lines + [f"  {line} \\" for line in served[:-1]] + [f"  {served[-1]}"]


def gate_script(launch: Launch, python: str) -> str:
    """A job that succeeds when the server is ready and fails when it never will be."""
    return "\n".join(
        [
            "#!/bin/bash",
            f'# Ends when the server "{launch.name}" takes requests: other jobs wait for it with --dependency=afterok:ID',
            f"#SBATCH --job-name=penstock-{launch.name}-ready",
            f"#SBATCH --output={launch.path}/ready.log",
            f"#SBATCH --chdir={launch.path}",
            "#SBATCH --ntasks=1",
            "#SBATCH --export=NONE",
            "umask 077",
            f"export PENSTOCK_JOBS_DIR={shlex.quote(str(launch.path.parent.parent))}",
            *(f"export {name}={shlex.quote(os.environ[name])}" for name in CARRIED if os.environ.get(name)),
            f"exec {shlex.quote(python)} -m penstock.cli.main url {launch.name} --wait",
            "",
        ]
    )


def sbatch_flags(given: Sequence[str]) -> tuple[str, ...]:
    """What was given with --sbatch, each checked to be one flag. Raises UsageError."""
    for flag in given:
        if not flag.startswith("-") or "\n" in flag:
            raise UsageError(f"--sbatch {flag!r} is not a flag of sbatch.", "", "For example: --sbatch=--mail-type=END")
    return tuple(given)


def _comment(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)
