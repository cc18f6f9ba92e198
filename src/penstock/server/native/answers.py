"""The native API's answers, built from finished and running generations."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from msgspec import UNSET, UnsetType

from penstock.server.exchange import Header
from penstock.server.generation import Generation, TokenEvent
from penstock.server.native import wire
from penstock.server.native.rules import Order

COMPUTE_TYPE = os.environ.get("COMPUTE_TYPE", "cpu+optimized").encode("latin-1", "replace")

Run = tuple[Generation, list[TokenEvent]]


def whole(runs: Sequence[Run], order: Order) -> wire.GenerateResponse:
    """The answer of /generate; the best run comes first."""
    (best, events), *others = runs
    response = wire.GenerateResponse(generated_text=_text(best, order))
    if order.details:
        response.details = wire.Details(
            finish_reason=best.finish_reason,
            generated_tokens=best.generated_tokens,
            seed=_seed(best),
            prefill=_prefill(best),
            tokens=[_token(event) for event in events],
            best_of_sequences=[_sequence(run, order) for run in others] or UNSET,
            top_tokens=_top_tokens(best, events),
        )
    return response


def stream_events(
    generation: Generation, events: Sequence[TokenEvent], count: int, order: Order
) -> list[wire.StreamResponse]:
    """One event a token, after `count` earlier ones; the last of the answer carries its text."""
    out: list[wire.StreamResponse] = []
    for index, event in enumerate(events, count + 1):
        response = wire.StreamResponse(index=index, token=_token(event))
        if event.top:
            response.top_tokens = _top(generation, event)
        out.append(response)
    if generation.finish_reason and out:
        out[-1].generated_text = _text(generation, order)
        if order.details:
            out[-1].details = wire.StreamDetails(
                generation.finish_reason,
                generation.generated_tokens,
                _seed(generation),
                len(generation.request.prompt_ids),
            )
    return out


def stream_headers(prompt: str) -> list[Header]:
    """TGI's headers of a stream."""
    return [(b"x-compute-type", COMPUTE_TYPE), (b"x-compute-characters", str(len(prompt)).encode())]


def headers(generation: Generation, prompt: str) -> list[Header]:
    """The figures that TGI gives along with a whole answer; times in whole milliseconds."""
    now, timings = time.monotonic(), generation.timings
    submitted = timings.submitted or timings.arrived
    started = timings.started or submitted
    figures = {
        b"x-compute-time": repr(now - timings.arrived),
        b"x-total-time": _milliseconds(now - timings.arrived),
        b"x-validation-time": _milliseconds(submitted - timings.arrived),
        b"x-queue-time": _milliseconds(started - submitted),
        b"x-inference-time": _milliseconds(now - started),
        b"x-time-per-token": _milliseconds((now - started) / max(generation.generated_tokens, 1)),
        b"x-prompt-tokens": str(len(generation.request.prompt_ids)),
        b"x-generated-tokens": str(generation.generated_tokens),
    }
    return [*stream_headers(prompt), *((name, value.encode()) for name, value in figures.items())]


def _milliseconds(seconds: float) -> str:
    return str(max(int(seconds * 1000), 0))


def _text(generation: Generation, order: Order) -> str:
    return order.prompt + generation.text if order.full_text else generation.text


def _seed(generation: Generation) -> int | None:
    """Greedy decoding has none."""
    sampling = generation.request.sampling
    return sampling.seed if sampling.draws else None


def _prefill(generation: Generation) -> list[wire.PrefillToken]:
    return [wire.PrefillToken(*token) for token in generation.prefill()]


def _token(event: TokenEvent) -> wire.Token:
    return wire.Token(event.id, event.text, event.logprob, event.special)


def _top(generation: Generation, event: TokenEvent) -> list[wire.Token]:
    tokenizer = generation.tokenizer
    special = tokenizer.special_ids
    return [wire.Token(i, tokenizer.token_text(i), logprob, i in special) for i, logprob in event.top]


def _top_tokens(generation: Generation, events: Sequence[TokenEvent]) -> list[list[wire.Token]] | UnsetType:
    if generation.request.top_n_tokens == 0:
        return UNSET
    return [_top(generation, event) for event in events]


def _sequence(run: Run, order: Order) -> wire.Sequence:
    generation, events = run
    return wire.Sequence(
        generated_text=_text(generation, order),
        finish_reason=generation.finish_reason,
        generated_tokens=generation.generated_tokens,
        seed=_seed(generation),
        prefill=_prefill(generation),
        tokens=[_token(event) for event in events],
        top_tokens=_top_tokens(generation, events),
    )
