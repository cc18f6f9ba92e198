"""What passes between those who have images and the process that reads them: msgpack behind its length."""

from __future__ import annotations

from typing import BinaryIO, TypeVar

import msgspec

from penstock.engine.request import Image

T = TypeVar("T")
MAX_FRAME = 2**29
_HEADER = 4


class Limits(msgspec.Struct, frozen=True):
    """pixels: of one image, and ratio: of its longer side to the shorter, both checked before it is decoded. memory:
    bytes of address space that reading the images of a request may take, and seconds: how long."""

    pixels: int
    ratio: int = 100
    memory: int = 2**31
    seconds: int = 20


class Setup(msgspec.Struct, frozen=True):
    """The first message: the model's folder, and the placeholder token as its tokenizer spells it."""

    folder: str
    token: str
    limits: Limits


class Started(msgspec.Struct, frozen=True):
    """The answer to it. inline: what stands for an image in a prompt that no chat template made. error: "" for none."""

    inline: str = ""
    error: str = ""


class RawImage(msgspec.Struct, frozen=True, array_like=True):
    """A file as it came. format: PNG, JPEG, WEBP or GIF, "" where nobody said."""

    data: bytes
    format: str = ""


class Ask(msgspec.Struct, frozen=True):
    """A prompt with a placeholder for each image, and the images."""

    text: str
    images: list[RawImage]


class Told(msgspec.Struct, frozen=True):
    """The prompt with as many placeholders as the images have rows. special: whether the tokenizer adds its own special
    tokens to it. error: why the images are refused, "" for not at all."""

    text: str = ""
    special: bool | None = None
    images: list[Image] = []
    error: str = ""


def frame(message: msgspec.Struct) -> bytes:
    """A message as it travels."""
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(_HEADER, "little") + body


def receive(source: BinaryIO, kind: type[T]) -> T | None:
    """Read one message; None when the other end has closed, or wrote nonsense."""
    head = source.read(_HEADER)
    length = int.from_bytes(head, "little")
    if len(head) < _HEADER or length > MAX_FRAME:
        return None
    body = source.read(length)
    try:
        return msgspec.msgpack.decode(body, type=kind) if len(body) == length else None
    except msgspec.MsgspecError:
        return None
