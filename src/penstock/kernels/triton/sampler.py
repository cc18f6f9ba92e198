"""The draw of a token, row by row, without sorting the vocabulary.

Three launches: every chunk of a row tells its largest scores; from those follows a bound below which nothing can be
kept, and what lies above it is gathered in the order of the ids; among the few that are left the thresholds of top-k,
top-p and typical-p are searched bit by bit, and the cumulative distribution is inverted. The rules and their order are
those of `kernels/sampling.py`; a draw depends on the scores and on `at` alone, so that it is the processor's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.triton.device import power_of_2

_CHUNK = 4096  # scores that one program surveys
_CROWD = 64  # scores that are told as their largest
_LOWEST = tl.constexpr(-104.0)  # the exponential of what is below is nothing in float32


@dataclass(frozen=True)
class SamplerRules:
    """How the token of each of n rows is chosen: tensors [n] on the scores' device.

    temperature: float32, 0 for the likeliest token; top_k: int32, 0 for all; top_p, typical_p: float32, 1 for all;
    min_p: float32, 0 for all; at: float64 in [0, 1), where the cumulative distribution is inverted.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    typical_p: Tensor
    min_p: Tensor
    at: Tensor


@triton.jit
def _survey(
    scores,  # [n, vocab]
    temperature,  # [n]
    tops,  # [n, chunks]: the largest score of a chunk, NaN where it has one
    places,  # [n, chunks]: where it is
    sums,  # [n, chunks]: of exponentials, the largest being 1
    crowds,  # [n, chunks * CHUNK / CROWD]: the largest score of each few
    vocab,
    stride,
    CHUNK: tl.constexpr,
    CROWD: tl.constexpr,
):
    row, chunk, chunks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    column = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(scores + row * stride + column, mask=column < vocab, other=float("-inf")).to(tl.float32)
    broken = tl.max((x != x).to(tl.int32), 0) > 0
    x = tl.where(x != x, float("-inf"), x)
    top, place = tl.max(x, 0, return_indices=True)
    heat = tl.load(temperature + row)
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp((x - base) / tl.where(heat > 0, heat, 1.0)), 0)
    tl.store(tops + row * chunks + chunk, tl.where(broken, float("nan"), top))
    tl.store(places + row * chunks + chunk, chunk * CHUNK + place)
    tl.store(sums + row * chunks + chunk, total)
    CROWDS: tl.constexpr = CHUNK // CROWD
    target = crowds + (row * chunks + chunk) * CROWDS + tl.arange(0, CROWDS)
    tl.store(target, tl.max(tl.reshape(x, CROWDS, CROWD), 1))


