"""One file from the hub to the disk: resumed where it stopped, its hash checked before it gets its name."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.errors import EnvironmentFault, ModelError
from penstock.hub.claim import Claim, claimed

CHUNK = 2**20
TRIES = 6  # in a row without a byte of progress
PART = ".part"


@dataclass(frozen=True)
class RemoteFile:
    """A file of one commit. sha256: of large files (LFS), by the hub's own record; oid: git's SHA-1 of the others."""

    name: str
    size: int
    sha256: str | None
    oid: str

    @property
    def blob(self) -> str:
        """Its name in the hub cache."""
        return self.sha256 or self.oid


class Stopped(Exception):
    """The user wants to stop; what is there stays for the next time."""


@dataclass
class Meter:
    """Bytes of a whole download, counted by all of its threads. fetched: over the network by this process."""

    total: int
    done: int = 0
    fetched: int = 0
    waiting: str = ""
    stop: bool = False

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self.since = time.monotonic()

    def add(self, n: int, network: bool = True) -> None:
        """Count bytes. Raises Stopped."""
        if self.stop:
            raise Stopped
        with self._lock:
            self.done += n
            self.fetched += n if network else 0

    @property
    def rate(self) -> float:
        """Bytes a second over the network since the start."""
        return self.fetched / max(time.monotonic() - self.since, 1e-9)


def fetch(client: Any, url: str, headers: dict[str, str], file: RemoteFile, target: Path, meter: Meter) -> None:
    """Bring `file` to `target`, unless it is there. What an interrupted run left in `target.part` is used.

    client: an httpx client. Raises ModelError when the content is twice not what the hub says it is, OSError, and what
    the client raises.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + PART)

    def elsewhere() -> None:
        meter.waiting = file.name
        if meter.stop:
            raise Stopped

    with claimed(part.with_name(part.name + ".claim"), target.exists, elsewhere) as claim:
        meter.waiting = ""
        if claim is None:
            meter.add(file.size, network=False)
            return
        for _ in range(2):
            counted = meter.done
            if _transfer(client, url, headers, file, part, meter, claim):
                with part.open("rb") as stream:
                    os.fsync(stream.fileno())
                part.replace(target)
                return
            part.unlink(missing_ok=True)
            meter.add(counted - meter.done, network=False)
    raise ModelError(
        f"The file {file.name} arrived twice with a content that is not the one the hub records.",
        "A proxy on the way may change it, or the hub's copy is damaged.",
        "Try again later, or from another network.",
    )


def _transfer(
    client: Any, url: str, headers: dict[str, str], file: RemoteFile, part: Path, meter: Meter, claim: Claim
) -> bool:
    """Complete the partial file; whether its content is right."""
    from huggingface_hub.utils import hf_raise_for_status

    digest = _Digest(file)
    start = part.stat().st_size if part.exists() else 0
    if start > file.size:
        part.unlink()
        start = 0
    for block in _blocks(part) if start else ():
        digest.update(block)
        meter.add(len(block), network=False)
        claim.beat()
    etag, failures = "", 0
    with part.open("ab") as out:
        while out.tell() < file.size or (file.size == 0 and not etag):
            before = out.tell()
            ask = {**headers, "Accept-Encoding": "identity", **({"Range": f"bytes={before}-"} if before else {})}
            try:
                with client.stream("GET", url, headers=ask, follow_redirects=True, timeout=30.0) as answer:
                    hf_raise_for_status(answer)
                    etag = answer.headers.get("ETag", etag).strip('"').removeprefix("W/").strip('"') or "-"
                    if before and answer.status_code != 206:  # the server does not do ranges: from the beginning
                        meter.add(-before, network=False)
                        out.truncate(0)
                        digest = _Digest(file)
                    for block in answer.iter_raw():  # as they come: a larger piece would be lost when the line breaks
                        out.write(block)
                        digest.update(block)
                        meter.add(len(block))
                        claim.beat()
            except Exception as error:
                out.flush()
                if not _worth_retrying(error):
                    raise
                failures = 1 if out.tell() > before else failures + 1
                if failures >= TRIES:
                    raise
                time.sleep(min(2.0**failures / 4, 20.0))
                continue
            out.flush()
            if out.tell() > file.size or (out.tell() < file.size and out.tell() <= before):
                return False
    return digest.matches(etag)


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        while block := stream.read(CHUNK):
            yield block


def _worth_retrying(error: Exception) -> bool:
    """Whether the network broke, or the hub is busy; not a refusal, a full disk, or the user's wish to stop."""
    response = getattr(error, "response", None)
    if response is not None:
        return getattr(response, "status_code", 0) in (408, 429, 500, 502, 503, 504)
    return not isinstance(error, OSError | Stopped | EnvironmentFault)


class _Digest:
    """The hashes by which the hub knows a file."""

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self._git = None if file.sha256 else hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)

    def update(self, block: bytes) -> None:
        self._sha256.update(block)
        if self._git is not None:
            self._git.update(block)

    def matches(self, etag: str = "") -> bool:
        """Against the hub's record; small files may also be named by the server's tag of just this answer."""
        mine = self._sha256.hexdigest()
        if self._file.sha256:
            return mine == self._file.sha256
        return self._git is not None and (self._git.hexdigest() == self._file.oid or mine == etag)


def verify(path: Path, file: RemoteFile, beat: Callable[[int], None]) -> bool:
    """Whether a file on the disk is the one that the hub records. beat: called with the bytes read so far."""
    if path.stat().st_size != file.size:
        return False
    digest = _Digest(file)
    for block in _blocks(path):
        digest.update(block)
        beat(len(block))
    return digest.matches()
