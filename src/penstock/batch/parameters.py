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
_NEUTRAL = {"repetition_penalty": 1.0, "frequency_penalty": 0.0, "watermark": False}
_DRAWING = {"top_k": 0, "top_p": 1.0, "typical_p": 1.0}


class Parameters(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """How to generate; None is unset. A row's own value wins over the run's.

    temperature 0 is greedy. Unset, it is greedy too, unless top_k, top_p, typical_p or do_sample ask for draws, which
    then happen at temperature 1. A row without a seed draws from a stream of its own, made from the run's seed and
    the row's id, so that a rerun, a resumed run and any other batch give the same text. grammar: what the text must
    match, as {"kind": "json_schema", "value": {...}}; see GrammarSpec.
    """

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    do_sample: bool | None = None
    watermark: bool | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None
    grammar: GrammarSpec | None = None

    def over(self, run: Parameters) -> Parameters:
        """These parameters, with the run's where they are unset. The seed is not inherited: see `seed_of`."""
        merged = {name: _or(getattr(self, name), getattr(run, name)) for name in Parameters.__struct_fields__}
        return Parameters(**{**merged, "seed": self.seed})

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
        sample = self.do_sample if self.do_sample is not None else self.temperature is not None
        return Sampling(do_sample=sample, temperature=_or(self.temperature, 1.0), seed=seed, **fields)

    def request(self, number: int, prompt_ids: list[int], seed: int) -> EngineRequest:
        """The engine's request `number` for a prompt. Raises InvalidRequest for a grammar that cannot be followed."""
        return EngineRequest(
            id=number,
            prompt_ids=prompt_ids,
            max_new_tokens=_or(self.max_new_tokens, DEFAULT_NEW_TOKENS),
            sampling=self.sampling(seed),
            ignore_eos=bool(self.ignore_eos),
            grammar=None if self.grammar is None else Grammar(source_of(self.grammar)),
        )


def seed_of(row: Parameters, run: Parameters, row_id: int | str) -> int:
    """The seed of a row's draws: its own, else one made from the run's seed and the row's id."""
    if row.seed is not None:
        return row.seed
    digest = hashlib.sha256(f"{run.seed or 0}:{row_id}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "little")


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
