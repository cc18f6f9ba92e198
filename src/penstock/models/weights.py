"""From bytes on disk to the decoder's packed weights, one tensor in memory at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.formats import Format
from penstock.formats.dense import Linear, Plain
from penstock.hub.checkpoint import TensorEntry
from penstock.kernels.attention import alibi_table
from penstock.kernels.stored import Matrix
from penstock.models.attention import Attention
from penstock.models.attention_weights import load_out, load_qkv
from penstock.models.config import DecoderConfig, ExpertsConfig, WeightMap
from penstock.models.experts import Experts, stack
from penstock.models.mlp import GatedMlp, Mlp, PlainMlp
from penstock.models.norms import Norm
from penstock.models.source import Source
from penstock.models.tensors import CPU, RandomReader, TensorReader


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer, ready to compute."""

    attention_norm: Norm | None
    attention: Attention
    out: Linear
    attention_out_norm: Norm | None
    attention_sum_norm: Norm | None
    mlp_norm: Norm | None
    mlp: Mlp
    mlp_out_norm: Norm | None
    mlp_sum_norm: Norm | None


@dataclass(frozen=True)
class DecoderWeights:
    """A whole decoder. embedding: [vocab, embedding_size]; positions: [positions, hidden], learned."""

    embedding: Tensor
    project_in: Linear | None
    positions: Tensor | None
    embedding_norm: Norm | None
    layers: list[LayerWeights]
    final_norm: Norm | None
    project_out: Linear | None
    head: Linear


def load_decoder(
    entries: dict[str, TensorEntry] | None,
    config: DecoderConfig,
    names: WeightMap,
    dtype: torch.dtype,
    form: Format,
    positions: int,
    device: torch.device = CPU,
) -> DecoderWeights:
    """Read and pack every tensor of the decoder. Raises ModelError for what does not fit.

    entries: of the checkpoint, or None for random weights. dtype: what is computed in; form: how the matrices are
    stored; positions: the longest context; device: where all of it will be.
    """
    read = RandomReader(dtype, device) if entries is None else TensorReader(entries, dtype, device)
    source = Source(read, config, names.found_in(entries or ()), form)
    return _Loader(source, positions).decoder()


def load_mlp(source: Source, prefix: str) -> Mlp:
    """The dense MLP of a layer."""
    return _Loader(source, 1).mlp(prefix)


