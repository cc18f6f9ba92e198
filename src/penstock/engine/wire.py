"""Frames between the API process and the engine process: four bytes of length, then msgpack."""

from __future__ import annotations

import msgspec

from penstock.engine.config import EngineConfig
from penstock.engine.messages import Beat, FromEngine, ToEngine

MAX_FRAME = 2**28


class Envelope(msgspec.Struct):
    """What every message to the engine has."""

    id: int


_encoder = msgspec.msgpack.Encoder()
_to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_from_engine: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
_envelope = msgspec.msgpack.Decoder(Envelope)
_config = msgspec.msgpack.Decoder(EngineConfig)

HEADER = 4


def frame(message: ToEngine | FromEngine | EngineConfig) -> bytes:
    """A message as it travels."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME:
        raise ValueError(f"a message of {len(body)} bytes is too large for the engine")
    return len(body).to_bytes(HEADER, "little") + body


def body_length(header: bytes | bytearray | memoryview) -> int:
    """Length of the body that follows a header. Raises ValueError for one that nobody of ours wrote."""
    n = int.from_bytes(header[:HEADER], "little")
    if n > MAX_FRAME:
        raise ValueError(f"a frame of {n} bytes: the stream is out of step")
    return n


def to_engine(body: bytes | memoryview) -> ToEngine:
    return _to_engine.decode(body)


def id_of(body: bytes | memoryview) -> int:
    """The id in a message whose other fields may be wrong. Raises msgspec.ValidationError when it has none."""
    return _envelope.decode(body).id


def from_engine(body: bytes | memoryview) -> FromEngine:
    return _from_engine.decode(body)


def config(body: bytes | memoryview) -> EngineConfig:
    return _config.decode(body)


BEAT = frame(Beat())
