"""What the processes of a server write to stderr: text, or one JSON object a line.

Every record is one line, whatever a client's text in it holds: control characters are spelt out. Tracebacks follow
their record; in JSON they are a field of it.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import UTC, datetime
from typing import Any

JSON_VARIABLE = "PENSTOCK_JSON_LOGS"  # tells the engine process to write JSON too
_LEVELS = {
    "trace": "DEBUG",
    "debug": "DEBUG",
    "info": "INFO",
    "warn": "WARNING",
    "warning": "WARNING",
    "error": "ERROR",
}


def configure() -> None:
    """Send every logger's records to stderr. LOG_LEVEL (TGI's variable) is the lowest level of ours that is written."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if in_json() else _Text())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    level = _LEVELS.get(os.environ.get("LOG_LEVEL", "info").lower(), "INFO")
    logging.getLogger("penstock").setLevel(level)


def in_json() -> bool:
    """Whether this process writes JSON."""
    return os.environ.get(JSON_VARIABLE) == "1"


def json_line(level: str, message: str, target: str, fields: dict[str, Any] | None = None) -> str:
    """One record, with TGI's keys first."""
    record = {"timestamp": _now(), "level": level, "message": message, "target": target, **(fields or {})}
    return json.dumps(record)


def visible(text: str) -> str:
    """A text without control characters: they are spelt out."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class _Text(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = getattr(record, "fields", {})
        pairs = "".join(f" {name}={value}" for name, value in fields.items())
        return visible(super().formatMessage(record) + pairs)


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = dict(getattr(record, "fields", {}))
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json_line(record.levelname, record.getMessage(), record.name, fields)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
