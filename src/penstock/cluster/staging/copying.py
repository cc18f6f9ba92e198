"""The two ways a leader gets pieces of a model: from the shared file system, or from another leader."""

from __future__ import annotations

import contextlib
import hmac
import os
import socket
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from penstock.cluster.staging.manifest import Manifest, Piece

READERS = 4  # parallel file systems serve several readers of one node faster than one
CHUNK = 2**20  # bytes: stays in the cache of a core between receiving, sending on and writing
CONNECT_SECONDS, SILENCE_SECONDS = 5.0, 60.0


def create_files(manifest: Manifest, folder: Path) -> None:
    """Empty files of the full size. Raises OSError."""
    for name, size in zip(manifest.names, manifest.sizes, strict=True):
        descriptor = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        os.ftruncate(descriptor, size)
        os.close(descriptor)


def copy_direct(manifest: Manifest, pieces: Sequence[Piece], folder: Path) -> None:
    """Read pieces from the shared file system, some side by side. Raises OSError."""

    def one(piece: Piece) -> None:
        with (
            open(manifest.sources[piece.file], "rb", buffering=0) as source,
            open(folder / manifest.names[piece.file], "r+b", buffering=0) as sink,
        ):
            os.posix_fadvise(source.fileno(), piece.offset, piece.length, os.POSIX_FADV_SEQUENTIAL)
            sink.seek(piece.offset)
            done = 0
            while done < piece.length:  # in the kernel, without a copy through this process
                count = os.sendfile(sink.fileno(), source.fileno(), piece.offset + done, piece.length - done)
                if count == 0:
                    raise OSError(5, "the file has become shorter", manifest.sources[piece.file])
                done += count

    with ThreadPoolExecutor(min(READERS, os.cpu_count() or 1)) as pool:
        list(pool.map(one, pieces))


class Post:
    """A leader's place in a tree of leaders: a listening socket for those below it."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("", 0), backlog=128)
        self._listener.settimeout(SILENCE_SECONDS)

    @property
    def port(self) -> int:
        """Where those below connect."""
        return int(self._listener.getsockname()[1])

    def accept(self, count: int, token: str) -> list[socket.socket]:
        """So many leaders below us; whoever does not know the token is sent away. Raises OSError."""
        found: list[socket.socket] = []
        while len(found) < count:
            peer, _ = self._listener.accept()
            peer.settimeout(CONNECT_SECONDS)
            try:
                known = hmac.compare_digest(_exactly(peer, len(token)), token.encode())
            except OSError:
                known = False
            if known:
                peer.sendall(b"+")
                peer.settimeout(SILENCE_SECONDS)
                found.append(peer)
            else:
                peer.close()
        return found

    def close(self) -> None:
        """Nobody comes any more."""
        self._listener.close()


def join(addresses: Sequence[str], port: int, token: str) -> socket.socket:
    """A connection to the leader above, at the first of its addresses where it answers. Raises OSError."""
    problem: OSError = ConnectionError("the leader above has no address")
    for address in addresses:
        try:
            peer = socket.create_connection((address, port), timeout=CONNECT_SECONDS)
        except OSError as error:
            problem = error
            continue
        try:
            peer.sendall(token.encode())
            if _exactly(peer, 1) == b"+":
                peer.settimeout(SILENCE_SECONDS)
                return peer
        except OSError as error:
            problem = error
        peer.close()
    raise problem


def copy_relayed(
    manifest: Manifest,
    pieces: Sequence[Piece],
    folder: Path,
    above: socket.socket | None,
    below: Sequence[socket.socket],
) -> None:
    """Pieces from the leader above (None: from the shared file system), passed on to those below while they come.

    Raises OSError.
    """
    buffer = memoryview(bytearray(CHUNK))
    for piece in pieces:
        with contextlib.ExitStack() as files:
            sink = files.enter_context(open(folder / manifest.names[piece.file], "r+b", buffering=0))
            sink.seek(piece.offset)
            source = None
            if above is None:
                source = files.enter_context(open(manifest.sources[piece.file], "rb", buffering=0))
                source.seek(piece.offset)
            left = piece.length
            while left:
                wanted = buffer[: min(left, CHUNK)]
                count = source.readinto(wanted) if source is not None else _receive(above, wanted)
                if not count:
                    raise ConnectionError("the stream ended too early")
                chunk = buffer[:count]
                for peer in below:
                    peer.sendall(chunk)
                while chunk:
                    chunk = chunk[sink.write(chunk) :]
                left -= count
    for peer in below:
        peer.shutdown(socket.SHUT_WR)


def checksum(file: str | Path, piece: Piece) -> int:
    """CRC-32 of a piece as it lies on disk. Raises OSError."""
    value, buffer = 0, memoryview(bytearray(CHUNK))
    with open(file, "rb", buffering=0) as stream:
        stream.seek(piece.offset)
        left = piece.length
        while left:
            count = stream.readinto(buffer[: min(left, CHUNK)])
            if not count:
                raise OSError(5, "the file is too short", str(file))
            value = zlib.crc32(buffer[:count], value)
            left -= count
    return value


def _receive(peer: socket.socket | None, into: memoryview) -> int:
    return 0 if peer is None else peer.recv_into(into)


def _exactly(peer: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = peer.recv(count - len(data))
        if not more:
            raise ConnectionError("the connection closed")
        data += more
    return data
