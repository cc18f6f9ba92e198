"""The C allocator, told to keep what is freed."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h


def keep_freed_memory() -> bool:
    """Let glibc reuse large freed buffers instead of returning them to the system. Returns whether it obeyed.

    By default every intermediate result above 32 MiB is mapped, faulted in page by page, and unmapped again: on
    virtual machines a step spends more time in page faults than in arithmetic outside its matrix products.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    obeyed = True
    for parameter, value in ((_M_MMAP_THRESHOLD, 2**30), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 * 2**20)):
        obeyed &= bool(mallopt(parameter, value))
    return obeyed
