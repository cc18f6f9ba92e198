"""A conversation with a server in a Slurm job, which may move to another node between two questions."""

from __future__ import annotations

import http.client
import sys
import time
from typing import Any

from penstock.cli.chat_remote import Server
from penstock.cluster import fleet, tunnel
from penstock.errors import EnvironmentFault, PenstockError

PATIENCE = 600.0  # seconds that a question waits for a server that moves, starts or drains


class JobServer(Server):
    """The server of a name: looked for anew whenever the last one does not take the question."""

    def __init__(self, name: str, key_file: str | None = None, through_tunnel: bool = False) -> None:
        self._name, self._own_key_file, self._tunnelled = name, key_file, through_tunnel
        self._tunnel: tunnel.Tunnel | None = None
        self._find()

    def send(self, method: str, path: str, body: Any = None) -> http.client.HTTPResponse:
        """The response to one request. Raises EnvironmentFault when no server takes it for long."""
        end, told = time.monotonic() + PATIENCE, False
        while True:
            problem: EnvironmentFault
            try:
                response = super().send(method, path, body)
                if response.status != 503:
                    return response
                response.read()
                problem = EnvironmentFault(f"The server {self._name!r} does not take requests now.")
            except EnvironmentFault as error:
                problem = error
            if time.monotonic() > end or not self._may_come():
                raise problem
            if not told:
                print(f"{self._name} is away for a moment (moving, starting or draining): waiting", file=sys.stderr)
                told = True
            time.sleep(1)
            try:
                self._find()
            except PenstockError:
                continue

    def _find(self) -> None:
        target = fleet.find(self._name, fleet.ask_slurm())
        key_file = self._own_key_file or target.server.key_file
        if target.reached and not self._tunnelled:
            address = target.endpoint
            super().__init__(None if address.socket else f"http://{address}", address.socket, key_file)
        else:
            if self._tunnel is None:
                self._tunnel = tunnel.Tunnel(self._name, 0, lambda line: print(f"tunnel: {line}", file=sys.stderr))
                self._tunnel.start()
            super().__init__(self._tunnel.url, None, key_file)
        self.shown = f"{self._name} ({target.server.url or target.server.socket})"

    def _may_come(self) -> bool:
        return any(server.alive for server in fleet.servers(fleet.launch_of(self._name), fleet.ask_slurm()))
