"""The fields of OpenAI-like requests as the engine's request: the one translation for every route of the family."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import msgspec

from penstock.engine.limits import MAX_LOGIT_BIAS, MAX_STOP_IDS
from penstock.engine.request import EngineRequest, Grammar, Image, Sampling
from penstock.server.body import check_range
from penstock.server.exchange import Exchange
from penstock.server.f32 import rounded
from penstock.server.generation import Generation, nth
from penstock.server.house import House
from penstock.server.openai.models import check_model
from penstock.server.openai.wire import Sampled
from penstock.server.refusal import invalid
from penstock.text.stream import TextStream

MAX_BIAS = 100.0  # OpenAI's bounds of logit_bias
MAX_ALTERNATIVES = 20  # and of top_logprobs
_RANGED = ("max_tokens", "max_completion_tokens", "top_k", "seed")


@dataclass(frozen=True)
class Order:
    """How to generate, checked.

    max_new_tokens: None fills the context. top_n: alternatives a token; prompt_top_n the same for the prompt, None
    where the prompt is not scored. keep: special tokens that belong to the text all the same (marks of tool calls).
    """

    sampling: Sampling
    max_new_tokens: int | None
    stop: list[str]
    include_stop: bool
    skip_special_tokens: bool
    ignore_eos: bool
    stop_ids: list[int]
    min_new_tokens: int
    salt: bytes
    deterministic: bool = False
    adapter: str | None = None
    logprobs: bool = False
    top_n: int = 0
    prompt_top_n: int | None = None
    grammar: Grammar | None = None
    keep: frozenset[int] = frozenset()

    def request(self, house: House, prompt_ids: list[int], images: Sequence[Image] = ()) -> EngineRequest:
        """The engine's request for a prompt. Raises Refusal 422."""
        wanted = 0 if self.max_new_tokens == 0 else house.room(len(prompt_ids), self.max_new_tokens)
        request = EngineRequest(
            id=house.engine.next_id(),
            prompt_ids=prompt_ids,
            max_new_tokens=wanted,
            sampling=self.sampling,
            ignore_eos=self.ignore_eos,
            logprobs=self.logprobs or self.top_n > 0,
            top_n_tokens=self.top_n,
            prompt_logprobs=self.prompt_top_n is not None,
            prompt_top_n=self.prompt_top_n or 0,
            min_new_tokens=min(self.min_new_tokens, wanted),
            stop_ids=self.stop_ids,
            grammar=self.grammar,
            images=list(images),
            priority=house.priority,
            deterministic=self.deterministic,
            adapter=self.adapter,
            salt=self.salt,
        )
        house.check(request)
        return request

    def generations(self, house: House, request: EngineRequest, count: int, arrived: float) -> list[Generation]:
        """Several answers to one prompt, each with draws of its own."""
        return [
            self._generation(house, nth(request, n, house.engine.next_id() if n else request.id), arrived)
            for n in range(count)
        ]

    def _generation(self, house: House, request: EngineRequest, arrived: float) -> Generation:
        stream = TextStream(
            house.tokenizer,
            house.limits.continued(request.prompt_ids),
            self.stop,
            include_stop=self.include_stop,
            skip_special_tokens=self.skip_special_tokens,
            keep=self.keep,
        )
        return Generation(house, request, stream, arrived)


def order(exchange: Exchange, house: House, body: Sampled, raw: bytes) -> Order:
    """The checked order of a body. Raises Refusal: 404 for a model that is not here, 422 with the first rule that is
    broken."""
    for name in _RANGED:
        check_range(name, getattr(body, name, None), f"$.{name}", raw)
    stop = stops(body.stop, house.config.max_stop_sequences, "stop")
    if (body.min_tokens or 0) < 0:
        raise invalid("`min_tokens` must be >= 0", "min_tokens")
    asked = sampling(body)
    _check_ids("logit_bias", asked.logit_bias, MAX_LOGIT_BIAS, house)
    _check_ids("stop_token_ids", body.stop_token_ids or [], MAX_STOP_IDS, house)
    return Order(
        sampling=asked,
        max_new_tokens=body.max_tokens,
        stop=stop,
        include_stop=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
        ignore_eos=bool(body.ignore_eos),
        stop_ids=body.stop_token_ids or [],
        min_new_tokens=body.min_tokens or 0,
        salt=_salt(exchange.salt, body.cache_salt),
        deterministic=bool(body.deterministic),
        adapter=check_model(body.model, house),
    )


