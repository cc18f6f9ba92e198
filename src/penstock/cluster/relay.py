"""Joins its standard streams with a server on this node: what `srun` runs for one connection of a tunnel.

    python relay.py HOST:PORT | /PATH/OF/SOCKET

Stands alone, so that it starts in milliseconds: nothing of Penstock is imported.
"""

import os
import selectors
import socket
import sys

CHUNK = 65536


def connect(where: str) -> socket.socket:
    """A connection to HOST:PORT or to a unix socket. Raises OSError."""
    if where.startswith("/"):
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        peer.connect(where)
        return peer
    host, _, port = where.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=10)


def relay(peer: socket.socket, source: int, sink: int) -> None:
    """Bytes both ways until the server closes. The end of `source` is passed on, and the answer still comes."""
    peer.settimeout(None)
    watched = selectors.DefaultSelector()
    watched.register(peer, selectors.EVENT_READ)
    watched.register(source, selectors.EVENT_READ)
    while True:
        for key, _ in watched.select():
            if key.fileobj is peer:
                data = peer.recv(CHUNK)
                if not data:
                    return
                while data:
                    data = data[os.write(sink, data) :]
            else:
                data = os.read(source, CHUNK)
                if data:
                    peer.sendall(data)
                else:
                    watched.unregister(source)
                    peer.shutdown(socket.SHUT_WR)


def main() -> int:
    """The command: 0 when the connection ended, 1 when there was none."""
    try:
        relay(connect(sys.argv[1]), 0, 1)
    except OSError as error:
        print(f"relay: {sys.argv[1]}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