@triton.jit
def _ordered(x):
    """Whole numbers in the order of float32 numbers."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _unordered(key):
    key = key.to(tl.int32)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _sift(
    scores,  # [n, vocab]
    temperature,
    top_k,
    top_p,
    tops,
    places,
    sums,
    crowds,
    values,  # [n, vocab] float32: what is left, cooled, the likeliest being 0
    ids,  # [n, vocab] int32
    counts,  # [n] int32: how many are left
    chosen,  # [n] int64: the likeliest token
    logprobs,  # [n] float32: its, or NaN where the scores allow none
    vocab,
    stride,
    chunks,
    CHUNK: tl.constexpr,
    CROWD: tl.constexpr,
    CHUNKS: tl.constexpr,
    CROWDS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, CHUNKS)
    highest = tl.load(tops + row * chunks + index, mask=index < chunks, other=float("-inf"))
    broken = tl.max((highest != highest).to(tl.int32), 0) > 0
    top, where = tl.max(highest, 0, return_indices=True)
    broken = broken | (top == float("-inf")) | (top == float("inf"))
    heat = tl.load(temperature + row)
    cold = heat == 0
    heat = tl.where(cold, 1.0, heat)
    shares = tl.load(sums + row * chunks + index, mask=index < chunks, other=0.0)
    total = tl.sum(shares * tl.exp((highest - tl.where(broken, 0.0, top)) / heat), 0)
    place = tl.load(places + row * chunks + tl.minimum(where, chunks - 1))
    tl.store(chosen + row, tl.where(broken, 0, place).to(tl.int64))
    tl.store(logprobs + row, tl.where(broken, float("nan"), -tl.log(total)))
    if cold | broken:
        tl.store(counts + row, 0)
        return

    bound = _LOWEST
    p = tl.load(top_p + row)
    if p < 1:  # all that is less likely than this together is less than 1 - p
        bound = tl.maximum(bound, tl.log((1 - p) / vocab * total) - 1e-3)
    k = tl.load(top_k + row)
    if k > 0:  # the k-th largest score is not below the k-th largest of those that stand for many
        crowd = tl.arange(0, CROWDS)
        known = chunks * (CHUNK // CROWD)
        stand = tl.load(crowds + row * known + crowd, mask=crowd < known, other=float("-inf"))
        keys = _ordered((stand - top) / heat).to(tl.int64)
        low, high = -(1 << 31) + tl.zeros([], tl.int64), (1 << 31) + tl.zeros([], tl.int64)
        for _ in range(32):
            middle = (low + high) >> 1
            enough = tl.sum((keys >= middle).to(tl.int32), 0) >= k
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle)
        found = _unordered(low)
        bound = tl.maximum(bound, tl.where(found == found, found, float("-inf")))

    count = 0
    for chunk in range(0, chunks):
        if (tl.load(tops + row * chunks + chunk) - top) / heat >= bound:
            column = chunk * CHUNK + tl.arange(0, CHUNK)
            x = tl.load(scores + row * stride + column, mask=column < vocab, other=float("-inf")).to(tl.float32)
            x = (x - top) / heat
            left = x >= bound
            target = row * vocab + count + tl.cumsum(left.to(tl.int32), 0) - 1
            tl.store(values + target, x, mask=left)
            tl.store(ids + target, column, mask=left)
            count += tl.sum(left.to(tl.int32), 0)
    tl.store(counts + row, count)


@triton.jit
def _threshold(values, count, floor, center, least, COUNTED: tl.constexpr, CENTERED: tl.constexpr, TILE: tl.constexpr):
    """The largest number so that the scores from it on, of those from `floor` on, are as many or weigh as much as
    `least`. With CENTERED what counts of a score is how near it is to `center`, negated."""
    low, high = -(1 << 31) + tl.zeros([], tl.int64), (1 << 31) + tl.zeros([], tl.int64)
    for _ in range(32):
        middle = (low + high) >> 1
        weight = tl.zeros([TILE], tl.float64)
        for base in tl.range(0, count, TILE, num_stages=1):
            index = base + tl.arange(0, TILE)
            x = tl.load(values + index, mask=index < count, other=float("-inf"))
            measure = x
            if CENTERED:
                measure = -tl.abs(x - center)
            taken = (index < count) & (x >= floor) & (_ordered(measure).to(tl.int64) >= middle)
            if COUNTED:
                weight += taken.to(tl.float64)
            else:
                weight += tl.where(taken, tl.exp(x), 0.0).to(tl.float64)
        enough = tl.sum(weight, 0) >= least
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    found = _unordered(low)
    return tl.where(found == found, found, float("-inf"))


@triton.jit
def _choose(
    values,
    ids,
    counts,
    top_k,
    top_p,
    typical_p,
    min_p,
    at,
    chosen,
    logprobs,
    vocab,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + row)
    if count == 0:
        return
    values += row * vocab
    ids += row * vocab
    floor, center, span = _LOWEST, 0.0, float("inf")
    k = tl.load(top_k + row)
    if k > 0:
        floor = _threshold(values, count, floor, 0.0, k.to(tl.float64), True, False, TILE)
    p = tl.load(top_p + row)
    if p < 1:
        whole, _entropy, _top = _weigh(values, count, floor, 0.0, float("inf"), TILE)
        floor = tl.maximum(floor, _threshold(values, count, floor, 0.0, p.to(tl.float64) * whole, False, False, TILE))
    p = tl.load(typical_p + row)
    if p < 1:
        whole, entropy, _top = _weigh(values, count, floor, 0.0, float("inf"), TILE)
        center = -(entropy / whole).to(tl.float32)  # the score whose surprise is the entropy
        span = -_threshold(values, count, floor, center, p.to(tl.float64) * whole, False, True, TILE)
    p = tl.load(min_p + row)
    if p > 0:
        _whole, _entropy, top = _weigh(values, count, floor, center, span, TILE)
        floor = tl.maximum(floor, top + tl.log(p))
    whole, _entropy, _top = _weigh(values, count, floor, center, span, TILE)

    below = tl.load(at + row) * whole
    sum_before = tl.zeros([], tl.float64)
    found, last = 2147483647, 0
    for base in tl.range(0, count, TILE, num_stages=1):
        index = base + tl.arange(0, TILE)
        weights = _weights(values, index, count, floor, center, span)
        passed = sum_before + tl.cumsum(weights, 0) > below
        found = tl.minimum(found, tl.min(tl.where(passed & (weights > 0), index, 2147483647), 0))
        last = tl.maximum(last, tl.max(tl.where(weights > 0, index, 0), 0))
        sum_before += tl.sum(weights, 0)
    found = tl.minimum(found, last)  # rounding must not lead past the last token that can be drawn
    tl.store(chosen + row, tl.load(ids + found).to(tl.int64))
    tl.store(logprobs + row, tl.load(values + found) - tl.log(whole.to(tl.float32)))


@triton.jit
def _weights(values, index, count, floor, center, span):
    """Probabilities, the likeliest score's being 1, of what is kept; 0 of the rest. float64"""
    x = tl.load(values + index, mask=index < count, other=float("-inf"))
    kept = (index < count) & (x >= floor) & (tl.abs(x - center) <= span)
    return tl.where(kept, tl.exp(x), 0.0).to(tl.float64)


