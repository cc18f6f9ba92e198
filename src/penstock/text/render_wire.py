"""What passes between those who render chat templates and the process that does it: JSON behind its length."""

from __future__ import annotations

import json
import struct
from typing import Any, BinaryIO

RENDER_SECONDS = 1.0  # what a rendering may take; the sandbox watches it
COMPILE_SECONDS = 5.0
GRACE = 0.25  # until the alarm ends a rendering that the sandbox could not

_LENGTH = struct.Struct("<I")


def send(sink: BinaryIO, message: dict[str, Any]) -> None:
    """Write one message."""
    body = json.dumps(message).encode()
    sink.write(_LENGTH.pack(len(body)) + body)
    sink.flush()


def receive(source: BinaryIO) -> Any:
    """Read one message; None when the other end has closed."""
    head = source.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    body = source.read(length)
    return json.loads(body) if len(body) == length else None
