"""Requests that end without an answer: the status and the words that the client gets.

Three shapes: TGI's `{"error", "error_type"}`, OpenAI's `{"error": {...}}` under /v1/, and Anthropic's there on its own
route. All texts are ours; what an exception says never goes out.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Family = Literal["native", "openai", "anthropic"]  # of routes

RETRY_SECONDS = 1  # what Retry-After says when all places are taken
RESTART_SECONDS = 5  # and when the engine or the server is restarting

OPENAI_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
PASSING = (408, 409, 429)  # statuses below 500 after which the same request may succeed


class Refusal(Exception):
    """A request is refused. error_type: TGI's; plain: TGI answers this one with bare text instead of JSON."""

    def __init__(
        self,
        status: int,
        message: str,
        error_type: str = "validation",
        plain: bool = False,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.error_type = status, message, error_type
        self.plain, self.param, self.retry_after = plain, param, retry_after
        self.counted = False  # whether the metrics know of it

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Headers beside the content type. OpenAI's clients obey x-should-retry."""
        found: list[tuple[bytes, bytes]] = []
        if self.retry_after is not None:
            found.append((b"retry-after", str(self.retry_after).encode()))
        if self.status < 500 and self.status not in PASSING:
            found.append((b"x-should-retry", b"false"))
        return found

    def body(self, family: Family) -> tuple[bytes, bytes]:
        """(content type, body) in the shape of the route's family."""
        if family == "openai":
            return b"application/json", msgspec.json.encode(self.openai())
        if family == "anthropic":
            return b"application/json", msgspec.json.encode(self.anthropic())
        if self.plain:
            return b"text/plain; charset=utf-8", self.message.encode("utf-8", "replace")
        return b"application/json", msgspec.json.encode(self.native())

    def native(self) -> dict[str, str]:
        """TGI's shape."""
        return {"error": self.message, "error_type": self.error_type}

    def openai(self) -> dict[str, dict[str, object]]:
        """OpenAI's shape. `http_status_code` is TGI's addition for events inside a stream."""
        kind = OPENAI_TYPES.get(self.status)
        if kind is None:
            kind = "invalid_request_error" if self.status < 424 else "server_error"
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.error_type,
                "http_status_code": self.status,
            }
        }

    def anthropic(self) -> dict[str, object]:
        """Anthropic's shape."""
        kind = ANTHROPIC_TYPES.get(self.status, "invalid_request_error" if self.status < 424 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": self.message}}


def invalid(text: str, param: str | None = None) -> Refusal:
    """A parameter or the prompt breaks a rule."""
    return Refusal(422, f"Input validation error: {text}", "validation", param=param)


def overloaded() -> Refusal:
    """All places are taken."""
    return Refusal(429, "Model is overloaded", "overloaded", retry_after=RETRY_SECONDS)


def unhealthy() -> Refusal:
    """The engine is down or restarting."""
    return Refusal(503, "unhealthy", "healthcheck", retry_after=RESTART_SECONDS)


def draining() -> Refusal:
    """The server is shutting down."""
    return Refusal(503, "The server is shutting down", "healthcheck", retry_after=RESTART_SECONDS)


def generation_failed(detail: str) -> Refusal:
    """The engine gave up on this request."""
    return Refusal(424, f"Request failed during generation: {detail}", "generation")


def incomplete() -> Refusal:
    """The engine stopped without finishing the request."""
    return Refusal(500, "Incomplete generation", "incomplete_generation")


def incomplete_stream() -> Refusal:
    """The same in the midst of a stream."""
    return Refusal(500, "Incomplete generation stream", "incomplete_generation_stream")


def template_error(text: str) -> Refusal:
    """The conversation does not fit the model's chat template."""
    return Refusal(422, f"Template error: {text}", "template_error")


def internal() -> Refusal:
    """A fault of ours; the log has it under the request's id."""
    return Refusal(500, "Internal error", "internal")
