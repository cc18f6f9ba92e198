"""Packed copies of models on disk, for the next start: which is of what, where they lie, and when one is written.

A copy is made beside the work of the first start, by a thread that leaves most of the time to others; it appears under
its name when it is whole and on the disk, or not at all. They take at most half of what would be free without them; the
one that was used longest ago goes first.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import sys
import threading
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from penstock import __version__
from penstock.devices.cpu import flags
from penstock.devices.threads import be_polite
from penstock.engine.config import EngineConfig
from penstock.errors import PenstockError
from penstock.hub.cache import derived_folder
from penstock.hub.checkpoint import TensorEntry
from penstock.hub.fingerprint import fingerprint
from penstock.kernels import native
from penstock.models import packed_copy
from penstock.models.config import DecoderConfig
from penstock.models.encoder_decoder.config import EncoderDecoderConfig

log = logging.getLogger("penstock.engine")

LEAST_BYTES = 2**28  # a smaller model loads in a moment
_LOCAL = frozenset(("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "overlay"))
_REST, _REST_BESIDE = 1, 12  # times as long as a piece took the writer then rests, beside others' work longer
_IDLE = 0.3  # processors that an idle process uses at most
_SYNCED = 2**27  # bytes that wait for the disk at most
_POLITE = 10
_SUFFIX = ".packed"


@dataclass(frozen=True)
class PackedCopy:
    """The place of one model's copy, whether it is there or not."""

    path: Path

    def read(self) -> tuple[Any, str] | None:
        """The weights and the remark in it, or None where none can be used; one that is damaged is deleted."""
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            found = os.fstat(fd)
            if found.st_uid != os.geteuid() or found.st_mode & 0o022:
                log.warning("the packed copy %s is not used: others may have written it", self.path)
                return None
            weights = packed_copy.read(fd)
            with contextlib.suppress(OSError):
                os.utime(fd)  # used now
            return weights
        except packed_copy.Unreadable as error:
            log.warning("the packed copy %s is deleted: %s", self.path, error)
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("the packed copy %s cannot be read: %s", self.path, error.strerror)
        finally:
            os.close(fd)
        return None

    def write_beside(self, weights: object, remark: str) -> threading.Thread | None:
        """Write it while the process goes on; None where these weights cannot be kept."""
        try:
            plan = packed_copy.Plan(weights, remark)
        except packed_copy.NotKeepable as what:
            log.info("no packed copy: it cannot hold %s", what)
            return None
        stop = threading.Event()
        thread = threading.Thread(target=self._write, args=(plan, stop), name="packed-copy", daemon=True)
        thread.start()

        def give_up() -> None:  # a thread that the interpreter ends inside a library may take the process with it
            stop.set()
            thread.join()

        atexit.register(give_up)
        return thread

    def _write(self, plan: packed_copy.Plan, stop: threading.Event) -> None:
        be_polite(_POLITE)
        try:
            with _only_writer(self.path.parent) as alone:
                if alone and not self.path.exists() and _make_room(self.path.parent, plan.size):
                    self._fill(plan, stop)
        except OSError as error:  # a full disk, a quota, a file system that lacks something
            log.warning("no packed copy in %s: %s", self.path.parent, error.strerror)

    def _fill(self, plan: packed_copy.Plan, stop: threading.Event) -> None:
        with contextlib.ExitStack() as opened:
            fd = os.open(self.path.parent, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600)  # gone if we die
            opened.callback(os.close, fd)
            folder = os.open(self.path.parent, os.O_DIRECTORY | os.O_CLOEXEC)
            opened.callback(os.close, folder)
            synced = 0
            for offset, piece in plan.pieces():
                began = time.monotonic()
                while piece:
                    n = os.pwrite(fd, piece, offset)
                    offset, piece = offset + n, piece[n:]
                if offset > synced + _SYNCED:
                    os.fdatasync(fd)
                    synced = offset
                took, used = time.monotonic() - began, time.process_time()
                ended = stop.wait(_REST * took)
                if not ended and time.process_time() - used > _IDLE * _REST * took:
                    ended = stop.wait((_REST_BESIDE - _REST) * took)
                if ended:
                    return
            os.fsync(fd)  # a name for a file whose content a crash can take would be worse than none
            # with a folder's descriptor Python asks for the file behind the link, without one for the link itself
            os.link(f"/proc/self/fd/{fd}", self.path.name, dst_dir_fd=folder, follow_symlinks=True)


