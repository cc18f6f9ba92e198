"""OpenAI's batch files: a request a line goes in, an answer a line comes out.

In: {"custom_id", "method": "POST", "url": "/v1/chat/completions", "body": {...}}. Out: {"id", "custom_id", "response":
{"status_code", "request_id", "body"}, "error"}. The `id` of an answer is made of its request's content, which is how a
rerun knows what is done.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from penstock.batch.records import BadRow, Source
from penstock.batch.results import Done
from penstock.batch.rows import HASH_BYTES, key_number
from penstock.errors import UsageError

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
MAX_CUSTOM_ID = 512  # characters
_PREFIX = "batch_req_"


class BatchLine(msgspec.Struct, frozen=True):
    """One request. body: its JSON, as it stands in the file."""

    custom_id: str
    url: str
    body: msgspec.Raw
    method: str = "POST"

    @property
    def name(self) -> str:
        return self.custom_id

    def identity(self) -> str:
        """16 hex digits of the SHA-256 of all that the line asks for."""
        asked = msgspec.json.encode([self.custom_id, self.url, self.body])
        return hashlib.sha256(asked).hexdigest()[: 2 * HASH_BYTES]


class LineResponse(msgspec.Struct):
    """What the route answered."""

    status_code: int
    request_id: str
    body: msgspec.Raw


class LineError(msgspec.Struct):
    """Why the request never reached its route."""

    code: str
    message: str


class AnswerLine(msgspec.Struct):
    """One line of an output."""

    id: str
    custom_id: str
    response: LineResponse | None
    error: LineError | None = None

    @property
    def failed(self) -> bool:
        return self.response is None or self.response.status_code != 200


@dataclass(frozen=True)
class Fault:
    """What is wrong with a line of an input. code: OpenAI's."""

    line: int
    code: str
    message: str


_LINE = msgspec.json.Decoder(BatchLine)
_ANSWER = msgspec.json.Decoder(AnswerLine)


def read_line(raw: bytes) -> BatchLine:
    """One request. Raises BadRow."""
    try:
        line = _LINE.decode(raw)
    except RecursionError:
        raise BadRow("it is nested too deep") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRow(f"it is no request of a batch: {error}".replace("`", "'").removesuffix(".")) from None
    if line.method != "POST":
        raise BadRow(f"its method is {line.method!r:.40}, but every request of a batch is a POST")
    if line.url not in ENDPOINTS:
        raise BadRow(f"its url is {line.url!r:.80}; known are {', '.join(ENDPOINTS)}")
    if not 0 < len(line.custom_id) <= MAX_CUSTOM_ID:
        raise BadRow(f"its custom_id must have 1 to {MAX_CUSTOM_ID} characters")
    if not bytes(line.body).lstrip().startswith(b"{"):
        raise BadRow("its body is no object")
    return line


def answer_line(line: BatchLine, response: LineResponse | None, error: LineError | None = None) -> AnswerLine:
    """The line of an output that belongs to a request."""
    return AnswerLine(_PREFIX + line.identity(), line.custom_id, response, error)


def done_of_answer(raw: bytes) -> Done | None:
    """What a line of an output says; None for anything else."""
    try:
        answer = _ANSWER.decode(raw)
        identity = answer.id.removeprefix(_PREFIX)
        key_number(identity)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError):
        return None
    return Done(answer.custom_id, identity, answer.failed)


class LineFileReader:
    """The requests of an input. name: what people know it as."""

    def __init__(self, source: Source) -> None:
        self._source, self.name = source, source.name

    def numbered(self) -> Iterator[tuple[int, BatchLine]]:
        """(line number from 1, request) of every line. Raises UsageError for a bad one."""
        for number, line in self.judged():
            if isinstance(line, Fault):
                raise UsageError(f"{self.name}, line {number}: {line.message}.", "Nothing was generated.")
            yield number, line

    def judged(self) -> Iterator[tuple[int, BatchLine | Fault]]:
        """The same with what is wrong in the place of a bad line."""
        records = self._source.records()
        number = 0
        while True:
            try:
                number, raw = next(records)
            except StopIteration:
                return
            except BadRow as error:  # nothing can be read behind it
                yield error.line or number + 1, Fault(error.line or number + 1, "invalid_json_line", str(error))
                return
            try:
                yield number, read_line(raw if isinstance(raw, bytes) else b"")
            except BadRow as error:
                yield number, Fault(number, "invalid_json_line", str(error))

    def check(self) -> tuple[int, str, array[int]]:
        """(requests, sha256 of all, their identities). Raises UsageError: a bad line, a custom_id twice, no lines."""
        digest = hashlib.sha256()
        keys, names = array("Q"), set[int]()
        for number, line in self.numbered():
            identity = line.identity()
            digest.update(bytes.fromhex(identity))
            keys.append(key_number(identity))
            name = custom_key(line.custom_id)
            if name in names:
                raise UsageError(f"{self.name}, line {number}: the custom_id {line.custom_id!r:.80} was there before.")
            names.add(name)
        if not keys:
            raise UsageError(f"{self.name} holds no requests.", "It is empty, or all its lines are.")
        return len(keys), digest.hexdigest(), keys

    def close(self) -> None:
        """Close the input."""
        self._source.close()


def custom_key(custom_id: str) -> int:
    """64 bits of a custom_id, to find repeated ones."""
    return int.from_bytes(hashlib.sha256(custom_id.encode("utf-8", "surrogatepass")).digest()[:8])


def encoded(answer: AnswerLine) -> bytes:
    """A line of an output."""
    return msgspec.json.encode(answer) + b"\n"


def any_json(value: Any) -> msgspec.Raw:
    """A value as the JSON that goes into a line."""
    return msgspec.Raw(msgspec.json.encode(value))
