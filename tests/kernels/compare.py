"""Compares the compiled kernels with their torch twins at random shapes; run by test_native.py once a level."""

from __future__ import annotations

import random
import sys

import torch
import torch.nn.functional as F

from penstock.kernels import native
from penstock.kernels.attention import RunGroup, _attend


def attention(rng: random.Random, dtype: torch.dtype) -> None:
    kv_heads, repeats, dim = (
        rng.choice([1, 2, 3]),
        rng.choice([1, 2, 4, 5, 8, 11]),
        rng.choice([8, 40, 64, 96, 128, 256]),
    )
    block_size, batch, length = rng.choice([1, 3, 16, 32]), rng.choice([1, 2, 7]), rng.choice([1, 2, 5])
    window = rng.choice([None, 1, 9, 50])
    contexts = [rng.randrange(length, 90) for _ in range(batch)]
    width = -(-max(contexts) // block_size)
    num_blocks = batch * width + 3
    blocks = torch.randperm(num_blocks)[: batch * width].view(batch, width)
    shape = (kv_heads, num_blocks, block_size, dim)
    k, v = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    q = torch.randn(batch * length, kv_heads * repeats, dim).to(dtype)
    got, expected = torch.empty_like(q), torch.empty_like(q)
    scale = dim**-0.5
    assert native.can_attend(q, k)
    native.attend(q, got, k, v, blocks, contexts, scale, window)
    group = RunGroup(0, length, contexts, blocks)
    _attend(q.float(), exact := torch.empty(q.shape), k.float(), v.float(), group, scale, window)
    group.masks.clear()
    _attend(q, expected, k, v, group, scale, window)
    # against the exact result the kernel is no worse than the twin of the same type
    allowed = max(2 * float((expected.float() - exact).abs().max()), 2e-6)
    error = float((got.float() - exact).abs().max())
    assert error <= allowed, (error, allowed, dtype, shape, contexts, length, window)


def norm(rng: random.Random) -> None:
    x = torch.randn(rng.choice([1, 3, 70]), rng.choice([1, 7, 64, 1000, 2048])) * 10 ** rng.uniform(-3, 3)
    weight = torch.randn(x.shape[-1])
    half, half_weight = x.bfloat16(), weight.bfloat16()
    exact = F.rms_norm(half.double(), (x.shape[-1],), half_weight.double(), 1e-5)
    got = native.rms_norm(half, half_weight, 1e-5)
    assert torch.all((got.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-30)


def special() -> None:
    """NaN goes through, infinite weights too; nothing turns into a number."""
    x = torch.ones(2, 64).bfloat16()
    x[1, 3] = float("nan")
    got = native.rms_norm(x, torch.ones(64).bfloat16(), 1e-5)
    assert got[0].isfinite().all()
    assert got[1].isnan().all()
    k = torch.zeros(1, 2, 16, 64)
    k[0, 0, 2] = float("nan")
    q, out = torch.ones(1, 1, 64), torch.empty(1, 1, 64)
    native.attend(q, out, k, torch.ones_like(k), torch.tensor([[0]]), [2], 1.0, None)
    assert torch.equal(out, torch.ones_like(out))  # the NaN lies beyond the context
    native.attend(q, out, k, torch.ones_like(k), torch.tensor([[0]]), [3], 1.0, None)
    assert out.isnan().all()
    k.zero_()
    k[0, 0, 0] = -1e30
    native.attend(q, out, k, torch.ones_like(k), torch.tensor([[0]]), [5], 1.0, None)
    assert torch.allclose(out, torch.ones_like(out))


def main() -> None:
    assert native.LIBRARY is not None, "no library of this level"
    print(native.LIBRARY._name)
    torch.manual_seed(0)
    rng = random.Random(0)
    for _ in range(int(sys.argv[1])):
        attention(rng, rng.choice([torch.float32, torch.bfloat16]))
        norm(rng)
    special()


if __name__ == "__main__":
    main()
