"""Products with a matrix that was packed at load: 16-bit numbers, or 8 or 4 bits with scales.

Up to a few rows go by `matvec`, up to some hundred by `matmul`, both of which read each weight once as it is stored.
Beyond, arithmetic counts and the vendor's library multiplies: weights of 8-bit floats with rows rounded to 8-bit
floats, those of whole numbers after they are widened.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.kernels.norms import quantize_rows
from penstock.kernels.triton.activation import KINDS, gate_product
from penstock.kernels.triton.device import fp8_type, power_of_2, rocm
from penstock.kernels.triton.matmul import matmul
from penstock.kernels.triton.matvec import matvec

GROUP = 32  # inputs that share a scale in 4 bits
_REACHES = (-8.6, -8.0, -7.4, 7.0, 7.6, 8.2)  # what the largest weight of a group is tried as; -8 is the furthest
_AT_ONCE = 2**26  # weights that are quantized at a time
_VECTOR_ROWS = {"plain": 2, "fp8": 1, "int8": 1, "int4": 1}  # more are quicker on the matrix units
_STRIP_ROWS = {"plain": 64, "fp8": 64, "int8": 256, "int4": 256}  # more are quicker by the vendor's library


@dataclass(frozen=True)
class DeviceMatrix:
    """A matrix [n, k], or the two of a gated MLP one behind the other, as the kernels read it.

    form: plain, fp8, int8 (one scale an output), int4 (one a group of inputs; a byte holds the weight of an input in
    its low half and that of the input half a row further in its high half). gate: the activation of a gated MLP, in
    the kernels' name, or "none".
    """

    form: str
    weights: Tensor
    scales: Tensor | None
    bias: Tensor | None
    n: int
    k: int
    gate: str


def can_multiply(form: str, weight: Tensor) -> bool:
    """Whether a matrix [out, in] can be packed in a form (bf16, fp8, int8, int4)."""
    if form == "int4" and weight.shape[1] % (2 * GROUP) != 0:
        return False
    return weight.dtype in (torch.bfloat16, torch.float16) and (form != "fp8" or reads_fp8(weight.device))


def pack(
    form: str, weights: tuple[Tensor, ...], biases: tuple[Tensor | None, ...], activation: str | None
) -> DeviceMatrix:
    """Pack a matrix [out, in], or the two of a gated MLP, whose activation is one of KINDS."""
    n, k = weights[0].shape
    scales = None
    if form == "bf16":  # one that is the embedding too is not copied
        stored = weights[0].contiguous() if len(weights) == 1 else torch.cat(weights)
    else:  # some rows at a time, so that little memory is taken beside the result
        parts = [_QUANTIZE[form](rows) for w in weights for rows in w.split(max(1, _AT_ONCE // k))]
        stored, scales = torch.cat([values for values, _ in parts]), torch.cat([scales for _, scales in parts])
    given = [b for b in biases if b is not None]
    if given:  # a gated MLP may have a bias on one half only
        given = [weights[0].new_zeros(n) if b is None else b for b in biases]
    gate = "none" if activation is None else KINDS[activation]
    return DeviceMatrix(
        "plain" if form == "bf16" else form,
        stored,
        scales,
        torch.cat(given) if given else None,
        *(n, k, gate),
    )


@cache
def reads_fp8(device: torch.device) -> bool:
    """Whether the card can read 8-bit floats (e4m3): NVIDIA's since compute capability 8.9."""
    return device.type != "cuda" or rocm() or torch.cuda.get_device_capability(device) >= (8, 9)


def _to_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] to 8-bit floats and a scale for each row."""
    dtype = fp8_type()
    limit = torch.finfo(dtype).max
    wide = weight.float()
    scales = wide.abs().amax(dim=1).clamp_min_(1e-12).div_(limit)
    return wide.div_(scales.unsqueeze(1)).clamp_(-limit, limit).to(dtype), scales


def _to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] to whole numbers in [-127, 127] and a scale for each row."""
    wide = weight.float()
    scales = wide.abs().amax(dim=1).clamp_min_(1e-12).div_(127)
    return wide.div_(scales.unsqueeze(1)).round_().to(torch.int8), scales


