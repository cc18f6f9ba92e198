"""A process gives up all it does not need: files, sockets, other programs, memory and time without bound.

Entered by a process of ours before it reads what a stranger has written. On Linux the kernel lets only those system
calls through that reading and writing open files needs (seccomp); everywhere, no further file or socket can be opened,
because the table of open files is closed.
"""

from __future__ import annotations

import ctypes
import platform
import resource
import signal
import struct
import sys
from contextlib import suppress

_NO_NEW_PRIVILEGES, _SECCOMP, _FILTER = 38, 22, 2  # of prctl
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06  # classic BPF
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050001, 0x80000000  # _REFUSE: with EPERM
_FOREIGN_ABI = 0x40000000  # numbers of x32 on x86-64
# architecture word, then: read write close fstat lseek mmap mprotect munmap brk rt_sigaction rt_sigprocmask
# rt_sigreturn pread64 pwrite64 writev madvise mremap getpid exit fsync ftruncate gettimeofday sigaltstack futex
# clock_gettime exit_group newfstatat getrandom sched_yield restart_syscall gettid tgkill
_CALLS = {
    "x86_64": (0xC000003E, (0, 1, 3, 5, 8, 9, 10, 11, 12, 13, 14, 15, 17, 18, 20, 28, 25, 39, 60, 74, 77, 96, 131, 202,
                            228, 231, 262, 318, 24, 219, 186, 234)),
    "aarch64": (0xC00000B7, (63, 64, 57, 80, 62, 222, 226, 215, 214, 134, 135, 139, 67, 68, 66, 233, 216, 172, 93, 82,
                             46, 169, 132, 98, 113, 94, 79, 278, 124, 128, 178, 131)),
}  # fmt: skip


def enter(memory: int, seconds: int) -> bool:
    """Close the doors behind this process: `memory` bytes of address space, `seconds` until it is killed.

    Everything it will need must be imported and open. Returns whether the kernel's filter is in force as well.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(seconds)
    for limit, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, 0),  # what is open stays open
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, seconds),
    ):
        with suppress(ValueError, OSError):  # not every system has each
            resource.setrlimit(limit, (value, value))
    return _filter_calls()


def _filter_calls() -> bool:
    machine = platform.machine()
    if sys.platform != "linux" or machine not in _CALLS:
        return False
    architecture, calls = _CALLS[machine]
    program = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    program += [(_AT_LEAST, len(calls), 0, _FOREIGN_ABI)]
    program += [(_EQUAL, len(calls) - i, 0, number) for i, number in enumerate(calls)]
    program += [(_RETURN, 0, 0, _REFUSE), (_RETURN, 0, 0, _ALLOW)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *line) for line in program))
    pointer = struct.pack("@HP", len(program), ctypes.addressof(code))
    library = ctypes.CDLL(None, use_errno=True)
    library.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    if library.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) != 0:
        return False
    header = ctypes.create_string_buffer(pointer)
    return bool(library.prctl(_SECCOMP, _FILTER, ctypes.addressof(header), 0, 0) == 0)


_NETWORK = {"x86_64": (0xC000003E, 41, 317), "aarch64": (0xC00000B7, 198, 277)}  # word, socket, seccomp
_IO_URING_SETUP, _UNIX = 425, 1
_SET_MODE_FILTER, _ALL_THREADS = 1, 1
_FIRST_ARGUMENT = 16  # its place in seccomp_data; the low half on these machines


def leave_network() -> bool:
    """No thread of this process, and no child, opens a socket any more, except to other processes of this machine.

    What is open stays open. Returns whether the kernel sees to it; on other systems nothing is done.
    """
    machine = platform.machine()
    if sys.platform != "linux" or machine not in _NETWORK:
        return False
    architecture, socket, seccomp = _NETWORK[machine]
    refuse, allow = (_RETURN, 0, 0, _REFUSE), (_RETURN, 0, 0, _ALLOW)
    program = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    program += [(_AT_LEAST, 0, 1, _FOREIGN_ABI), refuse]
    program += [(_EQUAL, 0, 1, _IO_URING_SETUP), refuse]
    program += [(_EQUAL, 1, 0, socket), allow, (_LOAD, 0, 0, _FIRST_ARGUMENT), (_EQUAL, 0, 1, _UNIX), allow, refuse]
    code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *line) for line in program))
    pointer = struct.pack("@HP", len(program), ctypes.addressof(code))
    library = ctypes.CDLL(None, use_errno=True)
    library.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    if library.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) != 0:
        return False
    library.syscall.argtypes, library.syscall.restype = [ctypes.c_long, *[ctypes.c_ulong] * 3], ctypes.c_long
    header = ctypes.create_string_buffer(pointer)
    return bool(library.syscall(seccomp, _SET_MODE_FILTER, _ALL_THREADS, ctypes.addressof(header)) == 0)
