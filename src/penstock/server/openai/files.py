"""/v1/files: upload, list, look at, read, delete. A key sees its own files only."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable
from contextlib import suppress
from typing import BinaryIO

from multipart import MultipartError, MultipartSegment, PushMultipartParser, parse_options_header

from penstock.batch.lines import sync_folder
from penstock.server.exchange import Exchange
from penstock.server.house import House
from penstock.server.openai.batch_wire import Deleted, FileList, FileObject
from penstock.server.openai.pages import page
from penstock.server.openai.store import Shelf, unstorable
from penstock.server.refusal import Refusal

MAX_FIELD = 1024  # bytes of a form's field that is no file
MAX_FIELDS = 8
MAX_NAME = 255  # characters of a file's name
MIN_SECONDS, MAX_SECONDS = 3600, 2592000  # of `expires_after`, as OpenAI has them
PURPOSES = ("batch", "user_data", "assistants", "fine-tune", "vision", "evals")
_CHUNK = 1 << 18
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f/\\]")


class Files:
    """The routes. shelf: gives a request's key its files; busy: whether a file is the input of a batch that runs."""

    def __init__(self, house: House, shelf: Callable[[Exchange], Shelf], busy: Callable[[Shelf, str], bool]) -> None:
        self._house, self._shelf, self._busy = house, shelf, busy

    async def upload(self, exchange: Exchange) -> None:
        """POST /v1/files: a multipart form with `purpose` and `file`, which goes to disk as it comes."""
        shelf = self._shelf(exchange)
        shelf.sweep()
        content_type = (exchange.header(b"content-type") or b"").decode("latin-1")
        kind, options = parse_options_header(content_type)
        if kind != "multipart/form-data" or not options.get("boundary"):
            raise Refusal(415, "Expected request with `Content-Type: multipart/form-data`")
        room = shelf.quota - shelf.used
        limit = max(room, 0) + (MAX_FIELD + 512) * MAX_FIELDS
        form = Form(shelf)
        try:
            with PushMultipartParser(options["boundary"], max_segment_count=MAX_FIELDS, strict=True) as parser:
                async for part in exchange.parts(limit, self._house.config.body_seconds):
                    for event in parser.parse(part) if part else ():
                        form.take(event)
            await exchange.answer_json(await asyncio.to_thread(form.finish))  # it waits for the disk
        except MultipartError as error:
            raise Refusal(400, f"The form cannot be read: {error}", "invalid_form") from None
        except OSError as error:
            raise unstorable(error.strerror or "the disk refuses") from None
        except Refusal as refusal:
            if refusal.status == 413:
                text = f"The file does not fit: {max(room, 0)} of {shelf.quota} bytes are free (--batch-quota)"
                raise Refusal(413, text, "storage_full", param="file") from None
            raise
        finally:
            form.close()

    async def list(self, exchange: Exchange) -> None:
        """GET /v1/files, the newest first."""
        query = exchange.query
        files = self._shelf(exchange).all_files()
        if "purpose" in query:
            files = [file for file in files if file.purpose == query["purpose"]]
        if query.get("order") == "asc":
            files.reverse()
        shown, more = page(files, query, 10_000)
        first, last = (shown[0].id, shown[-1].id) if shown else (None, None)
        await exchange.answer_json(FileList(data=shown, first_id=first, last_id=last, has_more=more))

    async def one(self, exchange: Exchange, file_id: str) -> None:
        """GET /v1/files/ID."""
        await exchange.answer_json(self._shelf(exchange).file(file_id))

    async def content(self, exchange: Exchange, file_id: str) -> None:
        """GET /v1/files/ID/content, in pieces."""
        shelf = self._shelf(exchange)
        file = shelf.file(file_id)
        try:
            stored = shelf.path(file.id).open("rb")
        except OSError as error:
            raise unstorable(error.strerror or "the disk refuses") from None
        with stored:
            await exchange.start_content(file.bytes, b"application/octet-stream")
            while data := stored.read(_CHUNK):
                await exchange.write(data)
            await exchange.end()

    async def delete(self, exchange: Exchange, file_id: str) -> None:
        """DELETE /v1/files/ID. The input of a batch that runs stays."""
        shelf = self._shelf(exchange)
        file = shelf.file(file_id)
        if self._busy(shelf, file.id):
            raise Refusal(409, f"{file.id} is the input of a batch that is not over", "file_in_use", param="id")
        try:
            shelf.delete(file)
        except OSError as error:
            raise unstorable(error.strerror or "the disk refuses") from None
        await exchange.answer_json(Deleted(id=file.id))


