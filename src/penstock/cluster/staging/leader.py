"""The one process of a node that stages: `srun` starts it, the head speaks to it in JSON lines.

    python -m penstock.cluster.staging.leader

Every line on stdin is a command for all leaders, every line on stdout one leader's answer. The end of stdin is the end.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from penstock.cluster.staging import copying
from penstock.cluster.staging.manifest import Manifest
from penstock.cluster.staging.store import Store
from penstock.devices.memory import available_bytes

Answer = dict[str, Any]
HEADROOM = 1.01  # a file system needs a little more than the bytes of its files


class Leader:
    """What one node does; each public method is a command and returns its answer."""

    def __init__(self) -> None:
        self.node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        self._job = os.environ.get("SLURM_JOB_ID", "0")
        self._store: Store | None = None
        self._manifest: Manifest | None = None
        self._post: copying.Post | None = None

    def look(self, places: list[str], key: str, total: int) -> Answer:
        """What each place of this node offers: whether the model is there, free bytes, or why it cannot be used."""
        offers = []
        for place in places:
            path = Path(os.path.expandvars(place))
            store = Store(path)
            offer: Answer = {"place": place, "path": str(path), "free": 0, "staged": None, "why": ""}
            offers.append(offer)
            if "$" in str(path) or not path.is_dir():
                offer["why"] = "is not there"
                continue
            staged = store.whole(key)
            try:
                store.open()
                free = shutil.disk_usage(path).free
            except OSError as error:
                offer["why"] = error.strerror or "cannot be used"
                continue
            if _is_memory(path):
                free = min(free, available_bytes())
            offer |= {"free": free, "staged": None if staged is None else str(staged), "fits": free > total * HEADROOM}
        return {"offers": offers}

    def lock(self, place: str, key: str) -> Answer:
        """Take the right to copy; `staged` when another job has finished it meanwhile."""
        self._store = Store(Path(os.path.expandvars(place)))
        self._store.open()
        if not self._store.lock(key):
            return {"locked": False, "staged": None}
        staged = self._store.whole(key)
        return {"locked": True, "staged": None if staged is None else str(staged)}

    def unlock(self, key: str) -> Answer:
        """Give it up."""
        self._here().unlock(key)
        return {}

    def prepare(self, manifest: Answer, who: list[str]) -> Answer:
        """Make room: an empty copy of every file."""
        self._manifest = msgspec.convert(manifest, Manifest)
        if self.node in who:
            part = self._part()
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(mode=0o700)
            copying.create_files(self._manifest, part)
        return {}

    def direct(self, first: int, last: int, who: list[str]) -> Answer:
        """Copy pieces from the shared file system."""
        if self.node in who and self._manifest is not None:
            copying.copy_direct(self._manifest, self._manifest.pieces()[first:last], self._part())
        return {}

    def listen(self) -> Answer:
        """Open the door for leaders below this one."""
        self._post = copying.Post()
        return {"addresses": _addresses(self.node), "port": self._post.port}

    def relay(
        self, first: int, last: int, order: list[str], fanout: int, doors: dict[str, Answer], token: str
    ) -> Answer:
        """Copy pieces from the leader above while passing them on to at most `fanout` below."""
        post, self._post = self._post, None
        if post is None or self._manifest is None or self.node not in order:
            return {}
        mine = order.index(self.node)
        below = len([i for i in range(1, len(order)) if (i - 1) // fanout == mine])
        above, children = None, []
        try:
            if mine > 0:
                door = doors[order[(mine - 1) // fanout]]
                above = copying.join(door["addresses"], door["port"], token)
            children = post.accept(below, token)
            pieces = self._manifest.pieces()[first:last]
            copying.copy_relayed(self._manifest, pieces, self._part(), above, children)
        finally:
            for peer in (above, *children):
                if peer is not None:
                    peer.close()
            post.close()
        return {}

    def check(self, who: list[str]) -> Answer:
        """Read the copy back. Each node compares its share of the pieces with the source; the digest covers all."""
        if self.node not in who or self._manifest is None:
            return {}
        manifest, part, pieces = self._manifest, self._part(), self._manifest.pieces()
        mine, shares = who.index(self.node), len(who)

        def one(index: int) -> tuple[int, bool]:
            piece = pieces[index]
            copied = copying.checksum(part / manifest.names[piece.file], piece)
            share = index % shares == mine
            return copied, share and copying.checksum(manifest.sources[piece.file], piece) != copied

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            found = list(pool.map(one, range(len(pieces))))
        sizes = [(part / name).stat().st_size for name in manifest.names]
        digest = hashlib.sha256(json.dumps([sizes, [value for value, _ in found]]).encode()).hexdigest()
        wrong = [manifest.names[pieces[i].file] for i, (_, differs) in enumerate(found) if differs]
        return {"digest": digest, "wrong": sorted(set(wrong))[:3]}

    def commit(self, who: list[str], key: str) -> Answer:
        """The copy is good: give it its name, and note that this job uses it."""
        store = self._here()
        path = store.commit(key) if self.node in who else store.whole(key)
        store.use(key, self._job)
        store.unlock(key)
        return {"path": str(path)}

    def drop(self, key: str, who: list[str]) -> Answer:
        """Give the copy up."""
        store = self._here()
        if self.node in who:
            shutil.rmtree(store.part(key), ignore_errors=True)
        store.unlock(key)
        return {}

    def clean(self, places: list[str], key: str | None, living: list[str] | None) -> Answer:
        """Remove a staged model, or all of this user's, unless a living job uses it."""
        removed, kept = 0, 0
        for place in places:
            store = Store(Path(os.path.expandvars(place)))
            for found in store.keys():
                if key in (None, found):
                    gone = store.release(found, self._job, living)
                    removed, kept = removed + gone, kept + ((store.path / found).exists())
        return {"removed": removed, "kept": kept}

    def _here(self) -> Store:
        if self._store is None:
            raise OSError(22, "no place has been chosen")
        return self._store

    def _part(self) -> Path:
        if self._manifest is None:
            raise OSError(22, "nothing has been prepared")
        return self._here().part(self._manifest.key)


def _addresses(node: str) -> list[str]:
    """Names and addresses under which other nodes may reach this one, the likeliest first."""
    found = [node, socket.gethostname()]
    with suppress(OSError):
        found += [str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)]
    return list(dict.fromkeys([*found, "127.0.0.1"]))  # the last: several "nodes" on one machine


def _is_memory(path: Path) -> bool:
    """Whether files there take main memory (tmpfs)."""
    best, kind = "", ""
    for line in Path("/proc/mounts").read_text().splitlines():
        fields = line.split()
        if str(path).startswith(fields[1]) and len(fields[1]) >= len(best):
            best, kind = fields[1], fields[2]
    return kind in ("tmpfs", "ramfs")


def main() -> int:
    """Answer commands until stdin ends."""
    os.umask(0o077)
    leader = Leader()
    _say({"node": leader.node, "step": os.environ.get("SLURM_STEP_ID", "")})
    for line in sys.stdin:
        command = json.loads(line)
        turn, name = command.pop("turn"), command.pop("do")
        method: Callable[..., Answer] = getattr(leader, name)
        try:
            answer = method(**command)
        except OSError as error:
            answer = {"error": f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")}
        _say({"turn": turn, "node": leader.node, **answer})
    return 0


def _say(answer: Answer) -> None:
    """One line in one write, so that the lines of several nodes do not mix."""
    os.write(1, json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main())