@triton.jit
def _weigh(values, count, floor, center, span, TILE: tl.constexpr):
    """What is kept: the sum of its weights, of their entropies, and its largest score."""
    whole, entropy = tl.zeros([TILE], tl.float64), tl.zeros([TILE], tl.float64)
    top = tl.full([TILE], float("-inf"), tl.float32)
    for base in tl.range(0, count, TILE, num_stages=1):
        index = base + tl.arange(0, TILE)
        x = tl.load(values + index, mask=index < count, other=float("-inf"))
        kept = (index < count) & (x >= floor) & (tl.abs(x - center) <= span)
        weight = tl.where(kept, tl.exp(x), 0.0).to(tl.float64)
        whole += weight
        entropy -= weight * tl.where(kept, x, 0.0).to(tl.float64)
        top = tl.maximum(top, tl.where(kept, x, float("-inf")))
    return tl.sum(whole, 0), tl.sum(entropy, 0), tl.max(top, 0)


def draw(scores: Tensor, rules: SamplerRules) -> tuple[Tensor, Tensor]:
    """A token of each row, and its log-probability among what its rules keep; NaN where the scores allow none.

    scores: [n, vocab] of any float type, -inf for what may not come; not changed -> [n] int64, [n] float32
    """
    n, vocab = scores.shape
    chunks = -(-vocab // _CHUNK)
    crowds = chunks * (_CHUNK // _CROWD)

    def empty(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=scores.device)

    tops, places, sums = empty((n, chunks)), empty((n, chunks), torch.int32), empty((n, chunks))
    stand, values, ids = empty((n, crowds)), empty((n, vocab)), empty((n, vocab), torch.int32)
    counts, chosen, logprobs = empty((n,), torch.int32), empty((n,), torch.int64), empty((n,))
    told = (tops, places, sums, stand)
    sizes = {"CHUNK": _CHUNK, "CROWD": _CROWD}
    stride = scores.stride(0)
    _survey[(n, chunks)](scores, rules.temperature, *told, vocab, stride, **sizes, num_warps=8)
    _sift[(n,)](
        *(scores, rules.temperature, rules.top_k, rules.top_p, *told, values, ids, counts, chosen, logprobs),
        *(vocab, stride, chunks),
        **sizes,
        CHUNKS=power_of_2(chunks),
        CROWDS=power_of_2(crowds),
        num_warps=8,
    )
    given = (rules.top_k, rules.top_p, rules.typical_p, rules.min_p, rules.at)
    _choose[(n,)](values, ids, counts, *given, chosen, logprobs, vocab, TILE=2048, num_warps=8)
    return chosen, logprobs
