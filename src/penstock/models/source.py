"""A checkpoint as a family's names see it: matrices and norms by their canonical names."""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.formats import Format
from penstock.kernels.stored import Matrix
from penstock.models.config import DecoderConfig, NormConfig, WeightMap
from penstock.models.norms import LayerNorm, Norm, RmsNorm
from penstock.models.tensors import RandomReader, TensorReader, fresh


class Source:
    """Reads what a decoder is built of. form: how matrices are stored once they are read."""

    def __init__(
        self, read: TensorReader | RandomReader, config: DecoderConfig, names: WeightMap, form: Format
    ) -> None:
        self.read, self.config, self.names, self.form, self.dtype = read, config, names, form, read.dtype

    def norm(self, prefix: str, name: str | None, size: int, config: NormConfig | None = None) -> Norm | None:
        """A norm over `size` numbers, None for one that is not there."""
        if name is None:
            return None
        c = config or self.config.norm
        weight = self.read(f"{prefix}{name}.weight", (size,)) if c.weight else None
        bias = self.read(f"{prefix}{name}.bias", (size,)) if c.bias else None
        return make_norm(c, weight, bias, size, self.dtype, self.read.device)

    def matrix(
        self, prefix: str, parts: tuple[str, ...], rows: tuple[int, ...], columns: int, bias: bool
    ) -> tuple[Matrix, Tensor | None]:
        """`parts` of so many `rows` each, stacked along the output axis, and their bias."""
        biases = torch.empty(sum(rows), dtype=self.dtype, device=self.read.device) if bias else None
        if biases is not None:
            for part, n, slot in zip(parts, rows, biases.split(list(rows)), strict=True):
                self.read(f"{prefix}{part}.bias", (n,), slot)
        named = [(f"{prefix}{part}.weight", n) for part, n in zip(parts, rows, strict=True)]
        if not self.names.transposed:
            return self.read.matrix(named, columns), biases
        weights = fresh((sum(rows), columns), self.dtype, self.read.device)
        for (name, n), weight in zip(named, weights.split(list(rows)), strict=True):
            weight.copy_(self.read(name, (columns, n)).T)
        return weights, biases


def make_norm(
    config: NormConfig,
    weight: Tensor | None,
    bias: Tensor | None,
    size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Norm:
    """A norm over `size` numbers from what is stored of it."""
    if weight is not None and config.offset:
        weight = (weight.float() + config.offset).to(dtype)
    if config.kind == "layer":
        return LayerNorm(weight, bias, config.eps)
    return RmsNorm(torch.ones(size, dtype=dtype, device=device) if weight is None else weight, config.eps)
