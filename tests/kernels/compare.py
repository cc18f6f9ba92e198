"""Compares the compiled kernels with their torch twins at random shapes; run by test_native.py once a level."""

from __future__ import annotations

import random
import sys

import numpy as np
import torch
import torch.nn.functional as F

from penstock.kernels import byte_cache, native, products, sampling
from penstock.kernels.attention import Rule, RunGroup, alibi_table, attend_gathered
from penstock.kernels.mask import Mask
from penstock.kernels.norms import ACTIVATIONS
from penstock.kernels.penalty import Penalty, Tally
from penstock.kernels.rotary import rotate


def attention(rng: random.Random, dtype: torch.dtype, in_bytes: bool) -> None:
    kv_heads, repeats, dim = (
        rng.choice([1, 2, 3]),
        rng.choice([1, 2, 4, 5, 8, 11]),
        rng.choice([5, 8, 40, 64, 96, 128, 256]),
    )
    block_size, batch, length = rng.choice([1, 3, 16, 32]), rng.choice([1, 2, 7]), rng.choice([1, 2, 5, 9, 30, 70])
    window = rng.choice([None, 1, 9, 50])
    contexts = [length + rng.choice([0, rng.randrange(150)]) for _ in range(batch)]
    width = -(-max(contexts) // block_size)
    num_blocks = batch * width + 3
    blocks = torch.randperm(num_blocks)[: batch * width].view(batch, width)
    shape = (num_blocks, kv_heads, block_size, dim)
    k, v = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    exact_k, exact_v = k.float(), v.float()
    if in_bytes:
        k, v = _in_bytes(k), _in_bytes(v)
        exact_k, exact_v = byte_cache.widened(k, torch.float32), byte_cache.widened(v, torch.float32)
    q = torch.randn(batch * length, kv_heads * repeats, dim).to(dtype)
    got, expected = torch.empty_like(q), torch.empty_like(q)
    scale = dim**-0.5
    assert native.can_attend(q, k)
    softcap, chunk = rng.choice([None, None, 3.0]), rng.choice([None, None, 7, 64])
    alibi = rng.choice([None, None, alibi_table(q.shape[1], max(contexts))])
    native.attend(q, got, k, v, blocks.contiguous(), torch.tensor(contexts), scale, window, softcap, chunk, alibi)
    group, rule = RunGroup(0, length, contexts, blocks), Rule(scale, window, softcap, chunk, alibi)
    attend_gathered(q.float(), exact := torch.empty(q.shape), exact_k, exact_v, group, rule)
    group.masks.clear()
    attend_gathered(q, expected, k, v, group, rule)
    # against the exact result the kernel is no worse than the twin of the same type
    rounded = 5e-6 if not in_bytes else 2e-4  # queries and weights in 16 bits
    allowed = max(2 * float((expected.float() - exact).abs().max()), rounded if alibi is None else max(rounded, 3e-5))
    error = float((got.float() - exact).abs().max())
    assert error <= allowed, (error, allowed, dtype, k.dtype, shape, contexts, length, window)


def _in_bytes(x: torch.Tensor) -> torch.Tensor:
    """A cache of these numbers as signed bytes."""
    blocks, kv_heads, block_size, dim = x.shape
    cache = torch.randint(
        -128, 128, (blocks, kv_heads, block_size, byte_cache.width(dim, torch.int8)), dtype=torch.int8
    )
    block, place = (i.flatten() for i in torch.meshgrid(torch.arange(blocks), torch.arange(block_size), indexing="ij"))
    byte_cache.write(cache, x.transpose(1, 2).flatten(0, 1), block, place)
    return cache


def norm(rng: random.Random) -> None:
    """Norms against float64, alone and on their way to 8 bits."""
    x = torch.randn(rng.choice([1, 3, 70]), rng.choice([1, 7, 64, 1000, 2048])) * 10 ** rng.uniform(-3, 3)
    x = (x + x.std(correction=0) * rng.choice([0, 3])).bfloat16()
    weight, bias = torch.randn(2, x.shape[-1]).bfloat16()
    given = rng.choice([None, bias])
    rms = F.rms_norm(x.double(), weight.shape, weight.double(), 1e-5)
    layer = F.layer_norm(x.double(), weight.shape, weight.double(), None if given is None else given.double(), 1e-5)
    size = layer.abs().amax(dim=1, keepdim=True)  # what is added up may cancel
    got = native.rms_norm(x, weight, 1e-5)
    assert torch.all((got.double() - rms).abs() <= rms.abs() * 2**-8 + 1e-30)
    got = native.layer_norm(x, weight, given, 1e-5)
    assert torch.all((got.double() - layer).abs() <= layer.abs() * 2**-8 + size * 1e-4 + 1e-30), x.shape
    for exact, rule in (
        (rms, products.RowNorm("rms", weight, None, 1e-5)),
        (layer, products.RowNorm("layer", weight, given, 1e-5)),
        (x.double(), None),
    ):
        values, scales = products.quantize_rows(x, rule)
        back = (values.double() - 128) * scales.double().unsqueeze(1)
        assert torch.all(
            (back - exact).abs() <= scales.double().unsqueeze(1) * 0.51 + exact.abs() * 2**-8 + size * 1e-4
        ), (x.shape, rule)
        assert torch.all((scales.double() * 127 - exact.abs().amax(dim=1)).abs() <= exact.abs().amax(dim=1) * 2**-7)


def normed(rng: random.Random) -> None:
    """Products behind a norm against the two one after the other."""
    m, n, k = rng.choice([1, 5, 13, 70]), rng.choice([31, 64, 130]), rng.choice([32, 64, 288])
    x, weights = torch.randn(m, k + 2).bfloat16()[:, :k], [torch.randn(n, k).bfloat16() / k**0.5 for _ in range(2)]
    weight, bias = torch.randn(2, k).bfloat16()
    kind, residual = rng.choice(["rms", "layer"]), rng.choice([None, torch.randn(m, n).bfloat16()])
    given = rng.choice([None, bias]) if kind == "layer" else None
    rule = products.RowNorm(kind, weight, given, 1e-5)
    h = native.rms_norm(x, weight, 1e-5) if kind == "rms" else native.layer_norm(x, weight, given, 1e-5)
    for form in ("bf16", "int8", "int4"):
        single, pair = (
            products.pack(form, (weights[0],), (None,)),
            products.pack(form, (weights[0], weights[1]), (None, None)),
        )
        assert isinstance(single, products.Packed)
        assert isinstance(pair, products.Packed)
        for got, expected in (  # to the bit: rows with adapters beside them take the one way, others the other
            (products.multiply(products.behind(rule, single), x, residual), products.multiply(single, h, residual)),
            (products.multiply_gated(products.behind(rule, pair), x), products.multiply_gated(pair, h)),
        ):
            assert torch.equal(got, expected), (form, kind, m, n, k)


def rotary(rng: random.Random, dtype: torch.dtype) -> None:
    tokens, kv_heads, repeats, dim = (
        rng.choice([1, 5, 40]),
        rng.choice([1, 3]),
        rng.choice([1, 4]),
        rng.choice([2, 40, 64]),
    )
    heads, capacity = kv_heads * repeats, (8, 16)
    qkv = torch.randn(tokens, heads + 2 * kv_heads, dim).to(dtype)
    q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
    angles = torch.randn(tokens, 1, dim // 2).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    slots = torch.randperm(capacity[0] * capacity[1])[:tokens]
    keys, values = (torch.zeros(capacity[0], kv_heads, capacity[1], dim, dtype=dtype) for _ in range(2))
    turned = native.rotate_into(q, k, v, cos, sin, slots, keys, values)
    allowed = 1e-5 if dtype == torch.float32 else 2**-7
    for got, x in ((turned, q), (keys.transpose(1, 2).flatten(0, 1)[slots], k)):
        exact = rotate(x.double(), cos.double(), sin.double())
        assert torch.all((got.double() - exact).abs() <= allowed * (1 + exact.abs())), (tokens, heads, dim, dtype)
    assert torch.equal(values.transpose(1, 2).flatten(0, 1)[slots], v)
    others = torch.ones(capacity[0] * capacity[1], dtype=torch.bool)
    others[slots] = False
    assert not keys.transpose(1, 2).flatten(0, 1)[others].any()
    assert not values.transpose(1, 2).flatten(0, 1)[others].any()


def rotary_in_bytes(rng: random.Random, dtype: torch.dtype) -> None:
    """Keys and values quantized on their way into the cache, beside the twin; nothing else is written."""
    tokens, kv_heads, repeats, dim = (
        rng.choice([1, 5, 40]),
        rng.choice([1, 3]),
        rng.choice([1, 4]),
        rng.choice([2, 40, 256]),
    )
    heads, blocks, size = kv_heads * repeats, rng.choice([8, 9]), rng.choice([5, 16])
    q, k, v = (torch.randn(tokens, n, dim).to(dtype) * 10 ** rng.uniform(-3, 3) for n in (heads, kv_heads, kv_heads))
    v[0, 0] = 0
    if tokens > 1:
        v[1, 0, 0] = rng.choice([float("nan"), float("inf")])
        k[1, 0, 1] = float("nan")
    angles = torch.randn(tokens, 1, dim // 2).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    slots = torch.randperm(blocks * size)[:tokens]
    caches = [
        torch.zeros(blocks, kv_heads, size, byte_cache.width(dim, torch.int8), dtype=torch.int8) for _ in range(4)
    ]
    turned = native.rotate_into(q, k, v, cos, sin, slots, *caches[:2])
    plain = torch.zeros(blocks, kv_heads, size, dim, dtype=dtype)
    assert torch.equal(turned, native.rotate_into(q, k, v, cos, sin, slots, plain, plain.clone()))
    keys = plain.transpose(1, 2).flatten(0, 1)[slots]  # what went into a cache of the same type
    for cache, twin, x in zip(caches[:2], caches[2:], (keys, v), strict=True):
        byte_cache.write(twin, x, slots // size, slots % size)
        got, expected = (
            byte_cache.widened(c, torch.float64).transpose(1, 2).flatten(0, 1)[slots] for c in (cache, twin)
        )
        step = x.double().abs().amax(dim=2, keepdim=True) / 127
        near = (got - x.double()).abs() <= step * 0.5001
        assert torch.all(near | got.isnan()), (tokens, heads, dim, dtype)
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.isnan().all(dim=2), ~x.isfinite().all(dim=2))
        assert ((got - expected).abs() > step * 1e-3).float().mean() < 0.02  # a half rounded to either side
    others = torch.ones(blocks * size, dtype=torch.bool)
    others[slots] = False
    for cache in caches[:2]:
        assert not byte_cache.widened(cache, torch.float32).transpose(1, 2).flatten(0, 1)[others].any()


def gelu(rng: random.Random) -> None:
    """Activations of numbers of every size, a NaN and infinities among them."""
    x = (torch.randn(rng.choice([1, 3, 9]), rng.choice([1, 31, 4096, 5000])) * 10 ** rng.uniform(-3, 2)).bfloat16()
    for special in (float("nan"), float("inf"), float("-inf")):
        x[rng.randrange(len(x)), rng.randrange(x.shape[1])] = special
    for tanh in (False, True):
        got = native.gelu(x, tanh).double()
        exact = F.gelu(x.double(), approximate="tanh" if tanh else "none")
        near = (got - exact).abs() <= exact.abs() * 2**-8 + 2e-6
        assert torch.all(near | (got == exact) | (got.isnan() & ~x.isfinite())), (x.shape, tanh)
        assert torch.equal(got.isnan() & x.isfinite(), torch.zeros_like(x, dtype=torch.bool))
        assert got[x.isnan()].isnan().all()


def largest(rng: random.Random) -> None:
    x = torch.randn(rng.choice([1, 3, 33]), rng.choice([1, 7, 100, 3001])).bfloat16() - rng.choice([0, 0, 9])
    values, ids = native.largest(x)
    assert torch.equal(values, x.float().amax(dim=1))
    assert ids.tolist() == [row.index(max(row)) for row in x.tolist()]
    x[0, rng.randrange(x.shape[1])] = float("nan")
    x[-1] = float("-inf")
    values, ids = native.largest(x)
    assert len(x) == 1 or (values[0].isnan() and values[-1] == float("-inf") and ids[-1] == 0)


def restricted(rng: random.Random, dtype: torch.dtype) -> None:
    """Masks and withheld tokens, also where nothing else is left."""
    m, n = rng.choice([1, 3, 33]), rng.choice([1, 7, 32, 100, 3001])
    x = torch.randn(m, n).to(dtype)
    x[0, rng.randrange(n)] = float("nan")
    masks: list[Mask | None] = []
    withheld = [rng.sample(range(n), rng.choice([0, 0, 1, min(n, 5)])) for _ in range(m)]
    for ids in withheld:
        bits = np.random.default_rng(rng.randrange(99)).integers(0, 2**32, -(-n // 32), dtype=np.uint32)
        few = np.zeros_like(bits)
        for i in ids[:2]:
            few[i // 32] |= np.uint32(1 << i % 32)
        masks.append(None if n > 5 and rng.random() < 1 / 3 else Mask(n))
        if (mask := masks[-1]) is not None:
            mask.bits[:] = rng.choice([bits, few])
    got, expected = x.clone(), x.clone()
    native.restrict(got, masks, withheld)
    sampling.restrict_plainly(expected, masks, withheld)
    assert torch.equal(got.nan_to_num(9e9), expected.nan_to_num(9e9)), (m, n, dtype, withheld)


def penalized(rng: random.Random) -> None:
    """Penalties on texts that grow."""
    m, n = rng.choice([1, 3, 20]), rng.choice([2, 50, 5000])
    x = torch.randn(m, n) * 4
    texts = [[rng.randrange(n) for _ in range(rng.choice([1, 40, 700]))] for _ in range(m)]
    tallies = [Tally() for _ in texts]
    for _step in range(3):
        for text, tally in zip(texts, tallies, strict=True):
            text.append(rng.randrange(n))
            tally.follow(text, len(text) // 2 if _step == 0 else 0)
        given = [
            None
            if rng.random() < 0.2
            else Penalty(tally, rng.choice([1.0, 1.3, 0.6]), *(rng.uniform(-2, 2) for _ in "abc"))
            for tally in tallies
        ]
        got, expected = x.clone(), x.clone()
        native.penalize(got, given)
        sampling.penalize_plainly(expected, given)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def drawn(rng: random.Random) -> None:
    """Draws against the twin: the same token, but where rounding may decide."""
    m, n = rng.choice([1, 5]), rng.choice([1, 7, 600, 5000])
    x = torch.randn(m, n) * 10 ** rng.uniform(-3, 1.5)
    x[0, : n // 3] = float("-inf")
    if rng.random() < 0.3:
        x = x.round()  # ties
    rules = [
        sampling.DrawRule(
            rng.choice([1.0, 0.3, 2.0, 1e-6]),
            rng.choice([1.0, 0.9, 0.3, 1e-6]),
            rng.choice([0.0, 0.1, 1.0]),
            rng.choice([0, 1, 5, 50]),
            rng.random(),
        )
        for _ in range(m)
    ]
    got, logprobs = native.draw(x, rules)
    for row, rule, token_id, logprob in zip(x, rules, got.tolist(), logprobs.tolist(), strict=True):
        kept = row.clone()
        alone, probability = sampling.draw_plainly(kept.unsqueeze(0), [rule])
        same = alone.item() == token_id and abs(probability.item() - logprob) < 1e-3 * (1 + abs(logprob))
        if same:
            continue
        # a borderline token on either side of a bound, or the number on either side of a token
        near = [sampling.draw_plainly(row.clone().unsqueeze(0), [rule._replace(at=rule.at + d)]) for d in (-1e-5, 1e-5)]
        shifted = rule._replace(top_p=min(1.0, rule.top_p * (1 + 1e-4)), min_p=rule.min_p * (1 - 1e-4))
        near.append(sampling.draw_plainly(row.clone().unsqueeze(0), [shifted]))
        shifted = rule._replace(top_p=rule.top_p * (1 - 1e-4), min_p=min(1.0, rule.min_p * (1 + 1e-4)))
        near.append(sampling.draw_plainly(row.clone().unsqueeze(0), [shifted]))
        assert any(near_id.item() == token_id for near_id, _ in near), (rule, token_id, alone, logprob, probability)
    broken = torch.zeros(3, 9)
    broken[0, 4], broken[1], broken[2, 8] = float("nan"), float("-inf"), float("inf")
    assert native.draw(broken, [sampling.DrawRule(1.0, 1.0, 0.0, 0, 0.5)] * 3)[1].isnan().all()


def plain_products(rng: random.Random, form: str, dtype: torch.dtype) -> None:
    """Packed products against float64, at ragged shapes; the result of a row does not depend on its batch."""
    m = rng.choice([1, 2, 5, 7, 12, 13, 33, 64, 65, 97, 200])
    n, k = rng.choice([1, 31, 64, 65, 130, 256]), rng.choice([2, 6, 126, 128, 130, 512, 514])
    wide = torch.randn(m, k + 2).to(dtype)
    x = wide[:, :k]  # rows further apart than they are long
    weight, other = torch.randn(n, k).to(dtype) / k**0.5, torch.randn(n, k).to(dtype) / k**0.5
    bias, residual = rng.choice([None, torch.randn(n).to(dtype)]), rng.choice([None, torch.randn(m, n).to(dtype)])

    def exact(w: torch.Tensor) -> torch.Tensor:
        y = x.double() @ w.double().T
        return y if bias is None else y + bias.double()

    def close(got: torch.Tensor, expected: torch.Tensor) -> bool:
        allowed = expected.abs() * 2**-8 + 1e-4 if form == "bf16" else expected.abs() * 1e-5 + 1e-5
        return bool(torch.all((got.double() - expected).abs() <= allowed))

    packed = products.pack(form, (weight,), (bias,))
    got = products.multiply(packed, x, residual)
    assert close(got, exact(weight) + (0 if residual is None else residual.double())), (m, n, k)
    row = rng.randrange(m)
    alone = products.multiply(packed, x[row : row + 1], None if residual is None else residual[row : row + 1])
    assert torch.equal(alone[0], got[row]), (m, n, k, row)
    name = rng.choice(sorted(products.GATES))
    got = products.multiply_gated(products.pack(form, (weight, other), (bias, bias), name), x)
    assert close(got, ACTIVATIONS[name](exact(weight)) * exact(other)), (m, n, k, name)


def int8_products(rng: random.Random) -> None:
    """8-bit products against the same integers multiplied in float64, and not far from the unquantized ones."""
    m = rng.choice([1, 2, 5, 7, 12, 13, 33, 65, 97, 200])
    n, k = rng.choice([1, 31, 64, 65, 130]), rng.choice([4, 60, 256, 260, 516])
    x = torch.randn(m, k + 2).bfloat16()[:, :k]
    x[rng.randrange(m)] = 0
    weights = [torch.randn(n, k).bfloat16() / k**0.5 for _ in range(2)]
    bias, residual = rng.choice([None, torch.randn(n).bfloat16()]), rng.choice([None, torch.randn(m, n).bfloat16()])
    rows, scales = products.quantize_rows(x)
    back = (rows.double() - 128) * scales.double().unsqueeze(1)
    assert torch.all((back - x.double()).abs() <= scales.double().unsqueeze(1) * 0.5001)
    quantized = [products.quantize_columns(w) for w in weights]

    def exact(i: int) -> torch.Tensor:
        values, scales = quantized[i]
        y = back @ (values.double() * scales.double().unsqueeze(1)).T
        return y if bias is None else y + bias.double()

    def close(got: torch.Tensor, expected: torch.Tensor) -> bool:
        return bool(torch.all((got.double() - expected).abs() <= expected.abs() * 2**-8 + 1e-4))

    packed = products.pack("int8", (weights[0],), (bias,))
    assert torch.equal(packed.scales[0], quantized[0][1])
    assert torch.equal(packed.weights.transpose(1, 2).reshape(-1, k)[:n], quantized[0][0]), (n, k)
    got = products.multiply(packed, x, residual)
    added = 0 if residual is None else residual.double()
    assert close(got, exact(0) + added), (m, n, k)
    plain = x.double() @ weights[0].double().T + (0 if bias is None else bias.double()) + added
    assert (got.double() - plain).norm() <= 0.03 * plain.norm() + 0.1, (m, n, k)
    name = rng.choice(sorted(products.GATES))
    got = products.multiply_gated(products.pack("int8", (weights[0], weights[1]), (bias, bias), name), x)
    assert close(got, ACTIVATIONS[name](exact(0)) * exact(1)), (m, n, k, name)


def int4_products(rng: random.Random) -> None:
    """4-bit products against the quantized numbers themselves, which products with unit vectors show."""
    m, n, k = rng.choice([1, 5, 13, 33, 97, 200]), rng.choice([1, 31, 64, 65, 130]), rng.choice([32, 64, 256, 288])
    weights = [torch.randn(n, k).bfloat16() * 10 ** rng.uniform(-2, 1) for _ in range(2)]
    weights[0][:, 5] = 0
    weights[0][rng.randrange(n)] = 0
    unit = torch.eye(k).bfloat16()
    read = []
    for weight in weights:
        back = products.multiply(products.pack("int4", (weight,), (None,)), unit).float().T  # [n, k]
        reach = weight.float().view(n, -1, 32).abs().amax(dim=2, keepdim=True) / 7
        error = (back - weight.float()).view(n, -1, 32).abs()
        assert torch.all(error <= reach * 1.35 + 0.02 * back.view(n, -1, 32).abs() + 1e-6), (n, k)
        allowed = 0.11 if n * k > 2000 else 0.2  # a few groups may all be bad ones
        assert (back - weight.float()).norm() <= allowed * weight.float().norm(), (n, k)
        read.append(back.double())
    x = torch.randn(m, k).bfloat16()
    bias, residual = rng.choice([None, torch.randn(n).bfloat16()]), rng.choice([None, torch.randn(m, n).bfloat16()])
    rows, scales = products.quantize_rows(x)
    exact = (rows.double() - 128) * scales.double().unsqueeze(1)

    def close(got: torch.Tensor, expected: torch.Tensor, allowed: float) -> bool:
        return bool((got.double() - expected).norm() <= allowed * expected.norm() + 1e-3)

    got = products.multiply(products.pack("int4", (weights[0],), (bias,)), x, residual)
    expected = exact @ read[0].T + sum(t.double() for t in (bias, residual) if t is not None)
    assert close(got, expected, 0.01), (m, n, k)
    name = rng.choice(sorted(products.GATES))
    got = products.multiply_gated(products.pack("int4", (weights[0], weights[1]), (None, None), name), x)
    assert close(got, ACTIVATIONS[name](exact @ read[0].T) * (exact @ read[1].T), 0.02), (m, n, k, name)


def special() -> None:
    """NaN goes through, infinite weights too; nothing turns into a number."""
    x = torch.ones(2, 64).bfloat16()
    x[1, 3] = float("nan")
    got = native.rms_norm(x, torch.ones(64).bfloat16(), 1e-5)
    assert got[0].isfinite().all()
    assert got[1].isnan().all()
    k = torch.zeros(2, 1, 16, 64)
    k[0, 0, 2] = float("nan")
    q, out = torch.ones(1, 1, 64), torch.empty(1, 1, 64)
    native.attend(q, out, k, torch.ones_like(k), torch.tensor([[0]]), torch.tensor([2]), 1.0)
    assert torch.equal(out, torch.ones_like(out))  # the NaN lies beyond the context
    native.attend(q, out, k, torch.ones_like(k), torch.tensor([[0]]), torch.tensor([3]), 1.0)
    assert out.isnan().all()
    for length in (1, 9):  # both kernels of attention, over bytes: a scale that is NaN
        small = _in_bytes(torch.ones(2, 1, 16, 64))
        byte_cache.write(small, torch.full((1, 1, 64), float("nan")), torch.tensor([0]), torch.tensor([10]))
        q, out = torch.ones(length, 1, 64), torch.empty(length, 1, 64)
        for keys, values in (
            (small, _in_bytes(torch.ones(2, 1, 16, 64))),
            (_in_bytes(torch.ones(2, 1, 16, 64)), small),
        ):
            native.attend(q, out, keys, values, torch.tensor([[0]]), torch.tensor([10]), 1.0)
            assert torch.allclose(out, torch.ones_like(out), rtol=1e-3)
            native.attend(q, out, keys, values, torch.tensor([[0]]), torch.tensor([11]), 1.0)
            assert out[-1].isnan().all()
    q, out = torch.ones(1, 1, 64), torch.empty(1, 1, 64)
    if products.can_multiply("bf16", torch.empty(2, 2, dtype=torch.bfloat16)):
        x = torch.ones(9, 64).bfloat16()
        x[4, 3] = float("nan")
        ones = torch.ones(70, 64).bfloat16()
        got = products.multiply(products.pack("bf16", (ones,), (None,)), x)
        assert got[4].isnan().all()
        small = products.multiply(products.pack("int8", (ones,), (None,)), x)
        assert small[4].isnan().all()
        assert torch.allclose(small[:4].float(), torch.full((4, 70), 64.0), rtol=0.01)
        assert torch.equal(got[[0, 1, 2, 3, 5, 6, 7, 8]], torch.full((8, 70), 64.0).bfloat16())
    k.zero_()
    k[0, 0, 0] = -1e30
    native.attend(q, out, k, torch.ones_like(k), torch.tensor([[0]]), torch.tensor([5]), 1.0)
    assert torch.allclose(out, torch.ones_like(out))


def main() -> None:
    assert native.LIBRARY is not None, "no library of this level"
    print(native.LIBRARY._name, flush=True)
    torch.manual_seed(0)
    rng = random.Random(0)
    multiplies = products.can_multiply("bf16", torch.empty(2, 2, dtype=torch.bfloat16))
    for _ in range(int(sys.argv[1])):
        for in_bytes in (False, True):
            attention(rng, rng.choice([torch.float32, torch.bfloat16]), in_bytes)
        rotary_in_bytes(rng, rng.choice([torch.float32, torch.bfloat16]))
        rotary(rng, rng.choice([torch.float32, torch.bfloat16]))
        norm(rng)
        gelu(rng)
        largest(rng)
        drawn(rng)
        penalized(rng)
        restricted(rng, rng.choice([torch.float32, torch.bfloat16]))
        if multiplies:
            normed(rng)
            plain_products(rng, "bf16", torch.bfloat16)
            plain_products(rng, "f32", torch.float32)
            int8_products(rng)
            int4_products(rng)
    special()


if __name__ == "__main__":
    main()
