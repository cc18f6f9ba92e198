"""What counts as free memory."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from penstock.devices import memory

MIB = 2**20


@pytest.mark.parametrize(
    ("lines", "used"),
    [
        ("anon 100\nactive_file 30\ninactive_file 20\nfile_mapped 10\n", 160),  # version 2
        ("active_file 1\ninactive_file 1\nmapped_file 1\ntotal_active_file 30\ntotal_inactive_file 20\n"
         "total_mapped_file 10\n", 160),  # version 1
        ("active_file 5\ninactive_file 5\nfile_mapped 50\n", 200),
        ("active_file 300\ninactive_file 300\nfile_mapped 0\n", 0),
        ("nonsense", 200),
    ],
)  # fmt: skip
def test_files_that_nobody_has_mapped_are_free(lines: str, used: int, tmp_path: Path) -> None:
    (tmp_path / "memory.stat").write_text(lines)
    assert memory._working_set(tmp_path, 200) == used


def test_mapped_weights_are_not_free_memory(tmp_path: Path) -> None:
    """The system counts a file's pages as available whether somebody computes with them or not."""
    size = 512 * MIB
    file = tmp_path / "weights"
    with file.open("wb") as out:
        for _ in range(size // MIB):
            out.write(bytes(MIB))
    before = memory._meminfo()
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), size, prot=mmap.PROT_READ) as pages:
        for offset in range(0, size, mmap.PAGESIZE):
            pages[offset]
        assert memory._meminfo() < before - size // 2
    assert memory._meminfo() > before - size // 2
