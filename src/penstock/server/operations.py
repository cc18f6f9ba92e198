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

BYTES = "application/octet-stream"
FORM = "multipart/form-data"

GET_ERRORS = (400, 401, 403, 404, 405, 503)
DELETE_ERRORS = (401, 403, 404, 405, 409, 503)
POST_ERRORS = (400, 401, 403, 404, 405, 408, 409, 413, 415, 422, 424, 429, 500, 503)


@dataclass(frozen=True)
class Operation:
    """One method of one path.

    bodies, answer, event: types that msgspec can describe. A request fits one of the bodies; `many` is the key under
    which there is a list of them instead. event: of a stream of server-sent events, which comes instead of the answer
    when it is asked for. example: a body that works with any model. takes: the type of the body. query: names of
    parameters behind the path.
    """

    method: Literal["get", "post", "delete"]
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
    takes: str = JSON
    query: tuple[str, ...] = ()

    @property
    def statuses(self) -> tuple[int, ...]:
        """The statuses of its errors."""
        return {"get": GET_ERRORS, "post": POST_ERRORS, "delete": DELETE_ERRORS}[self.method]
