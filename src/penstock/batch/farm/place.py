"""Who and where this process is, in words that other nodes can check."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from penstock.batch.farm.journal import Place
from penstock.devices.threads import usable_cores


def here(rank: int = 0, partition: str | None = None) -> Place:
    """The place of this process, from Slurm's variables where there are any."""
    env = os.environ
    return Place(
        node=env.get("SLURMD_NODENAME") or socket.gethostname(),
        host=host_id(),
        process=process_id(os.getpid()) or str(os.getpid()),
        partition=partition or env.get("SLURM_JOB_PARTITION") or "local",
        job=job_id(),
        restart=_number(env.get("SLURM_RESTART_COUNT"), 0),
        rank=rank,
        cpus=_number(env.get("SLURM_CPUS_PER_TASK"), usable_cores()),
        gpus=len(visible_cards()),
    )


def visible_cards() -> list[str]:
    """The cards that this process was given, as CUDA_VISIBLE_DEVICES names them; none where it says nothing."""
    return [card for card in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if card.strip() not in ("", "-1")]


def job_id() -> str | None:
    """What squeue calls the job that this process runs in: 17, or 17_3 for an element of an array."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def host_id() -> str:
    """The same for two processes exactly when each can see whether the other runs."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()}/{os.getsid(0)}"


def process_id(pid: int) -> str | None:
    """A process by id and start time, so that a reused id does not pass for it; None when it is gone or a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return None
    except OSError:
        return str(pid)
    fields = text[text.rindex(")") + 2 :].split()
    return None if fields[0] in ("Z", "X") else f"{pid}@{fields[19]}"


def process_runs(process: str) -> bool:
    """Whether a process of this host, as `process_id` named it, still runs."""
    pid = int(process.partition("@")[0])
    return process_id(pid) == process


def _number(text: str | None, default: int) -> int:
    return int(text) if text and text.isdecimal() else default
