"""The key that lets clients in: made at start or read from a file, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import socket
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from penstock.errors import EnvironmentFault

PRIVATE_DIRECTORY, PRIVATE_FILE = 0o700, 0o600
MAX_KEY_FILE = 65536  # bytes
_NAMED = re.compile(r"(?P<name>[A-Za-z0-9._-]{1,64}):\s+(?P<key>\S.*)")


@dataclass(frozen=True)
class Holder:
    """Who sends a key. name: from the key file, for the log; salt: separates this key's prefix cache from others'."""

    name: str
    salt: bytes


class Keys:
    """The keys that are let in. file: where a person finds one; made: whether it is ours to remove."""

    def __init__(self, keys: list[tuple[str, str]], file: Path, made: bool) -> None:
        """keys: (name, key)."""
        self.file = file
        self._made = made
        digests = [(name, hashlib.sha256(key.encode()).digest()) for name, key in keys]
        self._known = [(digest, Holder(name, digest[:16])) for name, digest in digests]

    def holder(self, authorization: bytes | None, x_api_key: bytes | None = None) -> Holder | None:
        """Who sent `Authorization: Bearer KEY`, or else `x-api-key: KEY`; None when that is no key of ours."""
        scheme, _, given = (authorization or b"").partition(b" ")
        if authorization is None and x_api_key is not None:
            scheme, given = b"bearer", x_api_key
        digest = hashlib.sha256(given.strip()).digest()
        found: Holder | None = None
        for known, holder in self._known:  # every one is compared, whichever fits
            if hmac.compare_digest(known, digest):
                found = holder
        return found if scheme.lower() == b"bearer" else None

    @property
    def salts(self) -> list[bytes]:
        """Of all holders."""
        return [holder.salt for _, holder in self._known]

    def forget(self) -> None:
        """Remove the file if we made it."""
        if self._made:
            with suppress(OSError):
                self.file.unlink()


def make_key() -> Keys:
    """A new key in a file of its own that only this user can read. Raises EnvironmentFault."""
    directory = _private_directory()
    file = directory / f"{socket.gethostname()}-{os.getpid()}.key"
    key = secrets.token_urlsafe(32)
    while not key[0].isalnum():  # "-" in front would make it a flag on somebody's command line
        key = secrets.token_urlsafe(32)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    try:
        with suppress(FileNotFoundError):
            file.unlink()  # left behind by a process that had our number before
        descriptor = os.open(file, flags, PRIVATE_FILE)
        with os.fdopen(descriptor, "w") as stream:
            os.fchmod(descriptor, PRIVATE_FILE)  # whatever the umask
            stream.write(key + "\n")
    except OSError as error:
        raise EnvironmentFault(
            f"The key file {file} cannot be written: {error.strerror}.",
            hint="Name a file of your own with --api-key-file, or set XDG_RUNTIME_DIR to a private directory.",
        ) from error
    return Keys([("", key)], file.resolve(), made=True)


def read_keys(path: str) -> Keys:
    """The keys of a file: one a line, as `KEY` or `NAME: KEY`; lines that begin with # are comments.

    Raises EnvironmentFault when it is missing, empty or open to others.
    """
    file = Path(path).expanduser()
    try:
        with file.open("rb") as stream:
            mode = os.fstat(stream.fileno()).st_mode
            raw = stream.read(MAX_KEY_FILE)
    except OSError as error:
        raise EnvironmentFault(f"The key file {file} cannot be read: {error.strerror}.") from error
    if stat.S_ISREG(mode) and mode & 0o077:
        raise EnvironmentFault(
            f"The key file {file} can be read by other users (mode {stat.S_IMODE(mode):o}).",
            hint=f"chmod 600 {file}",
        )
    try:
        lines = [line.strip() for line in raw.decode().splitlines()]
    except UnicodeDecodeError:
        lines = []
    keys = [_named(line) for line in lines if line and not line.startswith("#")]
    if not keys:
        raise EnvironmentFault(f"The key file {file} holds no key.", hint="Write the key as its first line.")
    return Keys(keys, file if _inherited(file) else file.resolve(), made=False)


def pass_on(key: str) -> int:
    """Put a key into an anonymous file that survives an exec; returns its descriptor. Only this user can read it."""
    descriptor = os.memfd_create("key", 0)
    os.fchmod(descriptor, PRIVATE_FILE)
    os.write(descriptor, key.encode() + b"\n")
    return descriptor


def _inherited(file: Path) -> bool:
    """Whether it is an open file of a process, which has no name of its own."""
    return file.parts[:2] == ("/", "proc")


def _named(line: str) -> tuple[str, str]:
    named = _NAMED.fullmatch(line)
    return (named["name"], named["key"]) if named else ("", line)


def _private_directory() -> Path:
    """$XDG_RUNTIME_DIR/penstock where that is ours, else ~/.config/penstock/keys; made private."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    candidates = [Path(runtime) / "penstock"] if runtime and os.path.isabs(runtime) else []
    candidates.append(Path("~/.config/penstock/keys").expanduser())
    problem = ""
    for directory in candidates:
        try:
            directory.mkdir(mode=PRIVATE_DIRECTORY, parents=directory == candidates[-1], exist_ok=True)
            found = directory.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
                problem = f"{directory} is not a directory of yours"
                continue
            if found.st_mode & 0o077:
                directory.chmod(PRIVATE_DIRECTORY)
        except OSError as error:
            problem = f"{directory}: {error.strerror}"
            continue
        return directory
    raise EnvironmentFault(
        "There is no private place for the key file.",
        f"{problem}.",
        "Name a file with --api-key-file, or set XDG_RUNTIME_DIR to a directory of yours.",
    )
