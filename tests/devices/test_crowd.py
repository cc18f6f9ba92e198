"""Fewer threads beside a busy neighbour, with a real one."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from penstock.devices.crowd import Crowd


def watched(crowd: Crowd, seconds: float) -> list[int]:
    """What it asks for while this process computes on one core."""
    asked: list[int] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end and not asked:
        crowd.adjust(asked.append)
        sum(range(1000))
    return asked


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs Linux's /proc")
def test_a_busy_neighbour_takes_a_thread() -> None:
    cores = sorted(os.sched_getaffinity(0))
    neighbours = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in cores[1:] or cores]
    try:
        asked = watched(Crowd(len(cores) + 1), 20)
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()
    assert asked
    assert 1 <= asked[0] <= len(cores)


def test_one_thread_stays_one_thread() -> None:
    assert watched(Crowd(1), 1) == []
