"""A fixed address on this machine for a server in a job, wherever it runs and however this machine can reach it.

Connections go over TCP where the node's port can be reached, else through `srun` into the job (which needs neither ssh
nor an open port), or, when asked for, through one ssh. The tunnel follows the name: each connection looks anew for the
server that is ready, so renewals and requeues move it along.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from penstock.cluster import fleet, relay, slurm, web
from penstock.cluster.fleet import Server, Target
from penstock.errors import EnvironmentFault, PenstockError

FRESH = 5.0  # seconds that a found server is not looked for again
PATIENCE = 300.0  # seconds that a connection waits while the server moves
CHUNK = 65536


class Tunnel:
    """A listening socket on loopback whose connections reach the server of a name."""

    def __init__(self, name: str, port: int, say: Callable[[str], None]) -> None:
        """port 0: a free one. Raises EnvironmentFault when it is taken."""
        self._name, self._say = name, say
        self._lock = threading.Lock()
        self._target: tuple[Target, float] | None = None
        self._listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._listener.bind(("127.0.0.1", port))
            self._listener.listen(128)
        except OSError as error:
            self._listener.close()
            raise EnvironmentFault(
                f"Port {port} of this machine cannot be used: {error.strerror}.",
                hint="Leave --port out for a free one.",
            ) from error
        self.port = int(self._listener.getsockname()[1])

    @property
    def url(self) -> str:
        """What clients on this machine are given."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Carry connections in the background until `close`."""
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._carry, args=(client,), daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _carry(self, client: socket.socket) -> None:
        with client:
            try:
                target = self._find()
                if not target.reached:
                    _through_srun(target.server, client)
                    return
                try:
                    peer = _dial(target.endpoint)
                except OSError:  # gone since we looked: it may have moved
                    self._forget()
                    peer = _dial(self._find().endpoint)
                with peer:
                    _join(client, peer)
            except (OSError, PenstockError) as error:
                self._forget()
                self._say(f"a connection failed: {str(error).splitlines()[0]}")

    def _find(self) -> Target:
        """The server that is ready now; waits while there is none but one may come."""
        with self._lock:
            if self._target is not None and time.monotonic() - self._target[1] < FRESH:
                return self._target[0]
            end = time.monotonic() + PATIENCE
            while True:
                try:
                    target = fleet.find(self._name, fleet.ask_slurm())
                except PenstockError:
                    if time.monotonic() > end or not _may_come(self._name):
                        raise
                    time.sleep(1)
                    continue
                self._moved(target)
                self._target = (target, time.monotonic())
                return target

    def _moved(self, target: Target) -> None:
        before = None if self._target is None else self._target[0].server
        if before is None or (before.job, before.node, before.port) != (
            target.server.job,
            target.server.node,
            target.server.port,
        ):
            how = "" if target.reached else ", through srun"
            self._say(f"to job {target.server.job} on {target.server.node}{how}")

    def _forget(self) -> None:
        with self._lock:
            self._target = None


def ssh_line(server: Server, port: int, login: str) -> list[str]:
    """What a user types on a laptop: `ssh -N -L ...` by way of the login node."""
    port = port or server.port or 3000
    if server.socket is not None:
        return ["ssh", "-N", "-J", login, "-L", f"{port}:{server.socket}", server.node]
    if server.host in ("127.0.0.1", "localhost", "::1"):
        return ["ssh", "-N", "-J", login, "-L", f"{port}:localhost:{server.port}", server.node]
    return ["ssh", "-N", "-L", f"{port}:{server.host}:{server.port}", login]


def ssh_to_node(server: Server, port: int) -> list[str]:
    """The ssh of a tunnel from this machine straight to the node."""
    target = server.socket or f"localhost:{server.port}"
    return ["ssh", "-N", "-o", "ExitOnForwardFailure=yes", "-L", f"127.0.0.1:{port}:{target}", server.node]


def shown(line: list[str]) -> str:
    """A command as one types it."""
    return " ".join(map(shlex.quote, line))


def srun_relay(server: Server) -> list[str]:
    """The command that joins its standard streams with a server, from inside its job."""
    where = server.socket or f"127.0.0.1:{server.port}"
    return [
        "srun", f"--jobid={server.job}", "--overlap", "--nodes=1", "--ntasks=1", "--mpi=none", "--quiet", "--export=NONE",
        "--unbuffered", sys.executable, "-I", str(Path(relay.__file__)), where,
    ]  # fmt: skip


def _through_srun(server: Server, client: socket.socket) -> None:
    """One connection as one step of the server's job. The socket is the step's standard input and output."""
    if not slurm.available("srun"):
        raise EnvironmentFault(f"{server.node} cannot be reached from here, and there is no srun.")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_") or k == "SLURM_CONF"}
    with client.makefile("rwb", buffering=0) as stream:
        done = subprocess.run(
            srun_relay(server), stdin=stream, stdout=stream, stderr=subprocess.PIPE, env=environment, check=False
        )
    if done.returncode != 0:
        raise EnvironmentFault(
            done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:][0][:200] or "srun failed"
        )


def _may_come(name: str) -> bool:
    return any(server.alive for server in fleet.servers(fleet.launch_of(name), fleet.ask_slurm()))


def _dial(endpoint: web.Endpoint) -> socket.socket:
    if endpoint.socket is None:
        return socket.create_connection((endpoint.host, endpoint.port), timeout=10)
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    peer.settimeout(10)
    peer.connect(endpoint.socket)
    return peer


def _join(one: socket.socket, other: socket.socket) -> None:
    """Bytes both ways until both ends are done, or one breaks."""
    other.settimeout(None)
    back = threading.Thread(target=_pump, args=(other, one), daemon=True)
    back.start()
    _pump(one, other)
    back.join()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(CHUNK):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
