"""What can be asked for a row: the same names on the command line, in a row, and in the record of a run."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

from penstock.engine.request import EngineRequest, Grammar, Sampling
from penstock.errors import InvalidRequest
from penstock.text.grammar import GrammarSpec, source_of

DEFAULT_NEW_TOKENS = 128
MAX_STOPS = 64
MAX_SAMPLES = 1024  # of one row
_NEUTRAL = {"repetition_penalty": 1.0, "frequency_penalty": 0.0, "watermark": False}
_DRAWING = {"top_k": 0, "top_p": 1.0, "typical_p": 1.0, "min_p": 0.0}
_STEP = 0x9E3779B97F4A7C15  # between the seeds of a row's samples


class Parameters(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """How to generate; None is unset. A row's own value wins over the run's.

    temperature 0 is greedy. Unset, it is greedy too, unless top_k, top_p, typical_p, min_p or do_sample ask for draws,
    which then happen at temperature 1. A row without a seed draws from a stream of its own, made from the run's seed
    and the row's id, so that a rerun, a resumed run and any other batch give the same text. n: samples of a row, each
    with draws of its own. grammar: what the text must match, as {"kind": "json_schema", "value": {...}}; see
    GrammarSpec. chat: the prompt is a user's message for the model's chat template; system: what goes before it there.
    adapter: the name of the LoRA adapter that the model computes with.
    """

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    typical_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    do_sample: bool | None = None
    watermark: bool | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None
    n: int | None = None
    grammar: GrammarSpec | None = None
    chat: bool | None = None
    system: str | None = None
    adapter: str | None = None

    def over(self, run: Parameters) -> Parameters:
        """These parameters, with the run's where they are unset. The seed is not inherited: see `seed_of`."""
        merged = {name: _or(getattr(self, name), getattr(run, name)) for name in Parameters.__struct_fields__}
        return Parameters(**{**merged, "seed": self.seed})

    def samples(self) -> int:
        """How many texts to generate. Raises InvalidRequest."""
        count = _or(self.n, 1)
        if not 1 <= count <= MAX_SAMPLES:
            raise InvalidRequest(f"`n` must be >= 1 and <= {MAX_SAMPLES}. Given: {count}")
        return count

    def stops(self) -> list[str]:
        """The stop strings. Raises InvalidRequest for an empty one, or too many."""
        found = [self.stop] if isinstance(self.stop, str) else list(self.stop or ())
        if "" in found:
            raise InvalidRequest("`stop` cannot hold an empty string")
        if len(found) > MAX_STOPS:
            raise InvalidRequest(f"`stop` must hold at most {MAX_STOPS} strings. Given: {len(found)}")
        return found

    def sampling(self, seed: int) -> Sampling:
        """The engine's form of these parameters. Bounds are checked by the engine, once, for all front ends."""
        fields = {name: _or(getattr(self, name), neutral) for name, neutral in _NEUTRAL.items()}
        if self.temperature == 0:
            return Sampling(**fields)
        fields |= {name: _or(getattr(self, name), off) for name, off in _DRAWING.items()}
        sample = self.do_sample if self.do_sample is not None else self.temperature is not None or bool(self.min_p)
        return Sampling(do_sample=sample, temperature=_or(self.temperature, 1.0), seed=seed, **fields)

    def request(self, number: int, prompt_ids: list[int], seed: int) -> EngineRequest:
        """The engine's request `number` for a prompt. Raises InvalidRequest for a grammar that cannot be followed."""
        return EngineRequest(
            id=number,
            prompt_ids=prompt_ids,
            max_new_tokens=_or(self.max_new_tokens, DEFAULT_NEW_TOKENS),
            sampling=self.sampling(seed),
            ignore_eos=bool(self.ignore_eos),
            adapter=self.adapter,
            grammar=None if self.grammar is None else Grammar(source_of(self.grammar)),
        )


def seed_of(row: Parameters, run: Parameters, row_id: int | str, sample: int = 0) -> int:
    """The seed of a sample's draws: from the row's own, else one made from the run's seed and the row's id."""
    if row.seed is not None:
        first = row.seed
    else:
        digest = hashlib.sha256(f"{run.seed or 0}:{row_id}".encode("utf-8", "surrogatepass")).digest()
        first = int.from_bytes(digest[:8], "little")
    return (first + sample * _STEP) % 2**64 if sample else first


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
