"""From bytes on disk to the decoder's packed weights, one tensor in memory at a time."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from penstock.errors import ModelError
from penstock.formats import Format
from penstock.formats.dense import Gated, Linear
from penstock.hub.checkpoint import TensorEntry
from penstock.models.config import DecoderConfig, WeightMap

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer, ready to multiply. Norm weights: [hidden] or [head_dim]."""

    attention_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Linear
    mlp_norm: Tensor
    gate_up: Gated
    down: Linear


@dataclass(frozen=True)
class DecoderWeights:
    """A whole decoder. embedding: [vocab, hidden]."""

    embedding: Tensor
    layers: list[LayerWeights]
    final_norm: Tensor
    head: Linear


class TensorReader:
    """Reads single tensors of a checkpoint, checking name, type and shape.

    The file is read, not mapped: a file cut short under our feet is then an error and not a signal.
    """

    def __init__(self, entries: dict[str, TensorEntry], dtype: torch.dtype) -> None:
        self.entries, self.dtype = entries, dtype

    def __call__(self, name: str, shape: tuple[int, ...], out: Tensor | None = None) -> Tensor:
        """The tensor in the working type, in `out` where it is given (contiguous, of that shape and type).

        Raises ModelError when it is absent, misshapen or cut short.
        """
        entry = self.entries.get(name)
        if entry is None:
            raise ModelError(
                f"the checkpoint has no tensor {name!r}", "it does not fit its config.json", "download the model again"
            )
        if entry.shape != shape:
            raise ModelError(
                f"{entry.file.name}: tensor {name!r} has shape {list(entry.shape)}",
                f"config.json asks for {list(shape)}",
                "download the model again, config.json and weights from one revision",
            )
        if entry.dtype not in _DTYPES:
            raise ModelError(f"{entry.file.name}: tensor {name!r} has type {entry.dtype}, which cannot be computed in")
        out = torch.empty(shape, dtype=self.dtype) if out is None else out
        stored = _DTYPES[entry.dtype]
        raw = out if stored == self.dtype else torch.empty(shape, dtype=stored)
        _read_into(entry.file, entry.start, raw.view(-1).view(torch.uint8))
        return out if raw is out else out.copy_(raw)


class RandomReader:
    """Stands in for a TensorReader where there is no checkpoint: every tensor is random, every norm's weight is one.

    The numbers repeat after a prime number of them, so that no two rows of a matrix are alike and a gigabyte takes a
    moment.
    """

    _PERIOD = 999_983
    _SPREAD = 0.02

    def __init__(self, dtype: torch.dtype) -> None:
        self.entries: dict[str, TensorEntry] = {}
        generator = torch.Generator().manual_seed(0)
        self._numbers = (torch.randn(self._PERIOD, generator=generator) * self._SPREAD).to(dtype)

    def __call__(self, name: str, shape: tuple[int, ...], out: Tensor | None = None) -> Tensor:
        out = torch.empty(shape, dtype=self._numbers.dtype) if out is None else out
        if len(shape) == 1:
            return out.fill_(0.0 if name.endswith(".bias") else 1.0)
        for part in out.view(-1).split(self._PERIOD):
            part.copy_(self._numbers[: len(part)])
        return out


def load_decoder(
    entries: dict[str, TensorEntry] | None, config: DecoderConfig, names: WeightMap, dtype: torch.dtype, form: Format
) -> DecoderWeights:
    """Read and pack every tensor of the decoder. Raises ModelError for what does not fit.

    entries: of the checkpoint, or None for random weights. dtype: what is computed in; form: how the matrices are
    stored.
    """
    read = RandomReader(dtype) if entries is None else TensorReader(entries, dtype)
    hidden, wide = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    def matrix(
        prefix: str, parts: tuple[str, ...], rows: tuple[int, ...], columns: int, bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        """`parts` of so many `rows` each, stacked along the output axis, and their bias."""
        weights = torch.empty((sum(rows), columns), dtype=dtype)
        biases = torch.empty(sum(rows), dtype=dtype) if bias else None
        for part, n, weight in zip(parts, rows, weights.split(list(rows)), strict=True):
            read(f"{prefix}{part}.weight", (n, columns), weight)
        if biases is not None:
            for part, n, slot in zip(parts, rows, biases.split(list(rows)), strict=True):
                read(f"{prefix}{part}.bias", (n,), slot)
        return weights, biases

    layers = []
    for i in range(config.num_layers):
        prefix = names.layer.format(i=i)
        gate, gate_bias = matrix(prefix, names.gate, (wide,), hidden, config.mlp_bias)
        up, up_bias = matrix(prefix, names.up, (wide,), hidden, config.mlp_bias)
        layers.append(
            LayerWeights(
                attention_norm=read(prefix + names.attention_norm, (hidden,)),
                qkv=form.load(*matrix(prefix, names.qkv, (q, kv, kv), hidden, config.qkv_bias)),
                q_norm=read(prefix + names.q_norm, (config.head_dim,)) if config.qk_norm else None,
                k_norm=read(prefix + names.k_norm, (config.head_dim,)) if config.qk_norm else None,
                out=form.load(*matrix(prefix, names.out, (hidden,), q, config.out_bias)),
                mlp_norm=read(prefix + names.mlp_norm, (hidden,)),
                gate_up=form.load_gated(gate, up, config.activation, gate_bias, up_bias),
                down=form.load(*matrix(prefix, names.down, (hidden,), wide, config.mlp_bias)),
            )
        )
    embedding = read(names.embedding, (config.vocab_size, hidden))
    head = _head(read, config, names, embedding)
    return DecoderWeights(embedding, layers, read(names.final_norm, (hidden,)), form.load(head))


def _head(read: TensorReader | RandomReader, config: DecoderConfig, names: WeightMap, embedding: Tensor) -> Tensor:
    """The output matrix [vocab, hidden]. A checkpoint that says it is tied but stores another one means the other."""
    if config.tie_head and names.head not in read.entries:
        return embedding
    head = read(names.head, (config.vocab_size, config.hidden_size))
    return embedding if config.tie_head and torch.equal(head, embedding) else head


def _read_into(path: Path, offset: int, buffer: Tensor) -> None:
    """Fill a byte tensor from a file. Raises ModelError when the file ends early or cannot be read."""
    view = memoryview(buffer.numpy())  # type: ignore[arg-type]
    try:
        with open(path, "rb", buffering=0) as file:
            done = 0
            while done < len(view):
                n = os.preadv(file.fileno(), [view[done:]], offset + done)
                if n == 0:
                    raise ModelError(f"{path.name} ends early", "the file is truncated", "download the model again")
                done += n
    except OSError as error:
        raise ModelError(f"cannot read {path.name}", error.strerror or "", "check the file's permissions") from None
