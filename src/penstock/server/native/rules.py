"""The native API's parameters: TGI's rules in TGI's order and words, and their translation for the engine."""

from __future__ import annotations

import secrets
from collections.abc import Collection
from dataclasses import dataclass

from penstock.engine.limits import Limits
from penstock.engine.request import Sampling
from penstock.server.config import ServeConfig
from penstock.server.f32 import rounded
from penstock.server.native import wire
from penstock.server.native.wire import GenerateParameters, GenerateRequest
from penstock.server.refusal import invalid


@dataclass(frozen=True)
class Order:
    """A native request, checked. prompt: the text as it came; truncate: keep so many of its last tokens."""

    prompt: str
    sampling: Sampling
    best_of: int
    max_new_tokens: int | None
    stop: list[str]
    truncate: int | None
    top_n_tokens: int
    details: bool
    prefill: bool  # log-probabilities of the prompt
    full_text: bool
    grammar: wire.Grammar | None
    deterministic: bool
    adapter: str | None


def check_stream(p: GenerateParameters) -> None:
    """What streams cannot do. Raises Refusal 422."""
    if p.best_of is not None and p.best_of != 1:
        raise invalid("`best_of` != 1 is not supported when streaming tokens")
    if p.decoder_input_details:
        raise invalid("`decoder_input_details` == true is not supported when streaming tokens")


def best_of(p: GenerateParameters, config: ServeConfig) -> int:
    """How many sequences to generate. Raises Refusal 422."""
    count = 1 if p.best_of is None else p.best_of
    if count > 1 and config.max_best_of == 1:
        raise invalid("`best_of` != 1 is not allowed for this endpoint")
    if count > config.max_best_of:
        raise invalid(f"`best_of` must be > 0 and <= {config.max_best_of}. Given: {count}")
    return max(count, 1)


def order(body: GenerateRequest, count: int, config: ServeConfig, limits: Limits, adapters: Collection[str]) -> Order:
    """Apply rules 1 to 13 of the reference. adapters: their names. Raises Refusal 422 with the first one broken."""
    p = body.parameters
    sampling = _sampling(p, count)
    if p.max_new_tokens == 0:
        raise invalid("`max_new_tokens` must be strictly positive")
    if len(p.stop) > config.max_stop_sequences:
        raise invalid(f"`stop` supports up to {config.max_stop_sequences} stop sequences. Given: {len(p.stop)}")
    if p.seed is not None and count > 1:
        raise invalid("`seed` must not be set when `best_of` > 1")
    top_n = p.top_n_tokens or 0
    if top_n > config.max_top_n_tokens:
        raise invalid(f"`top_n_tokens` must be >= 0 and <= {config.max_top_n_tokens}. Given: {top_n}")
    if not body.inputs:
        raise invalid("`inputs` cannot be empty")
    if p.truncate is not None and not 0 < p.truncate <= limits.max_input_tokens:
        raise invalid(
            f"`truncate` must be strictly positive and less than {limits.max_input_tokens}. Given: {p.truncate}"
        )
    if p.adapter_id is not None and p.adapter_id not in adapters:
        names = ", ".join(adapters) or "none"
        raise invalid(f"`adapter_id`: there is no adapter `{p.adapter_id[:200]}` here. Adapters: {names}")
    return Order(
        prompt=body.inputs,
        sampling=sampling,
        best_of=count,
        max_new_tokens=p.max_new_tokens,
        stop=p.stop,
        truncate=p.truncate,
        top_n_tokens=top_n,
        details=p.details or p.decoder_input_details,
        prefill=p.decoder_input_details and config.enable_prefill_logprobs,
        full_text=bool(p.return_full_text),
        grammar=p.grammar,
        deterministic=p.deterministic,
        adapter=p.adapter_id,
    )


def _sampling(p: GenerateParameters, count: int) -> Sampling:
    # TGI reads these as 32-bit floats, so the rules hold for the rounded values.
    temperature = 1.0 if p.temperature is None else rounded(p.temperature)
    repetition = 1.0 if p.repetition_penalty is None else rounded(p.repetition_penalty)
    frequency = 0.0 if p.frequency_penalty is None else rounded(p.frequency_penalty)
    top_p = None if p.top_p is None else rounded(p.top_p)
    typical_p = None if p.typical_p is None else rounded(p.typical_p)
    asked = p.do_sample or any(v is not None for v in (p.temperature, p.top_k, p.top_p, p.typical_p))
    if count > 1 and not asked:
        raise invalid("you must use sampling when `best_of` is > 1")
    if temperature <= 0:
        raise invalid("`temperature` must be strictly positive")
    if repetition <= 0:
        raise invalid("`repetition_penalty` must be strictly positive")
    if not -2 <= frequency <= 2:
        raise invalid("`frequency_penalty` must be >= -2.0 and <= 2.0")
    if top_p is not None and not 0 < top_p < 1:
        raise invalid("`top_p` must be > 0.0 and < 1.0")
    if typical_p is not None and not 0 < typical_p < 1:
        raise invalid("`typical_p` must be > 0.0 and < 1.0")
    if p.top_k is not None and p.top_k <= 0:
        raise invalid("`top_k` must be strictly positive")
    return Sampling(
        do_sample=p.do_sample,
        temperature=temperature,
        top_k=p.top_k or 0,
        top_p=1.0 if top_p is None else top_p,
        typical_p=1.0 if typical_p is None else typical_p,
        repetition_penalty=repetition,
        frequency_penalty=frequency,
        watermark=p.watermark,
        seed=(0 if p.deterministic else secrets.randbits(64)) if p.seed is None else p.seed,
    )