class _Loader:
    """Builds the parts of a decoder from a checkpoint."""

    def __init__(self, source: Source, positions: int) -> None:
        self.source, self.read = source, source.read
        self.config, self.names, self.form = source.config, source.names, source.form
        self.alibi = None
        if self.config.alibi is not None:
            half = self.config.alibi == "half"
            table = alibi_table(self.config.num_heads, positions, self.config.scale(0) if half else 1.0, half)
            self.alibi = table.to(self.read.device)

    def decoder(self) -> DecoderWeights:
        c, names, base = self.config, self.names, self.names.base
        wide = c.embedding_size or c.hidden_size
        layers = [self.layer(i) for i in range(c.num_layers)]
        table = None
        if names.positions is not None and c.positions_offset is not None:
            rows = c.max_positions + c.positions_offset
            table = self.read(f"{base}{names.positions}.weight", (rows, c.hidden_size))[c.positions_offset :]
        embedding = self.read(names.embedding_tensor, (c.vocab_size, wide))
        head_bias = self.read(f"{names.head}.bias", (c.vocab_size,)) if c.head_bias else None
        return DecoderWeights(
            embedding=embedding,
            project_in=self.projection(names.project_in, c.hidden_size, wide),
            positions=table,
            embedding_norm=self.source.norm(base, names.embedding_norm, c.hidden_size),
            layers=layers,
            final_norm=self.source.norm(base, names.final_norm, c.hidden_size),
            project_out=self.projection(names.project_out, wide, c.hidden_size),
            head=self.output(self.head(embedding), head_bias, embedding),
        )

    def layer(self, i: int) -> LayerWeights:
        c, names = self.config, self.names
        prefix = names.base + names.layer.format(i=i)
        experts = c.experts is not None and c.experts.layers[i]
        return LayerWeights(
            attention_norm=self.source.norm(prefix, names.attention_norm, c.hidden_size),
            attention=Attention(
                qkv=load_qkv(self.source, prefix, i),
                scale=c.scale(i),
                window=c.windows[i] if c.windows else None,
                softcap=c.attention_softcap,
                chunk=c.chunks[i] if c.chunks else None,
                alibi=self.alibi,
                temperature=c.temperature if c.ropes[i].kind == "none" else None,
            ),
            out=load_out(self.source, prefix),
            attention_out_norm=self.source.norm(prefix, names.attention_out_norm, c.hidden_size),
            attention_sum_norm=self.source.norm(prefix, names.attention_sum_norm, c.hidden_size),
            mlp_norm=self.source.norm(prefix, names.mlp_norm, c.hidden_size),
            mlp=self.experts(prefix) if experts else self.mlp(prefix),
            mlp_out_norm=self.source.norm(prefix, names.mlp_out_norm, c.hidden_size),
            mlp_sum_norm=self.source.norm(prefix, names.mlp_sum_norm, c.hidden_size),
        )

    def projection(self, name: str | None, rows: int, columns: int) -> Linear | None:
        if name is None:
            return None
        return self.form.load(*self.source.matrix(self.names.base, (name,), (rows,), columns, False))

    def mlp(self, prefix: str) -> Mlp:
        c, names = self.config, self.names
        wide, hidden = c.intermediate_size, c.hidden_size
        if not c.gated:
            up = self.form.load(*self.source.matrix(prefix, (names.up,), (wide,), hidden, c.mlp_bias))
            down = self.form.load(*self.source.matrix(prefix, (names.down,), (hidden,), wide, c.mlp_bias))
            return PlainMlp(up, c.activation, down)
        return self.gated(prefix, names.gate, names.up, names.gate_up, names.down, wide, c.mlp_bias)

    def gated(
        self, prefix: str, gate: str, up: str, gate_up: str | None, down: str, wide: int, bias: bool = False
    ) -> GatedMlp:
        hidden = self.config.hidden_size
        if gate_up is None:
            first, first_bias = self.source.matrix(prefix, (gate,), (wide,), hidden, bias)
            second, second_bias = self.source.matrix(prefix, (up,), (wide,), hidden, bias)
        else:
            both, both_bias = self.source.matrix(prefix, (gate_up,), (2 * wide,), hidden, bias)
            first, second = both.split(wide)
            first_bias, second_bias = (None, None) if both_bias is None else both_bias.split(wide)
        return GatedMlp(
            self.form.load_gated(first, second, self.config.activation, first_bias, second_bias),
            self.form.load(*self.source.matrix(prefix, (down,), (hidden,), wide, bias)),
        )

    def experts(self, prefix: str) -> Experts:
        c, names = self.config, self.names
        assert c.experts is not None  # noqa: S101 (layer)
        e, hidden = c.experts, c.hidden_size
        correction = f"{prefix}{names.router}.e_score_correction_bias"
        shared = shared_gate = None
        if e.shared_size:
            parts = names.shared_gate, names.shared_up, names.shared_gate_up, names.shared_down
            shared = self.gated(prefix, *parts, e.shared_size)
        if e.shared_gate:
            shared_gate = Plain(self.read(f"{prefix}{names.shared_expert_gate}.weight", (1, hidden)), None)
        stacked, experts = stack([self.expert(prefix, i, e) for i in range(e.count)])
        return Experts(
            config=e,
            router=Plain(self.read(f"{prefix}{names.router}.weight", (e.count, hidden)), None),
            correction=self.read(correction, (e.count,)) if correction in self.read else None,
            experts=experts,
            stacked=stacked,
            shared=shared,
            shared_gate=shared_gate,
        )

    def expert(self, prefix: str, i: int, e: ExpertsConfig) -> Mlp:
        names, hidden, wide = self.names, self.config.hidden_size, e.intermediate_size
        if names.experts_gate_up is None or names.experts_down is None:
            gate, up, down = (name.format(e=i) for name in (names.expert_gate, names.expert_up, names.expert_down))
            return self.gated(prefix, gate, up, None, down, wide)

        def stacked(name: str, rows: int, columns: int) -> Tensor:
            if names.experts_transposed:
                return self.read(prefix + name, (columns, rows), part=(i, e.count)).T.contiguous()
            return self.read(prefix + name, (rows, columns), part=(i, e.count))

        first, second = stacked(names.experts_gate_up, 2 * wide, hidden).split(wide)
        return GatedMlp(
            self.form.load_gated(first, second, self.config.activation),
            self.form.load(stacked(names.experts_down, hidden, wide)),
        )

    def output(self, head: Matrix, bias: Tensor | None, embedding: Tensor) -> Linear:
        """The product with the output matrix. A float32 table serves as that too: a packed copy would be as large."""
        if head is embedding and embedding.dtype == torch.float32 and self.form.weight_bytes is None:
            return Plain(embedding, bias)
        return self.form.load(head, bias)

    def head(self, embedding: Tensor) -> Matrix:
        """The output matrix. A checkpoint that says it is tied but stores another one means the other."""
        name = self.names.head_tensor
        if not self.config.tie_head:
            return self.read.matrix([(name, len(embedding))], embedding.shape[1])
        if name not in self.read:
            return embedding
        head = self.read(name, tuple(embedding.shape))
        return embedding if torch.equal(head, embedding) else head
