"""The one socket that the server listens on: a TCP port or a unix socket."""

from __future__ import annotations

import errno
import os
import shlex
import socket
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

from penstock.errors import EnvironmentFault
from penstock.server.config import ServeConfig

BACKLOG = 2048
MAX_UDS_PATH = 107  # bytes that the kernel takes


class Listener:
    """A bound socket. `url` is where clients on this machine find it; close() removes what we made."""

    def __init__(self, sock: socket.socket, url: str, model: str, uds: Path | None = None) -> None:
        self.socket, self.url, self.uds = sock, url, uds
        self._model = model
        self._inode = uds.lstat().st_ino if uds is not None else None

    @property
    def port(self) -> int | None:
        """None for a unix socket."""
        return None if self.uds is not None else int(self.socket.getsockname()[1])

    def listen(self) -> None:
        """Let clients connect. Raises EnvironmentFault when somebody else has come first."""
        try:
            self.socket.listen(BACKLOG)
        except OSError as error:
            raise _cannot(self.url, error, self._model) from error

    def close(self) -> None:
        """Close the socket and remove its file, if it is still ours."""
        self.socket.close()
        if self.uds is not None:
            with suppress(OSError):
                if self.uds.lstat().st_ino == self._inode:
                    self.uds.unlink()


def bind(config: ServeConfig) -> Listener:
    """Take the port or the path before anything slow happens. Raises EnvironmentFault when it is taken."""
    if config.uds is not None:
        return _bind_uds(config.uds)
    return _bind_tcp(config.host, config.port, config.fallback_ports, config.model)


def _bind_tcp(host: str, port: int, fallback: tuple[int, int] | None, model: str) -> Listener:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise EnvironmentFault(
            f"There is no address for the host name {host!r}.",
            hint="Use --hostname 127.0.0.1 for this machine only, 0.0.0.0 for every interface.",
        ) from error
    sock = socket.socket(family, kind, protocol)
    try:
        if fallback is not None:
            _bind_one_of(sock, address, fallback)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
    except OSError as error:
        sock.close()
        raise _cannot(f"{host}:{port}", error, model) from error
    sock.setblocking(False)
    shown = f"[{host}]" if ":" in host else host
    return Listener(sock, f"http://{shown}:{sock.getsockname()[1]}", model)


def _bind_one_of(sock: socket.socket, address: tuple[Any, ...], fallback: tuple[int, int]) -> None:
    """The address, or the first port of the range that is free. Raises the first OSError when none is.

    Without SO_REUSEADDR, so that a port is either ours or refused now: with it, two sockets may be bound to one port,
    and the later `listen` fails.
    """
    host, first, *rest = address
    problem: OSError | None = None
    for port in (first, *range(fallback[0], fallback[1] + 1)):
        try:
            return sock.bind((host, port, *rest))
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            problem = problem or error
    if problem is not None:
        raise problem


def _cannot(where: str, error: OSError, model: str) -> EnvironmentFault:
    if error.errno == errno.EADDRINUSE:
        return EnvironmentFault(
            f"{where.removeprefix('http://')} is in use by another program.",
            hint=f"This takes a free port: penstock serve {shlex.quote(model)} --port 0",
        )
    if error.errno == errno.EACCES:
        return EnvironmentFault(
            f"This user may not listen on {where}.", hint="Ports below 1024 belong to root; try --port 3000."
        )
    return EnvironmentFault(f"Cannot listen on {where}: {error.strerror}.", hint="Try --hostname 127.0.0.1.")


def _bind_uds(path: str) -> Listener:
    file = Path(path).expanduser().absolute()
    if len(os.fsencode(file)) > MAX_UDS_PATH:
        raise EnvironmentFault(
            f"The path of the unix socket is longer than {MAX_UDS_PATH} bytes.",
            hint="Use a shorter one, such as --uds $XDG_RUNTIME_DIR/penstock.sock",
        )
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_directory(file.parent)
        _remove_dead(file)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)  # the socket is ours alone from its first moment
        try:
            sock.bind(str(file))
        finally:
            os.umask(before)
    except OSError as error:
        raise EnvironmentFault(f"The unix socket {file} cannot be made: {error.strerror}.") from error
    sock.setblocking(False)
    return Listener(sock, "http://localhost", "", file)


def _check_directory(directory: Path) -> None:
    found = directory.stat()
    if found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX:
        raise EnvironmentFault(
            f"Other users can write to {directory}, so they could replace the socket.",
            hint=f"chmod go-w {directory}, or name a socket in a directory of yours.",
        )


def _remove_dead(file: Path) -> None:
    """Make way: a socket that nobody listens on is removed, anything else refused."""
    try:
        mode = file.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise EnvironmentFault(f"{file} exists and is not a socket.", hint="Name another path with --uds.")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(file))
        except ConnectionRefusedError:
            file.unlink()
            return
        except OSError:
            pass
    raise EnvironmentFault(f"Another server listens on {file}.", hint="Name another path with --uds.")
