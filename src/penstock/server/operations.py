"""One operation of the API: a path and a method with the types that go in and come out.

Each family of routes has its part of the table beside its types; `openapi.py` makes the OpenAPI document of the whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

JSON = "application/json"
TEXT = "text/plain; charset=utf-8"
EVENTS = "text/event-stream"
HTML = "text/html; charset=utf-8"

GET_ERRORS = (401, 403, 404, 405, 503)
POST_ERRORS = (400, 401, 403, 404, 405, 408, 413, 415, 422, 424, 429, 500, 503)


@dataclass(frozen=True)
class Operation:
    """One method of one path.

    bodies, answer, event: types that msgspec can describe. A request fits one of the bodies; `many` is the key under
    which there is a list of them instead. event: of a stream of server-sent events, which comes instead of the answer
    when it is asked for. example: a body that works with any model.
    """

    method: Literal["get", "post"]
    path: str
    summary: str
    tag: str
    answer: Any = None
    content_type: str = JSON
    bodies: tuple[Any, ...] = ()
    many: str | None = None
    event: Any = None
    example: Any = None
    redirects: bool = False

    @property
    def statuses(self) -> tuple[int, ...]:
        """The statuses of its errors."""
        return POST_ERRORS if self.method == "post" else GET_ERRORS