class Form:
    """An upload while it arrives. Until `finish`, nothing of it counts; `close` removes what did not become a file."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._fields: dict[str, bytes] = {}
        self._name = ""  # of the field that arrives
        self._file: FileObject | None = None
        self._sink: BinaryIO | None = None
        self._written = 0  # bytes of the file
        self._kept = False

    def take(self, event: MultipartSegment | bytes | bytearray | None) -> None:
        """One event of the parser: a field begins, some of its bytes, its end (None). Raises Refusal, OSError."""
        if isinstance(event, MultipartSegment):
            self._begin(event)
        elif event is None:
            return
        elif self._name == "file" and self._sink is not None:
            self._shelf.used += len(event)
            self._written += len(event)
            if self._shelf.used > self._shelf.quota:
                raise Refusal(413, "too large")
            self._sink.write(event)
        else:
            value = self._fields[self._name] + bytes(event)
            if len(value) > MAX_FIELD:
                raise Refusal(400, f"`{self._name[:64]}` is too long", "invalid_form")
            self._fields[self._name] = value

    def finish(self) -> FileObject:
        """The stored file. Raises Refusal 400 for what is missing or wrong."""
        file, purpose = self._file, self._fields.get("purpose", b"").decode("utf-8", "replace")
        if file is None or self._sink is None:
            raise Refusal(400, "The form has no `file`", "invalid_form", param="file")
        if purpose not in PURPOSES:
            raise Refusal(400, f"`purpose` must be one of {', '.join(PURPOSES)}", "invalid_form", param="purpose")
        file.purpose = purpose
        file.expires_at = self._expiry(file.created_at)
        self._sink.flush()
        os.fsync(self._sink.fileno())
        sync_folder(self._shelf.files)
        self._shelf.keep(file)
        self._kept = True
        return file

    def close(self) -> None:
        """Let the file go, and remove it when it did not become one."""
        if self._sink is not None:
            with suppress(OSError):
                self._sink.close()
        if self._file is not None and not self._kept:
            self._shelf.path(self._file.id).unlink(missing_ok=True)
            self._shelf.used -= self._written

    def _begin(self, segment: MultipartSegment) -> None:
        self._name = segment.name or ""
        if self._name != "file":
            self._fields[self._name] = b""
            return
        if self._file is not None:
            raise Refusal(400, "The form has two files", "invalid_form", param="file")
        name = _UNPRINTABLE.sub("_", segment.filename or "upload")[:MAX_NAME]
        self._file = self._shelf.new_file(name, "")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._sink = os.fdopen(os.open(self._shelf.path(self._file.id), flags, 0o600), "wb")

    def _expiry(self, created: int) -> int | None:
        anchor, seconds = (self._fields.get(f"expires_after[{name}]") for name in ("anchor", "seconds"))
        if anchor is None and seconds is None:
            return None
        number = int(seconds) if seconds is not None and seconds.isdigit() and len(seconds) < 12 else 0
        if anchor != b"created_at" or not MIN_SECONDS <= number <= MAX_SECONDS:
            text = f"`expires_after` needs the anchor created_at and {MIN_SECONDS} to {MAX_SECONDS} seconds"
            raise Refusal(400, text, "invalid_form", param="expires_after")
        return created + number
