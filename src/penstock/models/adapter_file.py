"""A LoRA adapter as PEFT writes it: adapter_config.json beside adapter_model.safetensors.

What the tensors are for is read off their names, not off `target_modules`, so every way to write that works.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from penstock.errors import ModelError
from penstock.hub.checkpoint import TensorEntry, read_file
from penstock.models.adapter_settings import CONFIG, AdapterSettings, damaged, unsupported
from penstock.models.adapter_targets import Target, targets
from penstock.models.config import DecoderConfig, WeightMap
from penstock.models.lora import Adapter, LowRank
from penstock.models.tensors import TensorReader

WEIGHTS = "adapter_model.safetensors"
_TENSOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.{1,300})\.lora_(?P<side>[AB])(?:\.default)?\.weight")
_STACKED = re.compile(r".*\.experts(?:\.base_layer)*")  # modules whose matrices are those of all experts
_ALIASES = {"block_sparse_moe.gate": "mlp.gate"}  # modules that transformers calls otherwise than the files


@dataclass(frozen=True)
class Module:
    """What an adapter has for one module of its model. a: [rank, in]; b: [out, rank]"""

    name: str
    a: TensorEntry
    b: TensorEntry

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs) of the matrix that it is for."""
        return self.b.shape[0], self.a.shape[1]


@dataclass(frozen=True)
class Part:
    """A module's term, or an expert's share of it. rank, scale: of one product.

    expert: (number, count) where the module has all experts of a layer; flipped: their matrices are [in, out].
    """

    module: Module
    rank: int
    scale: float
    expert: tuple[int, int] | None = None
    flipped: bool = False


@dataclass(frozen=True)
class Place:
    """A product of the decoder that an adapter changes. parts: what is added, and to which of its outputs."""

    layer: int
    target: Target
    parts: list[tuple[slice, Part]]

    @property
    def rank(self) -> int:
        """Of the whole product's term."""
        return sum(part.rank for _, part in self.parts)


@dataclass(frozen=True)
class AdapterFile:
    """An adapter on disk that fits a model: everything is checked but the numbers."""

    folder: Path
    layers: int
    places: list[Place]

    @classmethod
    def read(cls, folder: Path, config: DecoderConfig, names: WeightMap) -> AdapterFile:
        """Read the configuration and the header. Raises ModelError for what is damaged, does not fit or cannot be
        computed."""
        settings = AdapterSettings.read(folder)
        listed = _modules(folder)
        modules = {_inside(module.name, names): module for module in listed}
        if len(modules) < len(listed):
            raise damaged(folder, "it has two terms for one matrix", WEIGHTS)
        return cls(folder, config.num_layers, _places(folder, settings, modules, config, names))

    @property
    def rank(self) -> int:
        """The largest of its matrices."""
        return max(part.rank for place in self.places for _, part in place.parts)

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes that it will take in memory."""
        sizes = (place.rank * (place.target.columns + sum(place.target.rows)) for place in self.places)
        return sum(sizes) * dtype.itemsize

    def load(self, dtype: torch.dtype) -> Adapter:
        """Read the numbers. Raises ModelError for a file cut short meanwhile, or numbers that are none."""
        layers: list[dict[str, LowRank]] = [{} for _ in range(self.layers)]
        read = _Reader()
        for place in self.places:
            layers[place.layer][place.target.slot] = _load(self.folder, place, dtype, read)
        return Adapter(layers)


def _modules(folder: Path) -> list[Module]:
    """The modules that the adapter has terms for."""
    if not (folder / WEIGHTS).exists():
        why = f"It has no {WEIGHTS}."
        if (folder / "adapter_model.bin").exists():
            why = "Its weights are a pickle (adapter_model.bin), which can run code when read, so it is never loaded."
        hint = "Save it with PEFT 0.6 or later, which writes safetensors."
        raise ModelError(f"The adapter {folder} cannot be loaded.", why, hint)
    pairs: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in read_file(folder, WEIGHTS).items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise unsupported(folder, f"its tensor {name[:120]!r} is no LoRA matrix of a layer")
        pairs.setdefault(match["module"], {})[match["side"]] = entry
    if not pairs:
        raise damaged(folder, "it has no tensors", WEIGHTS)
    for name, pair in pairs.items():
        if len(pair) < 2:
            raise damaged(folder, f"{name[:120]!r} has only one of its two matrices", WEIGHTS)
        a, b = pair["A"].shape, pair["B"].shape
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not a[0]:
            raise damaged(folder, f"{name[:120]!r} has matrices of {list(a)} and {list(b)}", WEIGHTS)
    return [Module(name, pair["A"], pair["B"]) for name, pair in pairs.items()]


def _inside(module: str, names: WeightMap) -> str:
    """A module's name without what stands before the layers, however much of the model was wrapped."""
    bare = names.base.removeprefix("model.")
    for base in (f"language_model.{names.base}", "model.language_model.", names.base, bare):
        if base and module.startswith(base):
            return module[len(base) :]
    return module


