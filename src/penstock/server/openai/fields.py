"""Fields that a route does not know: harmless ones pass, those that would change the answer are refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import msgspec

from penstock.server.exchange import Exchange
from penstock.server.refusal import Refusal

IGNORED_HEADER = b"x-penstock-ignored"
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_NAMED = 20  # so many ignored fields are named
_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])

Neutral = Callable[[Any], bool]


def _is(*values: object) -> Neutral:
    return lambda value: value in values


def _never(_: object) -> bool:
    return False


# They name the sender or ask for something beside the answer.
HARMLESS = frozenset({
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "prediction", "guided_decoding_backend", "request_id",
})  # fmt: skip

# They would change the answer and do nothing here, with a test for the values that are harmless. null, [] and {} are.
UNSUPPORTED: dict[str, Neutral] = {
    "adapter_id": _never,
    "audio": _never,
    "bad_words": _never,
    "best_of": _is(1),
    "chat_template": _never,
    "early_stopping": _is(False),
    "echo": _is(False),
    "function_call": _is("none", "auto"),
    "functions": _never,
    "guided_whitespace_pattern": _never,
    "length_penalty": _is(1),
    "logits_processors": _never,
    "lora_request": _never,
    "mirostat": _is(0),
    "mirostat_mode": _is(0),
    "modalities": _is(["text"]),
    "priority": _is(0),
    "prompt_logprobs": _is(0, False),
    "return_token_ids": _is(False),
    "return_tokens_as_token_ids": _is(False),
    "structural_tag": _never,
    "truncate_prompt_tokens": _never,
    "use_beam_search": _is(False),
    "watermark": _is(False),
    "web_search_options": _never,
}
_HINTS = {
    "adapter_id": "name the adapter as the `model`",
    "lora_request": "name the adapter as the `model`",
    "functions": "use `tools`",
    "function_call": "use `tool_choice`",
    "chat_template": "start the server with --chat-template FILE",
}


def look_over(
    exchange: Exchange,
    raw: bytes,
    kind: type[msgspec.Struct],
    strict: bool,
    unsupported_here: Mapping[str, Neutral] = MappingProxyType({}),
    harmless_here: frozenset[str] = frozenset(),
) -> None:
    """Judge the fields of a body that its struct does not have. The names of those that are ignored go into a header.

    strict: nothing is ignored. The last two are the route's own. Raises Refusal: 422 for a field that is not
    supported, 400 for one nobody knows.
    """
    known = HARMLESS.union(harmless_here, kind.__struct_fields__)
    unknown: list[str] = []
    for name, value in _FIELDS.decode(raw).items():
        if name in known:
            continue
        neutral = unsupported_here.get(name, UNSUPPORTED.get(name))
        if neutral is None:
            unknown.append(name)
        elif not _neutral(value, neutral):
            raise unsupported(name, _HINTS.get(name, ""))
    if not unknown:
        return
    if strict:
        raise Refusal(400, f"Unknown fields: {_listed(unknown)}", "unknown_field", param=unknown[0][:64])
    header = ", ".join(name for name in unknown[:_NAMED] if _NAME.fullmatch(name))
    exchange.extra_headers = [*exchange.extra_headers, (IGNORED_HEADER, (header or "unnamed").encode())]


def unsupported(name: str, hint: str = "", param: str | None = None) -> Refusal:
    """A field or a kind of content that is known and cannot be had."""
    text = f"`{name}` is not supported" + (f": {hint}" if hint else "")
    return Refusal(422, text, "not_supported", param=param or name)


def _neutral(raw: msgspec.Raw, neutral: Neutral) -> bool:
    try:
        value = msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError):
        return False
    return value is None or value in ([], {}) or neutral(value)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name[:64]}`" for name in list(names)[:_NAMED])
