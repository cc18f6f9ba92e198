"""Long lists, a page at a time: `limit` and `after`, as OpenAI's clients ask for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

from penstock.server.refusal import Refusal


class Named(Protocol):
    """Anything with an id."""

    id: str


T = TypeVar("T", bound=Named)


def page(items: Sequence[T], query: Mapping[str, str], most: int) -> tuple[list[T], bool]:
    """(the items behind `after`, at most `limit` of them; whether there are more). Raises Refusal 400."""
    given = query.get("limit", str(most))
    if not (given.isascii() and given.isdigit() and len(given) < 7 and 1 <= int(given) <= most):
        raise Refusal(400, f"`limit` must be a number from 1 to {most}", "invalid_value", param="limit")
    start = 0
    if "after" in query:
        ids = [item.id for item in items]
        if query["after"] not in ids:
            raise Refusal(404, "`after` names nothing that is there", "not_found", param="after")
        start = ids.index(query["after"]) + 1
    end = start + int(given)
    return list(items[start:end]), end < len(items)