def copy_of(
    config: EngineConfig,
    described: DecoderConfig | EncoderDecoderConfig,
    entries: dict[str, TensorEntry] | None,
    dtype: torch.dtype,
    form: str,
    positions: int,
    weight_bytes: int,
) -> PackedCopy | None:
    """The place of the copy of what a processor would load; None where there shall be none.

    What decides the content is in its name: the checkpoint, what config.json and the options make of it, the format,
    the processor, and Penstock's own code. positions: the longest context, for models whose tables end there.
    """
    if entries is None or config.packed_copy == "off" or sys.platform != "linux":
        return None
    try:
        if config.packed_copy == "auto":
            folder = derived_folder() / "packed"
            if weight_bytes < LEAST_BYTES or not _is_local(folder):
                return None
        else:
            folder = Path(config.packed_copy).expanduser().absolute()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        if found.st_uid != os.geteuid() or found.st_mode & 0o022:
            log.warning("no packed copy in %s: others may write there", folder)
            return None
        table = positions if isinstance(described, EncoderDecoderConfig) or described.alibi is not None else 0
        files = sorted({entry.file for entry in entries.values()})
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        whole = (fingerprint(Path(config.model_path)), stats, described, str(dtype), form, table, _build())
        return PackedCopy(folder / f"{hashlib.sha256(repr(whole).encode()).hexdigest()[:32]}{_SUFFIX}")
    except (OSError, RuntimeError, PenstockError) as error:  # whatever is wrong with it, the checkpoint can be read
        log.warning("no packed copy: %s", error)
        return None


@cache
def _build() -> tuple[str, ...]:
    """What packs weights: this processor with its kernels, and the code of this version, byte for byte."""
    root = Path(packed_copy.__file__).parents[1]
    digest = hashlib.sha256()
    for part in ("hub", "models", "formats", "kernels"):
        for file in sorted((root / part).rglob("*.py")):
            digest.update(file.read_bytes())
    if native.LIBRARY is not None:
        digest.update(Path(native.LIBRARY._name).read_bytes())
    return __version__, torch.__version__, *sorted(flags()), digest.hexdigest()


def _is_local(folder: Path) -> bool:
    """Whether a folder, or where it would be made, lies on a disk of this machine: to map a file of another one would
    put the network into every step."""
    place = next(p for p in (folder, *folder.parents) if p.exists()).resolve()
    kinds: dict[Path, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            before, _, after = line.partition(" - ")
            kinds[Path(before.split()[4].replace("\\040", " "))] = after.split()[0]
    return next((kinds[p] for p in (place, *place.parents) if p in kinds), "") in _LOCAL


@contextlib.contextmanager
def _only_writer(folder: Path) -> Any:
    """Whether nobody else writes a copy into the folder now."""
    fd = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(fd)


def _make_room(folder: Path, size: int) -> bool:
    """Delete the copies that were used longest ago until another fits; False where it would not even alone."""
    copies = [(file.stat(), file) for file in folder.glob(f"*{_SUFFIX}")]
    copies.sort(key=lambda entry: entry[0].st_mtime_ns)
    held = sum(found.st_size for found, _ in copies)
    most = (shutil.disk_usage(folder).free + held) // 2
    if size > most:
        log.info("no packed copy: %d bytes are more than half of the free disk under %s", size, folder)
        return False
    for found, file in copies:
        if held + size <= most:
            break
        file.unlink(missing_ok=True)
        held -= found.st_size
    return shutil.disk_usage(folder).free >= 2 * size  # what somebody has mapped is not free yet