def _places(
    folder: Path, settings: AdapterSettings, modules: Mapping[str, Module], config: DecoderConfig, names: WeightMap
) -> list[Place]:
    """Where each module belongs in the decoder. modules: by their names inside it.

    Raises ModelError for one that belongs nowhere.
    """
    left, found = set(modules), []
    for layer in range(config.num_layers):
        prefix = names.layer.format(i=layer)
        stacked = [name for name in modules if name.startswith(prefix) and _STACKED.fullmatch(name)]
        for target in targets(config, names, layer):
            parts: list[tuple[slice, Part]] = []
            start = 0
            for name, rows in zip(target.names, target.rows, strict=True):
                known = next((n for n in (prefix + name, prefix + _ALIASES.get(name, name)) if n in modules), None)
                if known is not None:
                    module = modules[known]
                    _check_shape(folder, module, rows, target.columns)
                    parts.append((slice(start, start + rows), _part(folder, settings, module, module.name)))
                    left.discard(known)
                start += rows
            for name in stacked if target.expert is not None else ():
                share = _share(folder, settings, modules[name], target)
                if share is not None:
                    parts.append((slice(0, start), share))
                    left.discard(name)
            if parts:
                found.append(Place(layer, target, parts))
    if left:
        raise unsupported(
            folder,
            f"{min(left)[:120]!r} is no matrix of the {config.num_layers} layers of this {config.family} model",
            "Is it an adapter of another model? Embeddings, heads and towers cannot be adapted.",
        )
    return found


def _part(folder: Path, settings: AdapterSettings, module: Module, matrix: str, count: int = 1) -> Part:
    """The term of a module. matrix: by which name the settings know it; count: of experts in it."""
    stacked = module.a.shape[0]
    rank = settings.rank_of(matrix)
    if rank * count != stacked:
        why = f"{module.name[:120]!r} has rank {stacked / count:g}, but {CONFIG} says {rank:g}"
        raise damaged(folder, why, WEIGHTS)
    return Part(module, stacked // count, settings.scale_of(matrix))


def _share(folder: Path, settings: AdapterSettings, module: Module, target: Target) -> Part | None:
    """An expert's share of a module of all experts of a layer; None where that is for another matrix of theirs.

    Which one is told by its shape alone: the two of one layer have names that say nothing.
    """
    assert target.expert is not None  # noqa: S101 (the caller's)
    rows, columns = sum(target.rows), target.columns
    if module.shape not in ((rows, columns), (columns, rows)):
        return None
    parameter = "gate_up_proj" if len(target.rows) > 1 else "down_proj"
    part = _part(folder, settings, module, f"{module.name.partition('.base_layer')[0]}.{parameter}", target.expert[1])
    return replace(part, expert=target.expert, flipped=module.shape != (rows, columns))


def _check_shape(folder: Path, module: Module, rows: int, columns: int) -> None:
    if module.shape != (rows, columns):
        raise ModelError(
            f"The adapter {folder} does not fit this model.",
            f"Its {module.name} is {module.shape[0]} x {module.shape[1]}; the model's matrix is {rows} x {columns}.",
            "Give the adapter's own base model.",
        )


class _Reader:
    """Reads tensors as float32; keeps the last few, which the experts of a layer share."""

    def __init__(self) -> None:
        self._last: dict[str, Tensor] = {}

    def __call__(self, entry: TensorEntry) -> Tensor:
        if entry.name not in self._last:
            if len(self._last) >= 4:
                self._last.clear()
            self._last[entry.name] = TensorReader({entry.name: entry}, torch.float32)(entry.name, entry.shape)
        return self._last[entry.name]

    def pair(self, part: Part) -> tuple[Tensor, Tensor]:
        """[rank, in] and [out, rank], scaled."""
        a, b = self(part.module.a), self(part.module.b)
        if part.expert is not None:  # PEFT: A goes by expert, then rank; B by rank, then expert
            number, count = part.expert
            a, b = a.view(count, part.rank, -1)[number], b.view(len(b), part.rank, count)[:, :, number]
        a, b = (b.T, a.T) if part.flipped else (a, b)
        return a, b * part.scale


def _load(folder: Path, place: Place, dtype: torch.dtype, read: _Reader) -> LowRank:
    """The term of one product: A's on top of each other, B's beside and below each other."""
    target = place.target
    a = torch.empty((place.rank, target.columns))
    b = torch.zeros((sum(target.rows), place.rank))
    first = 0
    for rows, part in place.parts:
        columns = slice(first, first + part.rank)
        a[columns], b[rows, columns] = read.pair(part)
        first += part.rank
    if not (bool(torch.isfinite(a).all()) and bool(torch.isfinite(b).all())):
        raise damaged(folder, f"layer {place.layer} has numbers that are none", WEIGHTS)
    return LowRank(target.columns_of_a(a).to(dtype).contiguous(), target.rows_of_b(b).to(dtype).contiguous())
