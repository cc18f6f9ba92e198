"""From bytes on disk to the packed weights of an encoder-decoder, one tensor in memory at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from penstock.formats import Format
from penstock.formats.dense import Linear
from penstock.hub.checkpoint import TensorEntry
from penstock.kernels.relative import BiasBehind, bias_table
from penstock.kernels.stored import Matrix
from penstock.models.encoder_decoder.config import EncoderDecoderConfig
from penstock.models.mlp import GatedMlp, Mlp, PlainMlp
from penstock.models.norms import RmsNorm
from penstock.models.tensors import CPU, RandomReader, TensorReader

HEAD = "lm_head.weight"
_TABLES = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")  # where several, all the same


class Names(Protocol):
    """The tensors that a checkpoint has."""

    def __contains__(self, name: str, /) -> bool: ...


@dataclass(frozen=True)
class SelfAttention:
    """Norm and products of a layer's attention to its own tokens."""

    norm: RmsNorm
    qkv: Linear
    out: Linear


@dataclass(frozen=True)
class CrossAttention:
    """A decoder layer's attention to what the encoder made. kv: from there, keys first."""

    norm: RmsNorm
    q: Linear
    kv: Linear
    out: Linear


@dataclass(frozen=True)
class FeedForward:
    """The last part of a layer."""

    norm: RmsNorm
    mlp: Mlp


@dataclass(frozen=True)
class EncoderLayer:
    """One layer of the encoder. bias: a table of both ways, see `bias_table`."""

    attention: SelfAttention
    bias: Tensor
    feed_forward: FeedForward


@dataclass(frozen=True)
class DecoderLayer:
    """One layer of the decoder."""

    attention: SelfAttention
    bias: BiasBehind
    cross: CrossAttention
    feed_forward: FeedForward


@dataclass(frozen=True)
class EncoderDecoderWeights:
    """All of it. embedding: [vocab, hidden], of both stacks."""

    embedding: Tensor
    encoder: list[EncoderLayer]
    encoder_norm: RmsNorm
    decoder: list[DecoderLayer]
    decoder_norm: RmsNorm
    head: Linear


def load_encoder_decoder(
    entries: dict[str, TensorEntry] | None,
    config: EncoderDecoderConfig,
    dtype: torch.dtype,
    form: Format,
    positions: int,
    device: torch.device = CPU,
) -> EncoderDecoderWeights:
    """Read and pack every tensor. Raises ModelError for what does not fit.

    entries: of the checkpoint, or None for random weights. dtype: what is computed in; form: how matrices are stored;
    positions: of the longest answer; device: where all of it will be.
    """
    read = RandomReader(dtype, device) if entries is None else TensorReader(entries, dtype, device)
    return _Loader(read, config, form, positions).all()


def embedding_tensor(names: Names) -> str:
    """Where a checkpoint with these tensors keeps the table of the vocabulary."""
    return next((name for name in _TABLES if name in names), _TABLES[0])


def is_read(name: str, names: Names) -> bool:
    """Whether a tensor of a checkpoint with these `names` is read; a table that is stored again is not."""
    return name not in _TABLES or name == embedding_tensor(names)


class _Loader:
    """Builds the two stacks from a checkpoint."""

    def __init__(
        self, read: TensorReader | RandomReader, config: EncoderDecoderConfig, form: Format, positions: int
    ) -> None:
        self.read, self.config, self.form, self.positions = read, config, form, positions

    def all(self) -> EncoderDecoderWeights:
        c = self.config
        shape = (c.vocab_size, c.hidden_size)
        embedding = self.read(embedding_tensor(self.read), shape)
        encoder: list[EncoderLayer] = []
        for i in range(c.encoder_layers):
            prefix = f"encoder.block.{i}.layer."
            around = self.bias(prefix, True) if i == 0 or c.bias_in_each_layer else encoder[0].bias
            encoder.append(EncoderLayer(self.attention(prefix), around, self.feed_forward(f"{prefix}1.")))
        decoder: list[DecoderLayer] = []
        for i in range(c.decoder_layers):
            prefix = f"decoder.block.{i}.layer."
            own = i == 0 or c.bias_in_each_layer
            behind = BiasBehind.of(self.bias(prefix, False), self.positions) if own else decoder[0].bias
            cross, last = self.cross(f"{prefix}1."), self.feed_forward(f"{prefix}2.")
            decoder.append(DecoderLayer(self.attention(prefix), behind, cross, last))
        head = self.read(HEAD, shape) if HEAD in self.read else embedding
        return EncoderDecoderWeights(
            embedding=embedding,
            encoder=encoder,
            encoder_norm=self.norm("encoder.final_layer_norm"),
            decoder=decoder,
            decoder_norm=self.norm("decoder.final_layer_norm"),
            head=self.form.load(head),
        )

    def norm(self, name: str) -> RmsNorm:
        return RmsNorm(self.read(f"{name}.weight", (self.config.hidden_size,)), self.config.norm_eps)

    def products(self, prefix: str, names: tuple[str, ...]) -> Linear:
        """Matrices that multiply a layer's input, stacked."""
        inner, hidden = self.config.inner_size, self.config.hidden_size
        return self.form.load(self.read.matrix([(f"{prefix}{name}.weight", inner) for name in names], hidden))

    def out(self, prefix: str) -> Linear:
        return self.form.load(self.matrix(f"{prefix}o", self.config.hidden_size, self.config.inner_size))

    def matrix(self, name: str, rows: int, columns: int) -> Matrix:
        return self.read.matrix([(f"{name}.weight", rows)], columns)

    def bias(self, prefix: str, both_ways: bool) -> Tensor:
        c, name = self.config, f"{prefix}0.SelfAttention.relative_attention_bias.weight"
        return bias_table(self.read(name, (c.buckets, c.num_heads)), c.max_distance, both_ways)

    def attention(self, prefix: str) -> SelfAttention:
        parts = f"{prefix}0.SelfAttention."
        return SelfAttention(self.norm(f"{prefix}0.layer_norm"), self.products(parts, ("q", "k", "v")), self.out(parts))

    def cross(self, prefix: str) -> CrossAttention:
        parts = f"{prefix}EncDecAttention."
        return CrossAttention(
            self.norm(f"{prefix}layer_norm"),
            self.products(parts, ("q",)),
            self.products(parts, ("k", "v")),
            self.out(parts),
        )

    def feed_forward(self, prefix: str) -> FeedForward:
        c, parts = self.config, f"{prefix}DenseReluDense."
        wide, narrow = (c.intermediate_size, c.hidden_size), (c.hidden_size, c.intermediate_size)
        down = self.form.load(self.matrix(f"{parts}wo", *narrow))
        mlp: Mlp
        if c.gated:
            gate, up = self.matrix(f"{parts}wi_0", *wide), self.matrix(f"{parts}wi_1", *wide)
            mlp = GatedMlp(self.form.load_gated(gate, up, c.activation), down)
        else:
            mlp = PlainMlp(self.form.load(self.matrix(f"{parts}wi", *wide)), c.activation, down)
        return FeedForward(self.norm(f"{prefix}layer_norm"), mlp)
