"""Processes that keep to some processors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.devices import places
from penstock.errors import UsageError
from tests.process import check_error, penstock

SHOW = (
    "import os, sys; from penstock.devices.places import keep_to; keep_to(sys.argv[1]);"
    "print(sorted(os.sched_getaffinity(0)))"
)


def kept(text: str) -> list[int]:
    """The processors of a process that keeps to `text`."""
    shown = subprocess.run([sys.executable, "-c", SHOW, text], stdout=subprocess.PIPE, check=True).stdout
    return [int(number) for number in shown.decode().strip()[1:-1].split(",")]


def test_lists_and_nodes() -> None:
    assert places.parse("0-3,8,10-10") == {0, 1, 2, 3, 8, 10}
    ours = sorted(os.sched_getaffinity(0))
    assert kept(str(ours[0])) == ours[:1]
    assert kept(f"{ours[0]}-{ours[-1]},4000") == ours
    for number, cpus in places.nodes().items():
        if cpus & set(ours):
            assert kept(f"node{number}") == sorted(cpus & set(ours))


def test_memory_comes_from_the_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nodes, as the system would tell of them: the processors of the first, and a preference for its memory."""
    ours = os.sched_getaffinity(0)
    for number, cpus in ((0, ours), (1, {max(ours) + 1})):
        (tmp_path / f"node{number}").mkdir()
        (tmp_path / f"node{number}" / "cpulist").write_text(",".join(map(str, cpus)) + "\n")
    monkeypatch.setattr(places, "_NODES", tmp_path)
    code = (
        "import sys; from pathlib import Path; from penstock.devices import places; places._NODES = Path(sys.argv[1]);"
        "places.keep_to('node0'); print(open('/proc/self/numa_maps').readline())"
    )
    if not Path("/proc/self/numa_maps").exists():
        pytest.skip("this kernel knows nothing of nodes of memory")
    shown = subprocess.run([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, check=True).stdout
    assert b"prefer" in shown
    with pytest.raises(UsageError, match="None of the processors"):
        places.keep_to("node1")


@pytest.mark.parametrize("text", ["", "a", "3-1", "0-", "-1", "1,,2", "99999999999", "nodex", "node77"])
def test_mistakes(text: str) -> None:
    with pytest.raises(UsageError) as error:
        places.keep_to(text)
    assert error.value.exit_code == 2


def test_the_option(tmp_path: Path) -> None:
    first = min(os.sched_getaffinity(0))
    done = penstock(
        "bench", "static", "demo", "-b", "1", "-r", "1", "--no-limits", "--json", "--cpus", str(first), home=tmp_path
    )
    assert done.returncode == 0, done.stderr
    check_error(penstock("generate", "demo", "--cpus", "x", home=tmp_path), 2, "no list of processors")
