"""Products of a mixture of experts: each row with the matrix of its own expert, in one launch of a fixed shape.

Nothing is sorted and nothing counted beforehand. A program has an expert and a tile of the rows that go there, and
finds these itself among all choices: the grid follows from the number of rows alone, so a captured graph can be
replayed with whatever the router says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.triton.matmul import results
from penstock.kernels.triton.product import GROUP, DeviceMatrix, strip_tile

ROWS = 1024  # more tokens are quicker expert by expert, by the vendor's library


@dataclass(frozen=True)
class StackedMatrices:
    """The matrices of all experts, of one form and size, one behind the other. every: weights [count * (n or 2 n), k],
    scales and bias likewise, else as of one."""

    every: DeviceMatrix
    count: int


def stack(matrices: Sequence[DeviceMatrix]) -> tuple[StackedMatrices, list[DeviceMatrix]] | None:
    """Put matrices behind each other. Returns the stack and each of them as a part of it; None where they differ."""
    first = matrices[0]
    if any(_kind(m) != _kind(first) for m in matrices):
        return None
    weights = torch.stack([m.weights for m in matrices])
    scales, bias = _stacked([m.scales for m in matrices]), _stacked([m.bias for m in matrices])
    each = [
        replace(
            first,
            weights=weights[i],
            scales=None if scales is None else scales[i],
            bias=None if bias is None else bias[i],
        )
        for i in range(len(matrices))
    ]
    every = replace(
        first,
        weights=weights.flatten(0, 1),
        scales=None if scales is None else scales.flatten(0, 1),
        bias=None if bias is None else bias.flatten(0, 1),
    )
    return StackedMatrices(every, len(each)), each


def _stacked(tensors: list[Tensor | None]) -> Tensor | None:
    given = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(given) if given else None


def _kind(m: DeviceMatrix) -> tuple[str, int, int, str, bool]:
    return m.form, m.n, m.k, m.gate, m.bias is None


@triton.jit(do_not_specialize=["rows", "choices", "tiles", "top_k"])
def _expert_products(
    out,  # [choices, n]
    x,  # [rows, K]
    chosen,  # [choices] the expert of each choice, all of the first row's first
    weights,  # [experts * (n or 2 n), K]: as of matvec, one expert behind the other
    scales,
    bias,
    rows,
    choices,
    tiles,  # of rows, for each expert
    top_k,  # choices of a row of x
    n,
    x_stride,
    K: tl.constexpr,
    FORM: tl.constexpr,
    GATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    SCAN: tl.constexpr,  # choices that are looked at together
):
    expert, first = tl.program_id(1) // tiles, (tl.program_id(1) % tiles) * BLOCK_M
    rank = first + tl.arange(0, BLOCK_M)  # among the choices of this expert
    place = tl.zeros([BLOCK_M], tl.int32)
    seen = 0
    for base in range(0, choices, SCAN):
        index = base + tl.arange(0, SCAN)
        here = (tl.load(chosen + index, mask=index < choices, other=-1) == expert).to(tl.int32)
        at = seen + tl.cumsum(here, 0) - 1
        hit = (at[None, :] == rank[:, None]) & (here > 0)[None, :]
        place += tl.sum(tl.where(hit, index[None, :], 0), 1)
        seen += tl.sum(here, 0)
    if first >= seen:
        return
    asked = rank < seen
    row = tl.where(asked, place // top_k, rows)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    halves: tl.constexpr = 1 if GATE == "none" else 2
    width: tl.constexpr = K // 2 if FORM == "int4" else K
    before = expert.to(tl.int64) * (halves * n)  # outputs of the experts before this one
    weights += before * width
    if scales is not None:
        scales += before * (K // GROUP) if FORM == "int4" else before
    if bias is not None:
        bias += before
    y = results(
        x, weights, scales, bias, row, column, rows, n, x_stride,
        K, FORM, GATE, BLOCK_M, BLOCK_N, BLOCK_K, GROUP, STAGES, PRECISION,
    )  # fmt: skip
    mask = asked[:, None] & (column < n)[None, :]
    to = place.to(tl.int64)[:, None] * n + column[None, :]
    tl.store(out + to, y.to(out.dtype.element_ty), mask=mask)


def expert_products(stacked: StackedMatrices, x: Tensor, chosen: Tensor) -> Tensor:
    """What `product.multiply` gives of each row with each of its experts. x: [T, k], or a row for each choice; chosen:
    [T, top_k] int64 -> [T * top_k, n]"""
    matrix = stacked.every
    x = x if x.stride(1) == 1 else x.contiguous()
    choices, tokens = chosen.numel(), len(chosen)
    out = torch.empty(choices, matrix.n, dtype=x.dtype, device=x.device)
    if choices == 0:
        return out
    tile = strip_tile(matrix, -(-choices // stacked.count))
    tiles = -(-tokens // tile["BLOCK_M"])  # a row chooses an expert once at most
    _expert_products[(-(-matrix.n // tile["BLOCK_N"]), stacked.count * tiles)](
        *(out, x, chosen, matrix.weights, matrix.scales, matrix.bias),
        *(len(x), choices, tiles, choices // len(x), matrix.n, x.stride(0)),
        *(matrix.k, matrix.form, matrix.gate),
        GROUP=GROUP,
        PRECISION="ieee",
        SCAN=128,
        **tile,
    )
    return out
