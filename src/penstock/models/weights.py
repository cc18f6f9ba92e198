"""From bytes on disk to the decoder's packed weights, one tensor in memory at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from penstock.formats import Format
from penstock.formats.dense import Linear
from penstock.hub.checkpoint import TensorEntry
from penstock.kernels.attention import alibi_table
from penstock.kernels.rotary import arrangement
from penstock.models.attention import Attention, FusedQkv, LatentQkv
from penstock.models.config import DecoderConfig, ExpertsConfig, HeadNormConfig, LatentConfig, NormConfig, WeightMap
from penstock.models.experts import Experts
from penstock.models.mlp import GatedMlp, Mlp, PlainMlp
from penstock.models.norms import LayerNorm, Norm, NormOfAll, NormOfEach, NormOfOdd, RmsNorm
from penstock.models.tensors import RandomReader, TensorReader


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
) -> DecoderWeights:
    """Read and pack every tensor of the decoder. Raises ModelError for what does not fit.

    entries: of the checkpoint, or None for random weights. dtype: what is computed in; form: how the matrices are
    stored; positions: the longest context.
    """
    read = RandomReader(dtype) if entries is None else TensorReader(entries, dtype)
    return _Loader(read, config, names.found_in(entries or ()), form, positions).decoder()


class _Loader:
    """Builds the parts of a decoder from a checkpoint."""

    def __init__(
        self, read: TensorReader | RandomReader, config: DecoderConfig, names: WeightMap, form: Format, positions: int
    ) -> None:
        self.read, self.config, self.names, self.form, self.dtype = read, config, names, form, read.dtype
        self.alibi = None
        if config.alibi is not None:
            half = config.alibi == "half"
            self.alibi = alibi_table(config.num_heads, positions, config.scale(0) if half else 1.0, half)

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
            embedding_norm=self.norm(base, names.embedding_norm, c.hidden_size),
            layers=layers,
            final_norm=self.norm(base, names.final_norm, c.hidden_size),
            project_out=self.projection(names.project_out, wide, c.hidden_size),
            head=self.form.load(self.head(embedding), head_bias),
        )

    def layer(self, i: int) -> LayerWeights:
        c, names = self.config, self.names
        prefix = names.base + names.layer.format(i=i)
        experts = c.experts is not None and c.experts.layers[i]
        return LayerWeights(
            attention_norm=self.norm(prefix, names.attention_norm, c.hidden_size),
            attention=Attention(
                qkv=self.qkv(prefix, i) if c.latent is None else self.latent_qkv(prefix, c.latent),
                scale=c.scale(i),
                window=c.windows[i] if c.windows else None,
                softcap=c.attention_softcap,
                chunk=c.chunks[i] if c.chunks else None,
                alibi=self.alibi,
                temperature=c.temperature if c.ropes[i].kind == "none" else None,
            ),
            out=self.out(prefix),
            attention_out_norm=self.norm(prefix, names.attention_out_norm, c.hidden_size),
            attention_sum_norm=self.norm(prefix, names.attention_sum_norm, c.hidden_size),
            mlp_norm=self.norm(prefix, names.mlp_norm, c.hidden_size),
            mlp=self.experts(prefix) if experts else self.mlp(prefix),
            mlp_out_norm=self.norm(prefix, names.mlp_out_norm, c.hidden_size),
            mlp_sum_norm=self.norm(prefix, names.mlp_sum_norm, c.hidden_size),
        )

    def norm(self, prefix: str, name: str | None, size: int, config: NormConfig | None = None) -> Norm | None:
        """A norm over `size` numbers, None for one that is not there."""
        if name is None:
            return None
        c = config or self.config.norm
        weight = self.read(f"{prefix}{name}.weight", (size,)) if c.weight else None
        return make_norm(c, weight, self.read(f"{prefix}{name}.bias", (size,)) if c.bias else None, size, self.dtype)

    def matrix(
        self, prefix: str, parts: tuple[str, ...], rows: tuple[int, ...], columns: int, bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        """`parts` of so many `rows` each, stacked along the output axis, and their bias."""
        weights = torch.empty((sum(rows), columns), dtype=self.dtype)
        biases = torch.empty(sum(rows), dtype=self.dtype) if bias else None
        for part, n, weight in zip(parts, rows, weights.split(list(rows)), strict=True):
            if self.names.transposed:
                weight.copy_(self.read(f"{prefix}{part}.weight", (columns, n)).T)
            else:
                self.read(f"{prefix}{part}.weight", (n, columns), weight)
        if biases is not None:
            for part, n, slot in zip(parts, rows, biases.split(list(rows)), strict=True):
                self.read(f"{prefix}{part}.bias", (n,), slot)
        return weights, biases

    def projection(self, name: str | None, rows: int, columns: int) -> Linear | None:
        if name is None:
            return None
        return self.form.load(*self.matrix(self.names.base, (name,), (rows,), columns, False))

    def qkv(self, prefix: str, i: int) -> FusedQkv:
        c, names = self.config, self.names
        heads = (c.num_heads, c.num_kv_heads, c.num_kv_heads)
        rows = tuple(n * c.head_dim for n in heads) if len(names.qkv) == 3 else (sum(heads) * c.head_dim,)
        weight, bias = self.matrix(prefix, names.qkv, rows, c.hidden_size, c.qkv_bias)
        weight = self.arranged(weight)
        bias = None if bias is None else self.arranged(bias)
        q_norm = k_norm = None
        if c.qk_norm is not None and not (c.qk_norm.rotated_only and c.ropes[i].kind == "none"):
            q_norm = self.head_norm(c.qk_norm, f"{prefix}{names.q_norm}", c.num_heads)
            k_norm = self.head_norm(c.qk_norm, f"{prefix}{names.k_norm}", c.num_kv_heads)
        return FusedQkv(
            self.form.load(weight, bias), c.num_heads, c.num_kv_heads, c.head_width, q_norm, k_norm, c.qkv_clip
        )

    def arranged(self, rows: Tensor) -> Tensor:
        """Rows of q, k and v in our order: all q, all k, all v, and the dimensions of their heads as `head_order` says.

        rows: [(heads + 2 kv_heads) * head_dim, ...], as the checkpoint orders them.
        """
        c = self.config
        order, kv_heads = c.head_order, c.num_kv_heads
        if order is None and not self.names.qkv_grouped:
            return rows
        heads = rows.view(-1, c.head_dim, *rows.shape[1:])
        if self.names.qkv_grouped:
            groups = heads.view(kv_heads, -1, *heads.shape[1:])
            heads = torch.cat([part.flatten(0, 1) for part in groups.tensor_split((-2, -1), dim=1)])
        if order is not None:
            qk, v = heads.split((c.num_heads + kv_heads, kv_heads))
            heads = torch.cat((in_order(qk, 1, order), _widened(v, 1, c.head_width)))
        return heads.flatten(0, 1).contiguous()

    def head_norm(self, config: HeadNormConfig, name: str, heads: int) -> Norm:
        """The norm of q or k. A weight of each head's own lies in one tensor, or in one tensor a head."""
        c, norm = self.config, config.norm
        dim = c.head_dim
        order = c.head_order or list(range(dim))

        def one(size: int, weight: Tensor | None, bias: Tensor | None = None) -> Norm:
            return make_norm(norm, weight, bias, size, self.dtype)

        if not norm.weight:
            made = one(dim, None)
        elif config.over == "all":
            return NormOfAll(one(heads * dim, self.read(f"{name}.weight", (heads * dim,))))
        elif config.over == "each":
            if f"{name}.weight" in self.read:
                weight = self.read(f"{name}.weight", (heads, dim))
            else:
                weight = torch.stack([self.read(f"{name}.norms.{i}.weight", (dim,)) for i in range(heads)])
            weight = in_order(weight, 1, [d for d in order if d >= 0])
            made = NormOfEach(make_norm(replace(norm, weight=False), None, None, dim, self.dtype), weight)
        else:
            real = [d for d in order if d >= 0]
            bias = in_order(self.read(f"{name}.bias", (dim,)), 0, real) if norm.bias else None
            made = one(dim, in_order(self.read(f"{name}.weight", (dim,)), 0, real), bias)
        return made if c.head_width == dim else NormOfOdd(made, dim)

    def latent_qkv(self, prefix: str, latent: LatentConfig) -> LatentQkv:
        """Multi-head latent attention; the names of its tensors are DeepSeek's."""
        c = self.config
        prefix = f"{prefix}self_attn."
        order, count = c.head_order, c.num_heads * c.head_dim

        def query(weight: Tensor) -> Linear:
            heads = weight.view(c.num_heads, c.head_dim, -1)
            return self.form.load(heads.flatten(0, 1) if order is None else in_order(heads, 1, order).flatten(0, 1))

        def norm(name: str, size: int) -> Norm:
            return make_norm(latent.norm, self.read(f"{prefix}{name}.weight", (size,)), None, size, self.dtype)

        queries: tuple[Linear | Norm, ...]
        if latent.q_rank is None:
            queries = (query(self.matrix(prefix, ("q_proj",), (count,), c.hidden_size, False)[0]),)
        else:
            queries = (
                self.form.load(*self.matrix(prefix, ("q_a_proj",), (latent.q_rank,), c.hidden_size, c.qkv_bias)),
                norm("q_a_layernorm", latent.q_rank),
                query(self.matrix(prefix, ("q_b_proj",), (count,), latent.q_rank, False)[0]),
            )
        rank, turned = latent.kv_rank, latent.rotary_dim
        weight, bias = self.matrix(prefix, ("kv_a_proj_with_mqa",), (rank + turned,), c.hidden_size, c.qkv_bias)
        pairs = arrangement(turned, None, c.rope.neighbours) or list(range(turned))
        rows = [*range(rank), *(rank + d for d in pairs)]
        values = c.num_heads * (c.head_dim - turned + latent.value_dim)
        return LatentQkv(
            query=queries,
            down=self.form.load(in_order(weight, 0, rows), None if bias is None else in_order(bias, 0, rows)),
            norm=norm("kv_a_layernorm", rank),
            up=self.form.load(*self.matrix(prefix, ("kv_b_proj",), (values,), rank, False)),
            heads=c.num_heads,
            dim=c.head_width,
            rotary_dim=turned,
            value_dim=latent.value_dim,
        )

    def out(self, prefix: str) -> Linear:
        """The output projection; dimensions that heads have only in our layout get zeros."""
        c = self.config
        dim = c.head_dim if c.latent is None else c.latent.value_dim
        weight, bias = self.matrix(prefix, (self.names.out,), (c.hidden_size,), c.num_heads * dim, c.out_bias)
        if dim != c.head_width:
            weight = _widened(weight.view(c.hidden_size, c.num_heads, dim), 2, c.head_width).flatten(1)
        return self.form.load(weight, bias)

    def mlp(self, prefix: str) -> Mlp:
        c, names = self.config, self.names
        wide, hidden = c.intermediate_size, c.hidden_size
        if not c.gated:
            up = self.form.load(*self.matrix(prefix, (names.up,), (wide,), hidden, c.mlp_bias))
            down = self.form.load(*self.matrix(prefix, (names.down,), (hidden,), wide, c.mlp_bias))
            return PlainMlp(up, c.activation, down)
        return self.gated(prefix, names.gate, names.up, names.gate_up, names.down, wide, c.mlp_bias)

    def gated(
        self, prefix: str, gate: str, up: str, gate_up: str | None, down: str, wide: int, bias: bool = False
    ) -> GatedMlp:
        hidden = self.config.hidden_size
        if gate_up is None:
            first, first_bias = self.matrix(prefix, (gate,), (wide,), hidden, bias)
            second, second_bias = self.matrix(prefix, (up,), (wide,), hidden, bias)
        else:
            both, both_bias = self.matrix(prefix, (gate_up,), (2 * wide,), hidden, bias)
            first, second = both.split(wide)
            first_bias, second_bias = (None, None) if both_bias is None else both_bias.split(wide)
        return GatedMlp(
            self.form.load_gated(first, second, self.config.activation, first_bias, second_bias),
            self.form.load(*self.matrix(prefix, (down,), (hidden,), wide, bias)),
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
            shared_gate = self.read(f"{prefix}{names.shared_expert_gate}.weight", (1, hidden))
        return Experts(
            config=e,
            router=self.read(f"{prefix}{names.router}.weight", (e.count, hidden)),
            correction=self.read(correction, (e.count,)) if correction in self.read else None,
            experts=[self.expert(prefix, i, e) for i in range(e.count)],
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

    def head(self, embedding: Tensor) -> Tensor:
        """The output matrix. A checkpoint that says it is tied but stores another one means the other."""
        name = self.names.head_tensor
        if self.config.tie_head and name not in self.read:
            return embedding
        head = self.read(name, tuple(embedding.shape))
        return embedding if self.config.tie_head and torch.equal(head, embedding) else head


def make_norm(config: NormConfig, weight: Tensor | None, bias: Tensor | None, size: int, dtype: torch.dtype) -> Norm:
    """A norm over `size` numbers from what is stored of it."""
    if weight is not None and config.offset:
        weight = (weight.float() + config.offset).to(dtype)
    if config.kind == "layer":
        return LayerNorm(weight, bias, config.eps)
    return RmsNorm(torch.ones(size, dtype=dtype) if weight is None else weight, config.eps)


def in_order(x: Tensor, axis: int, order: list[int]) -> Tensor:
    """x with its entries along an axis as `order` names them; -1 is an entry of zeros."""
    picked = x.index_select(axis, torch.tensor([max(d, 0) for d in order]))
    for place, d in enumerate(order):
        if d < 0:
            picked.select(axis, place).zero_()
    return picked


def _widened(x: Tensor, axis: int, size: int) -> Tensor:
    """x with zeros at the end of an axis, up to `size` entries."""
    return in_order(x, axis, [d if d < x.shape[axis] else -1 for d in range(size)])