def stops(given: str | list[str] | None, most: int, name: str) -> list[str]:
    """Stop strings. Raises Refusal 422 when there are too many."""
    found = [given] if isinstance(given, str) else given or []
    if len(found) > most:
        raise invalid(f"`{name}` supports up to {most} stop sequences. Given: {len(found)}", name)
    return found


def sampling(body: Sampled) -> Sampling:
    """temperature 0 is greedy; without one it samples at 1. top_p 1, typical_p 1, min_p 0 and top_k 0 or -1 are off.

    Raises Refusal 422.
    """
    temperature = 1.0 if body.temperature is None else rounded(body.temperature)
    if temperature < 0:
        raise invalid("`temperature` must be strictly positive, or 0 to be greedy", "temperature")
    top_p = _share(body.top_p, "top_p")
    typical_p = _share(body.typical_p, "typical_p")
    min_p = _bounded(body.min_p, "min_p", 0.0, 0.0, 1.0)
    top_k = body.top_k or 0
    if top_k < -1:
        raise invalid("`top_k` must be strictly positive", "top_k")
    repetition = 1.0 if body.repetition_penalty is None else rounded(body.repetition_penalty)
    if repetition <= 0:
        raise invalid("`repetition_penalty` must be strictly positive", "repetition_penalty")
    found = Sampling(
        repetition_penalty=repetition,
        count_penalty=_bounded(body.frequency_penalty, "frequency_penalty", 0.0, -2.0, 2.0),
        presence_penalty=_bounded(body.presence_penalty, "presence_penalty", 0.0, -2.0, 2.0),
        logit_bias=_bias(body.logit_bias),
    )
    if temperature == 0:
        return found
    return msgspec.structs.replace(
        found,
        do_sample=True,
        temperature=temperature,
        top_p=top_p,
        typical_p=typical_p,
        min_p=min_p,
        top_k=max(top_k, 0),
        seed=_seed(body),
    )


def _seed(body: Sampled) -> int:
    """The given one, or a random one; a deterministic request without one always has the same."""
    if body.seed is not None:
        return body.seed
    return 0 if body.deterministic else secrets.randbits(64)


def answers(body: Sampled, house: House, name: str = "n") -> int:
    """How many answers to a prompt. Raises Refusal 422."""
    given: int | None = getattr(body, name)
    most = house.config.max_concurrent_requests
    if given is not None and not 1 <= given <= most:
        raise invalid(f"`{name}` must be > 0 and <= {most}. Given: {given}", name)
    return given or 1


def alternatives(given: int | None, name: str, house: House) -> int:
    """How many likeliest tokens to show. Raises Refusal 422."""
    most = max(MAX_ALTERNATIVES, house.config.max_top_n_tokens)
    if given is not None and not 0 <= given <= most:
        raise invalid(f"`{name}` must be >= 0 and <= {most}. Given: {given}", name)
    return given or 0


def _bounded(given: float | None, name: str, default: float, low: float, high: float) -> float:
    value = default if given is None else rounded(given)
    if not low <= value <= high:
        raise invalid(f"`{name}` must be >= {low} and <= {high}", name)
    return value


def _share(given: float | None, name: str) -> float:
    value = 1.0 if given is None else rounded(given)
    if not 0 < value <= 1:
        raise invalid(f"`{name}` must be > 0.0 and <= 1.0", name)
    return value


def _bias(given: dict[str, float] | None) -> dict[int, float]:
    found: dict[int, float] = {}
    for key, value in (given or {}).items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise invalid(f"`logit_bias` has token ids as its keys. Given: {key[:64]!r}", "logit_bias")
        if not -MAX_BIAS <= value <= MAX_BIAS:
            raise invalid("`logit_bias` must be >= -100 and <= 100 for every token", "logit_bias")
        if value:
            found[int(key)] = value
    return found


def _check_ids(name: str, ids: Collection[int], most: int, house: House) -> None:
    """The engine's own rules, told by the name that the client knows. Raises Refusal 422."""
    if len(ids) > most:
        raise invalid(f"`{name}` must have at most {most} entries. Given: {len(ids)}", name)
    size = house.limits.vocab_size
    for token_id in ids:
        if not 0 <= token_id < size:
            raise invalid(f"`{name}`: token id {token_id} is outside the vocabulary of {size}", name)


def _salt(salt: bytes, given: str | None) -> bytes:
    """The client's own salt separates its requests further; it never joins them with those of another key."""
    if not given:
        return salt
    return hashlib.sha256(salt + b"\0" + given.encode("utf-8", "surrogatepass")).digest()[:16]