def _to_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] to bytes [out, in / 2] and bfloat16 scales [out, in / GROUP], of a few the one of each group that
    leaves the least squared error."""
    n, k = weight.shape
    groups = weight.float().view(n, k // GROUP, GROUP)
    signed = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))
    best = torch.zeros_like(signed)
    least = torch.full_like(signed, float("inf"))
    values = torch.zeros_like(groups)
    for reach in _REACHES:
        scale = ((signed if reach < 0 else signed.abs()) / reach).bfloat16().float()
        rounded = (groups / torch.where(scale == 0, 1.0, scale) + 0.5).floor_().clamp_(-8, 7)
        error = (groups - rounded * scale).square_().sum(dim=2, keepdim=True)
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better, scale, best)
        values = torch.where(better, rounded, values)
    bits = values.view(n, k).add_(8).to(torch.uint8)
    return bits[:, : k // 2] | bits[:, k // 2 :] << 4, best.squeeze(2).bfloat16()


_QUANTIZE = {"fp8": _to_fp8, "int8": _to_int8, "int4": _to_int4}


def widened(matrix: DeviceMatrix, dtype: torch.dtype) -> Tensor:
    """What a matrix stands for, [n or 2 n, k]."""
    if matrix.form == "plain" or matrix.scales is None:
        return matrix.weights
    if matrix.form == "int8":  # the product is rounded as it is written: no copy in float32
        out = torch.empty(matrix.weights.shape, dtype=dtype, device=matrix.weights.device)
        return torch.mul(matrix.weights, matrix.scales.unsqueeze(1), out=out)
    if matrix.form == "fp8":
        return matrix.weights.to(dtype).mul_(matrix.scales.unsqueeze(1).to(dtype))
    values = torch.cat((matrix.weights & 15, matrix.weights >> 4), dim=1).to(dtype).sub_(8)
    return values.view(*matrix.scales.shape, GROUP).mul_(matrix.scales.unsqueeze(2).to(dtype)).view(-1, matrix.k)


def multiply(matrix: DeviceMatrix, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """activation(x @ gate.T) * (x @ up.T) of a gated MLP, else x @ weight.T + residual. x: [T, k] -> [T, n]."""
    x = x if x.stride(1) == 1 else x.contiguous()
    rows = len(x)
    if rows <= _STRIP_ROWS[matrix.form]:
        return _few(matrix, x, residual)
    y = _many(matrix, x)
    if matrix.bias is not None:
        y += matrix.bias
    if matrix.gate != "none":
        y = gate_product(y, matrix.gate)
    return y if residual is None else y.add_(residual)


def _few(matrix: DeviceMatrix, x: Tensor, residual: Tensor | None) -> Tensor:
    """By our own kernels, in one launch."""
    rows = len(x)
    out = torch.empty(rows, matrix.n, dtype=x.dtype, device=x.device)
    if rows == 0:
        return out
    if residual is not None and residual.stride(1) != 1:
        residual = residual.contiguous()
    given = (matrix.weights, matrix.scales, matrix.bias, residual)
    stride = 0 if residual is None else residual.stride(0)
    sizes, form = (matrix.n, x.stride(0), stride), (matrix.k, matrix.form, matrix.gate)
    if rows <= _VECTOR_ROWS[matrix.form]:
        tile = vector_tile(matrix, rows)
        strips = -(-matrix.n // tile["BLOCK_N"])
        matvec[(strips,)](out, x, *given, *sizes, *form, ROWS=rows, GROUP=GROUP, **tile)
        return out
    tile = strip_tile(matrix, rows)
    grid = (-(-matrix.n // tile["BLOCK_N"]), -(-rows // tile["BLOCK_M"]))
    matmul[grid](out, x, *given, rows, *sizes, *form, GROUP=GROUP, PRECISION="ieee", **tile)
    return out


def vector_tile(matrix: DeviceMatrix, _rows: int) -> dict[str, int]:
    """A program of `matvec`: its columns, the inputs of a step, how many are on their way; 8 KiB of weights a step."""
    block_n, block_k = {"plain": (8, 512), "int4": (4, 1024)}.get(matrix.form, (16, 512))
    while block_k >= 2 * matrix.weights.shape[1] and block_k > GROUP:
        block_k //= 2
    return {"BLOCK_N": block_n, "BLOCK_K": block_k, "STAGES": 2 if rocm() else 4, "num_warps": 4}


def strip_tile(matrix: DeviceMatrix, rows: int) -> dict[str, int]:
    """A program of `matmul`: its rows and columns, the inputs of a step, how many steps are on their way.

    Every strip of columns reads all of x again, from the card's cache: strips must not be narrow beside the rows.
    """
    block_m = min(max(16, power_of_2(rows)), 64)
    block_n = 64 if rows > 32 else 32 if matrix.n >= 4096 else 16
    block_k = 256 if block_m == 16 else 128
    if rocm() or matrix.form == "int4":  # less shared memory there; two weights a byte here
        block_k //= 2
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "STAGES": 2 if rocm() else 4,
        "num_warps": 4,
    }


@cache
def _multiplies_rows_of_fp8(device: torch.device) -> bool:
    """Whether the vendor's library takes 8-bit floats with a scale a row."""
    return device.type == "cuda" and (rocm() or torch.cuda.get_device_capability(device) >= (9, 0))


def _many(matrix: DeviceMatrix, x: Tensor) -> Tensor:
    """By the vendor's library, without what follows. -> [T, n or 2 n]"""
    whole = matrix.n % 16 == 0 and matrix.k % 16 == 0
    if matrix.form == "fp8" and whole and matrix.scales is not None and _multiplies_rows_of_fp8(x.device):
        rows, scales = quantize_rows(x, matrix.weights.dtype)
        by_row, by_column = scales.unsqueeze(1), matrix.scales.unsqueeze(0)
        y = torch._scaled_mm(
            rows, matrix.weights.T, by_row, by_column, out_dtype=torch.bfloat16, use_fast_accum=not rocm()
        )
        return y.to(x.dtype)
    return F.linear(x, widened(matrix, x.dtype))
