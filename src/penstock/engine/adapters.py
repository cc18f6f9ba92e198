"""The LoRA adapters that requests may name: loaded at the start or while the engine runs, bounded, counted."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from penstock.engine.config import EngineConfig
from penstock.errors import InvalidRequest, ModelError, ResourceError, UsageError
from penstock.models.adapter_file import AdapterFile
from penstock.models.config import DecoderConfig, WeightMap
from penstock.models.lora import Adapter
from penstock.models.tensors import CPU
from penstock.plan.memory import human


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter that sequences run on. key: of this loading; what is cached under one is of no use to another."""

    weights: Adapter
    key: bytes


class Adapters:
    """Adapters by name. A sequence holds its own, so one that is forgotten here lives until its last sequence ends.

    Of a model in `decoder` (None: it takes no adapters), `names` and `dtype`. room: bytes for all of them. device:
    where they lie.
    """

    def __init__(
        self,
        config: EngineConfig,
        decoder: DecoderConfig | None,
        names: WeightMap,
        dtype: torch.dtype,
        room: int,
        device: torch.device = CPU,
    ) -> None:
        self._config, self._decoder, self._names, self._dtype, self._room = config, decoder, names, dtype, room
        self._device = device
        self._numbers = itertools.count()
        self._loaded: dict[str, LoadedAdapter] = {}
        self._alive: weakref.WeakSet[Adapter] = weakref.WeakSet()  # also those that are forgotten but still run

    def load(self, name: str, folder: Path, *, replace: bool = False) -> None:
        """Load an adapter. replace: in the place of one of that name, whose requests finish with it.

        Raises PenstockError, with everything as it was: InvalidRequest where the name is taken, ModelError where the
        adapter does not fit the model, ResourceError where there is no room for it.
        """
        if name in self._loaded and not replace:
            raise InvalidRequest(f"The adapter `{name}` is loaded already.")
        if len(self._loaded) >= self._config.max_adapters and name not in self._loaded:
            raise _too_many(self._config)
        file = _read(folder, self._config, self._decoder, self._names)
        need, taken = file.nbytes(self._dtype), self.nbytes
        if need + taken > self._room:
            raise ResourceError(
                f"There is too little memory for the adapter: need {human(need)}, have {human(self._room - taken)}.",
                f"Adapters may take {human(self._room)}; those that are loaded or still run take {human(taken)}.",
                "Unload one, or start with a larger --max-adapter-bytes.",
            )
        self.add(name, file)

    def add(self, name: str, file: AdapterFile) -> None:
        """Load an adapter that was checked already. Raises ModelError."""
        weights = file.load(self._dtype)
        if self._device.type != "cpu":
            weights = weights.to(self._device)
        self._loaded[name] = LoadedAdapter(weights, next(self._numbers).to_bytes(8, "little"))
        self._alive.add(weights)

    def unload(self, name: str) -> None:
        """Forget an adapter. Raises InvalidRequest where there is none of that name."""
        self.find(name)
        del self._loaded[name]

    def find(self, name: str) -> LoadedAdapter:
        """The adapter of that name. Raises InvalidRequest."""
        found = self._loaded.get(name)
        if found is None:
            names = ", ".join(self._loaded) or "none"
            raise InvalidRequest(f"there is no adapter `{name[:200]}`; loaded: {names}")
        return found

    @property
    def nbytes(self) -> int:
        """What adapters take in memory now."""
        return sum(adapter.nbytes for adapter in self._alive)


def read_given(config: EngineConfig, decoder: DecoderConfig | None, names: WeightMap) -> dict[str, AdapterFile]:
    """The adapters that the engine starts with, checked but for their numbers. Raises PenstockError."""
    if config.max_adapters < 1 or config.max_adapter_rank < 1:
        raise UsageError("--max-adapters and --max-adapter-rank must be at least 1")
    if len(config.adapters) > config.max_adapters:
        raise _too_many(config)
    return {name: _read(Path(folder), config, decoder, names) for name, folder in config.adapters.items()}


def planned_bytes(config: EngineConfig, given: Mapping[str, AdapterFile], dtype: torch.dtype) -> int:
    """Memory that is set aside for adapters. Raises ResourceError where those that are given need more."""
    need = sum(file.nbytes(dtype) for file in given.values())
    most = need if config.max_adapter_bytes is None else config.max_adapter_bytes
    if need > most:
        raise ResourceError(
            f"The adapters take {human(need)}, more than {human(most)}.", hint=f"Allow --max-adapter-bytes {need}"
        )
    return most


def _read(folder: Path, config: EngineConfig, decoder: DecoderConfig | None, names: WeightMap) -> AdapterFile:
    if decoder is None:
        raise ModelError(
            "This model takes no adapters.", "Those are for decoder-only families that Penstock describes."
        )
    file = AdapterFile.read(folder, decoder, names)
    if file.rank > config.max_adapter_rank:
        raise ResourceError(
            f"The adapter {folder} has rank {file.rank}, more than {config.max_adapter_rank}.",
            hint=f"Allow it with --max-adapter-rank {file.rank}",
        )
    return file


def _too_many(config: EngineConfig) -> ResourceError:
    return ResourceError(
        f"There may be {config.max_adapters} adapters at a time.",
        hint="Unload one, or start with a larger --max-adapters.",
    )
