"""This machine as something to plan for: its cards where it has any, else its processors, measured in a second."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace

from penstock.devices.memory import available_bytes
from penstock.devices.probe import MachineLimits, measure
from penstock.errors import UsageError
from penstock.plan.hardware import CPU_RUNTIME, CPU_TYPE_SHARE, Device, gpu, known_gpus

PROBE_SECONDS = 0.4  # for each quantity
# Fitted on this engine with the shapes of benchmarks/plan.py, of 4 to 1236 million parameters. A layer takes as long as
# so many calls of the probe, and each row of a step: numbers that suit 61 runs of 8 of the shapes, in bfloat16 and
# int8, of one row and eight, while a call took 3 to 6.5 us and memory gave 31 to 65 GB/s; 59 came within 25 %.
READ_SHARE, COMPUTE_SHARE, PROMPT_SHARE, OVERLAP_LOSS = 0.92, 0.6, 0.8, 0.15
LAYER_CALLS, ROW_CALLS = 24, 6


def measured_processors() -> Device:
    """The processors of this machine, measured now. Raises EnvironmentFault when that fails."""
    return processors(measure(seconds=PROBE_SECONDS))


def processors(limits: MachineLimits) -> Device:
    """The processors of this machine as measured. flops are those of large square products, which a step's
    few rows do not reach and a prompt's many nearly do."""
    return Device(
        name="here",
        title=f"this machine, {limits.threads} threads, {limits.read_bytes_per_second / 1e9:.0f} GB/s",
        memory=available_bytes(),
        bandwidth=limits.read_bytes_per_second,
        flops=limits.flops,
        read_share=READ_SHARE,
        compute_share=COMPUTE_SHARE,
        prompt_share=PROMPT_SHARE,
        layer_seconds=LAYER_CALLS * limits.call_seconds,
        row_seconds=ROW_CALLS * limits.call_seconds,
        overlap_loss=OVERLAP_LOSS,
        runtime=CPU_RUNTIME,
        is_cpu=True,
        type_share=CPU_TYPE_SHARE,
    )


def cards() -> tuple[Device, int] | None:
    """The NVIDIA cards that nvidia-smi lists, with the memory that is free on the first; None without any."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.count(",") == 2]
    if done.returncode != 0 or not rows or not rows[0][1].isdigit():
        return None
    name, total, free = rows[0]
    device = _named(name, int(total) / 1024)
    return (replace(device, memory=int(free) * 2**20), len(rows)) if device else None


def _named(name: str, gib: float) -> Device | None:
    """The card of the table whose kind is in the driver's name and whose memory is nearest."""
    words = name.lower().replace("-", " ").split()
    fitting: list[Device] = []
    for key in known_gpus():
        if ":" not in key and key.partition("-")[0] in words:
            try:
                fitting.append(gpu(key))
            except UsageError:
                continue
    return min(fitting, key=lambda device: abs(device.memory / 2**30 - gib), default=None)
