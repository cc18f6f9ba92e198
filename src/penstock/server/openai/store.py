"""Where files and batches of one key lie on disk: private folders, whole files, a bounded number of bytes.

    DIR/MODEL/OWNER/files/file-ID         the bytes, and file-ID.json what is known of them
                    batches/batch_ID.json
                    work/batch_ID/        the outputs of a batch that runs
                    .lock                 one server at a time

OWNER is made of the key, so that nobody sees another one's files, and the same key finds its own after a restart.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import time
from pathlib import Path
from typing import TypeVar

import msgspec

from penstock.batch.lines import write_whole
from penstock.server.openai.batch_wire import Batch, ExpiresAfter, FileObject
from penstock.server.refusal import Refusal

T = TypeVar("T")
MAX_OBJECTS = 10_000  # files, and batches, of one key
_FILE = re.compile(r"file-[0-9a-f]{24}")
_BATCH = re.compile(r"batch_[0-9a-f]{24}")


class Shelf:
    """The files and batches of one key. Its methods do little work on disk; nothing is kept in memory but sizes."""

    def __init__(self, folder: Path, quota: int) -> None:
        """Takes the folder. Raises Refusal 503 when that cannot be: another server has it, or the disk refuses."""
        self.folder, self.quota = folder, quota
        self.files, self.batches, self.work = folder / "files", folder / "batches", folder / "work"
        try:
            for each in (folder.parent, folder, self.files, self.batches, self.work):
                each.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            for part in (*self.files.glob("*.part"), *self.batches.glob("*.part")):
                part.unlink()  # of a server that was killed
        except OSError as error:
            raise unstorable(error.strerror or "the disk refuses") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise unstorable("another server uses this folder; give one of them --batch-dir") from None
        except OSError:
            pass  # a file system without locks loses only this check
        self.used = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())

    def close(self) -> None:
        """Let the folder go."""
        os.close(self._lock)

    def new_file(self, filename: str, purpose: str) -> FileObject:
        """A file that is about to be written to `path`; `keep` makes it real. Raises Refusal."""
        if len(list(self.files.glob("*.json"))) >= MAX_OBJECTS:
            raise Refusal(400, f"There are {MAX_OBJECTS} files already; delete some", "too_many_files")
        return FileObject(
            id=f"file-{secrets.token_hex(12)}",
            bytes=0,
            created_at=int(time.time()),
            filename=filename,
            purpose=purpose,
        )

    def path(self, file_id: str) -> Path:
        """Where a file's bytes are. The id is one that this shelf gave out."""
        return self.files / file_id

    def keep(self, file: FileObject) -> FileObject:
        """The bytes are all there: from now on the file exists. Raises OSError."""
        file.bytes = self.path(file.id).stat().st_size
        write_whole(self.files / f"{file.id}.json", msgspec.json.encode(file))
        return file

    def file(self, file_id: str) -> FileObject:
        """Raises Refusal 404."""
        found = self._read(self.files, file_id, _FILE, FileObject)
        if found is None or (found.expires_at is not None and found.expires_at <= time.time()):
            raise Refusal(404, f"No such File object: {file_id[:64]}", "not_found", param="id")
        return found

    def all_files(self) -> list[FileObject]:
        """The newest first."""
        found = [self._read(self.files, path.stem, _FILE, FileObject) for path in self.files.glob("*.json")]
        now = time.time()
        alive = [f for f in found if f is not None and (f.expires_at is None or f.expires_at > now)]
        return sorted(alive, key=lambda file: (file.created_at, file.id), reverse=True)

    def delete(self, file: FileObject) -> None:
        """Forget a file. Raises OSError."""
        (self.files / f"{file.id}.json").unlink(missing_ok=True)
        self.path(file.id).unlink(missing_ok=True)
        self.used = max(0, self.used - file.bytes)

    def sweep(self) -> None:
        """Delete files that have expired."""
        for path in self.files.glob("*.json"):
            file = self._read(self.files, path.stem, _FILE, FileObject)
            if file is not None and file.expires_at is not None and file.expires_at <= time.time():
                with contextlib.suppress(OSError):
                    self.delete(file)

    def save(self, batch: Batch) -> None:
        """Make a batch's state durable. Raises OSError."""
        write_whole(self.batches / f"{batch.id}.json", msgspec.json.encode(batch))

    def batch(self, batch_id: str) -> Batch:
        """Raises Refusal 404."""
        found = self._read(self.batches, batch_id, _BATCH, Batch)
        if found is None:
            raise Refusal(404, f"No such Batch object: {batch_id[:64]}", "not_found", param="id")
        return found

    def all_batches(self) -> list[Batch]:
        """The newest first."""
        found = [self._read(self.batches, path.stem, _BATCH, Batch) for path in self.batches.glob("*.json")]
        return sorted((b for b in found if b is not None), key=lambda b: (b.created_at, b.id), reverse=True)

    def desk(self, batch: Batch) -> Path:
        """The folder where a running batch collects its outputs. Raises OSError."""
        folder = self.work / batch.id
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder

    def clear(self, batch: Batch) -> None:
        """Remove that folder."""
        shutil.rmtree(self.work / batch.id, ignore_errors=True)

    def adopt(self, path: Path, file_id: str, filename: str, expiry: ExpiresAfter | None) -> None:
        """Make an output of a batch the file `file_id` of its owner. Done twice, it is the same. Raises OSError."""
        if path.exists():
            os.replace(path, self.path(file_id))
        if not (self.files / f"{file_id}.json").exists():
            now = int(time.time())
            expires = None if expiry is None else now + expiry.seconds
            self.keep(
                FileObject(
                    id=file_id, bytes=0, created_at=now, expires_at=expires, filename=filename, purpose="batch_output"
                )
            )

    def _read(self, folder: Path, name: str, form: re.Pattern[str], kind: type[T]) -> T | None:
        if not form.fullmatch(name):
            return None
        try:
            return msgspec.json.decode((folder / f"{name}.json").read_bytes(), type=kind)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError):
            return None


def owner_of(salt: bytes) -> str:
    """The name of a key's folder: it tells nothing of the key."""
    return hashlib.sha256(b"penstock files\0" + salt).hexdigest()[:32]


def unstorable(why: str) -> Refusal:
    """Files cannot be kept."""
    return Refusal(503, f"Files cannot be stored: {why}", "storage")
