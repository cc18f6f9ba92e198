"""The weights of attention, arranged as it computes: all q, all k, all v, rotated pairs half a head apart."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from penstock.formats.dense import Linear
from penstock.kernels.rotary import arrangement
from penstock.kernels.stored import Matrix, StoredMatrix, whole
from penstock.models.attention import FusedQkv, LatentQkv, Qkv
from penstock.models.config import DecoderConfig, HeadNormConfig, LatentConfig, WeightMap
from penstock.models.norms import Norm, NormOfAll, NormOfEach, NormOfOdd
from penstock.models.source import Source, make_norm

M = TypeVar("M", Tensor, StoredMatrix, Matrix)


def load_qkv(source: Source, prefix: str, i: int) -> Qkv:
    """The way to q, k and v of layer i."""
    c, names = source.config, source.names
    if c.latent is not None:
        return _latent_qkv(source, prefix, c.latent)
    heads = (c.num_heads, c.num_kv_heads, c.num_kv_heads)
    rows = tuple(n * c.head_dim for n in heads) if len(names.qkv) == 3 else (sum(heads) * c.head_dim,)
    weight, bias = source.matrix(prefix, names.qkv, rows, c.hidden_size, c.qkv_bias)
    weight = arranged(c, names, weight)
    bias = None if bias is None else arranged(c, names, bias)
    q_norm = k_norm = None
    if c.qk_norm is not None and not (c.qk_norm.rotated_only and c.ropes[i].kind == "none"):
        q_norm = _head_norm(source, c.qk_norm, f"{prefix}{names.q_norm}", c.num_heads)
        k_norm = _head_norm(source, c.qk_norm, f"{prefix}{names.k_norm}", c.num_kv_heads)
    return FusedQkv(
        source.form.load(weight, bias), c.num_heads, c.num_kv_heads, c.head_width, q_norm, k_norm, c.qkv_clip
    )


def _latent_qkv(source: Source, prefix: str, latent: LatentConfig) -> LatentQkv:
    """Multi-head latent attention; the names of its tensors are DeepSeek's."""
    c = source.config
    prefix = f"{prefix}self_attn."
    count = c.num_heads * c.head_dim

    def query(weight: Matrix) -> Linear:
        return source.form.load(arranged_queries(c, weight))

    def norm(name: str, size: int) -> Norm:
        weight = source.read(f"{prefix}{name}.weight", (size,))
        return make_norm(latent.norm, weight, None, size, source.dtype, source.read.device)

    queries: tuple[Linear | Norm, ...]
    if latent.q_rank is None:
        queries = (query(source.matrix(prefix, ("q_proj",), (count,), c.hidden_size, False)[0]),)
    else:
        queries = (
            source.form.load(*source.matrix(prefix, ("q_a_proj",), (latent.q_rank,), c.hidden_size, c.qkv_bias)),
            norm("q_a_layernorm", latent.q_rank),
            query(source.matrix(prefix, ("q_b_proj",), (count,), latent.q_rank, False)[0]),
        )
    rank, turned = latent.kv_rank, latent.rotary_dim
    weight, bias = source.matrix(prefix, ("kv_a_proj_with_mqa",), (rank + turned,), c.hidden_size, c.qkv_bias)
    values = c.num_heads * (c.head_dim - turned + latent.value_dim)
    return LatentQkv(
        query=queries,
        down=source.form.load(
            arranged_latent(c, latent, weight), None if bias is None else arranged_latent(c, latent, bias)
        ),
        norm=norm("kv_a_layernorm", rank),
        up=source.form.load(*source.matrix(prefix, ("kv_b_proj",), (values,), rank, False)),
        heads=c.num_heads,
        dim=c.head_width,
        rotary_dim=turned,
        value_dim=latent.value_dim,
    )


def arranged_queries(c: DecoderConfig, rows: Matrix) -> Tensor:
    """Rows of latent attention's queries in our order. rows: [heads * head_dim, n]"""
    heads = whole(rows).view(c.num_heads, c.head_dim, -1)
    return (heads if c.head_order is None else in_order(heads, 1, c.head_order)).flatten(0, 1)


