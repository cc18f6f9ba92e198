"""The key of a server on this machine, found without the user naming it.

A server keeps its key in `HOST-PID.key` (see server/key.py). A key is only sent to the process that made it: on a
shared machine somebody else may listen on the port by now, and would be happy to learn it.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

from penstock.errors import EnvironmentFault

_LISTEN = "0A"  # state in /proc/net/tcp
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def read_key(file: Path) -> str:
    """The first key in a key file. Raises EnvironmentFault."""
    try:
        lines = file.expanduser().read_text(encoding="ascii").split()
    except OSError as error:
        raise EnvironmentFault(f"The key file {file} cannot be read: {error.strerror}.") from None
    except ValueError:
        lines = []
    if not lines:
        raise EnvironmentFault(f"The key file {file} holds no key.", "", "Give the file that the server printed.")
    return lines[0]


def key_of_socket(path: str) -> str | None:
    """The key of the server of ours that listens at a unix socket, None if there is none."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
            peer.settimeout(5)
            peer.connect(path)
            raw = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    except OSError:
        return None  # the request itself will say what is wrong
    pid, uid, _gid = struct.unpack("3i", raw)
    return _key_of(pid) if uid == os.getuid() else None


def key_of_port(host: str, port: int) -> str | None:
    """The key of the server of ours that listens at a loopback port, None if there is none."""
    if host not in _LOOPBACK:
        return None
    sockets = {f"socket:[{inode}]" for inode in _listeners(port)}
    if not sockets:
        return None
    for file in _key_files():
        pid = file.stem.rpartition("-")[2]
        if pid.isdigit() and sockets & set(_links(Path("/proc") / pid / "fd")):
            return read_key(file)
    return None


def _listeners(port: int) -> Iterator[str]:
    """Inodes of the sockets that this user listens with at a port."""
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            local, state, uid, inode = fields[1], fields[3], fields[7], fields[9]
            if state == _LISTEN and int(local.rpartition(":")[2], 16) == port and int(uid) == os.getuid():
                yield inode


def _links(folder: Path) -> Iterator[str]:
    try:
        for entry in os.listdir(folder):
            try:
                yield os.readlink(folder / entry)
            except OSError:  # closed in between
                continue
    except OSError:  # the process is gone, or not ours
        return


def _key_of(pid: int) -> str | None:
    return next((read_key(f) for f in _key_files() if f.stem.rpartition("-")[2] == str(pid)), None)


def _key_files() -> list[Path]:
    """The key files that servers of this user made on this machine."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    folders = [Path(runtime) / "penstock"] if runtime else []
    folders.append(Path("~/.config/penstock/keys").expanduser())
    host = socket.gethostname()
    return [file for folder in folders for file in sorted(folder.glob("*.key")) if file.name.startswith(f"{host}-")]