def arranged_latent(c: DecoderConfig, latent: LatentConfig, rows: Matrix) -> Tensor:
    """Rows of the way to the latent vector and the rotated part of a key, that part in our order.

    rows: [kv_rank + rotary_dim, ...]
    """
    rank, turned = latent.kv_rank, latent.rotary_dim
    pairs = arrangement(turned, None, c.rope.neighbours) or list(range(turned))
    return in_order(whole(rows), 0, [*range(rank), *(rank + d for d in pairs)])


def load_out(source: Source, prefix: str) -> Linear:
    """The output projection."""
    c = source.config
    columns = c.num_heads * c.value_dim
    weight, bias = source.matrix(prefix, (source.names.out,), (c.hidden_size,), columns, c.out_bias)
    return source.form.load(arranged_values(c, weight), bias)


def arranged_values(c: DecoderConfig, columns: M) -> M | Tensor:
    """Columns of the output projection; dimensions that heads have only in our layout get zeros.

    columns: [n, heads * value_dim] -> [n, heads * head_width]
    """
    if c.value_dim == c.head_width:
        return columns
    read = whole(columns)
    return _widened(read.view(len(read), c.num_heads, c.value_dim), 2, c.head_width).flatten(1)


def arranged(c: DecoderConfig, names: WeightMap, rows: M) -> M | Tensor:
    """Rows of q, k and v in our order: all q, all k, all v, and the dimensions of their heads as `head_order` says.

    rows: [(heads + 2 kv_heads) * head_dim, ...], as the checkpoint orders them.
    """
    order, kv_heads = c.head_order, c.num_kv_heads
    if order is None and not names.qkv_grouped:
        return rows
    heads = whole(rows).view(-1, c.head_dim, *rows.shape[1:])
    if names.qkv_grouped:
        groups = heads.view(kv_heads, -1, *heads.shape[1:])
        heads = torch.cat([part.flatten(0, 1) for part in groups.tensor_split((-2, -1), dim=1)])
    if order is not None:
        qk, v = heads.split((c.num_heads + kv_heads, kv_heads))
        heads = torch.cat((in_order(qk, 1, order), _widened(v, 1, c.head_width)))
    return heads.flatten(0, 1).contiguous()


def _head_norm(source: Source, config: HeadNormConfig, name: str, heads: int) -> Norm:
    """The norm of q or k. A weight of each head's own lies in one tensor, or in one tensor a head."""
    c, norm = source.config, config.norm
    dim = c.head_dim
    order = c.head_order or list(range(dim))

    def one(size: int, weight: Tensor | None, bias: Tensor | None = None) -> Norm:
        return make_norm(norm, weight, bias, size, source.dtype, source.read.device)

    if not norm.weight:
        made = one(dim, None)
    elif config.over == "all":
        return NormOfAll(one(heads * dim, source.read(f"{name}.weight", (heads * dim,))))
    elif config.over == "each":
        if f"{name}.weight" in source.read:
            weight = source.read(f"{name}.weight", (heads, dim))
        else:
            weight = torch.stack([source.read(f"{name}.norms.{i}.weight", (dim,)) for i in range(heads)])
        weight = in_order(weight, 1, [d for d in order if d >= 0])
        still = make_norm(replace(norm, weight=False), None, None, dim, source.dtype, source.read.device)
        made = NormOfEach(still, weight)
    else:
        real = [d for d in order if d >= 0]
        bias = in_order(source.read(f"{name}.bias", (dim,)), 0, real) if norm.bias else None
        made = one(dim, in_order(source.read(f"{name}.weight", (dim,)), 0, real), bias)
    return made if c.head_width == dim else NormOfOdd(made, dim)


def in_order(x: Tensor, axis: int, order: list[int]) -> Tensor:
    """x with its entries along an axis as `order` names them; -1 is an entry of zeros."""
    picked = x.index_select(axis, torch.tensor([max(d, 0) for d in order], device=x.device))
    for place, d in enumerate(order):
        if d < 0:
            picked.select(axis, place).zero_()
    return picked


def _widened(x: Tensor, axis: int, size: int) -> Tensor:
    """x with zeros at the end of an axis, up to `size` entries."""
    return in_order(x, axis, [d if d < x.shape[axis] else -1 for d in range(size)])
