"""The GPU's kernels against plain torch at random shapes: on the interpreter by test_triton_*.py, on a card by
benchmarks/gpu_kernels.py. Every function takes a random generator and where to compute, and raises where they differ.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from penstock.kernels.attention import PagedBatch, RunGroup, _attend, _Rule, alibi_table

BFLOAT16 = {"atol": 2e-2, "rtol": 2e-2}
EXACT = {"atol": 2e-5, "rtol": 2e-5}


def seeded(seed: int) -> random.Random:
    torch.manual_seed(seed)
    return random.Random(seed)


def close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(got.float().cpu(), expected.float(), **(EXACT if dtype == torch.float32 else BFLOAT16))


def attention(
    rng: random.Random,
    device: str,
    dtype: torch.dtype = torch.float32,
    cache: torch.dtype | None = None,
    lengths: list[int] | None = None,
    size: int = 1,
) -> None:
    """One step of short runs and one of any, over a cache of `cache` (None: of `dtype`). size: how large it gets."""
    from penstock.kernels.triton.attention import paged_attention

    kv_heads, repeats = rng.choice([1, 2, 3]), rng.choice([1, 2, 4, 5, 7])
    dim, block_size = rng.choice([5, 16, 40, 64, 96, 128]), rng.choice([1, 3, 16, 32])
    if lengths is None:
        longest = rng.choice([1, 2, 5, 8, 9, 40 * size])
        lengths = [rng.randint(1, longest) for _ in range(rng.choice([1, 2, 5]))]
    contexts = [n + rng.choice([0, rng.randrange(150 * size)]) for n in lengths]
    width = -(-max(contexts) // block_size)
    num_blocks = len(lengths) * width + 3
    table = torch.randperm(num_blocks)[: len(lengths) * width].view(len(lengths), width).to(torch.int32)
    q = torch.randn(sum(lengths), kv_heads * repeats + 1, dim).to(dtype)[:, 1:]  # strided, as out of a wider product
    k, v = (torch.randn(num_blocks, kv_heads, block_size, dim).to(dtype) for _ in range(2))
    for run, context in enumerate(contexts):  # what lies past the context must not matter, whatever it is
        if context % block_size:
            v[table[run, context // block_size].long(), :, context % block_size :] = float("nan")
    k_scale = v_scale = None
    if cache is not None:
        k, v = k.to(cache), v.to(cache)
        k_scale, v_scale = (torch.rand(kv_heads) + 0.5 for _ in range(2))
    window, chunk = rng.choice([None, None, 1, 9, 50]), rng.choice([None, None, 7, 64])
    softcap = rng.choice([None, None, 3.0])
    alibi = rng.choice([None, None, alibi_table(q.shape[1], max(contexts))])
    scale = dim**-0.5

    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    batch = PagedBatch(
        *(starts.to(device), torch.tensor(contexts, dtype=torch.int32).to(device), table.to(device)),
        rows=sum(lengths),
        max_length=max(lengths),
        max_context=width * block_size,
        fixed_splits=rng.random() < 0.3,
    )
    options = {"softcap": softcap, "chunk": chunk, "alibi": None if alibi is None else alibi.to(device)}
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    scales = {name: None if s is None else s.to(device) for name, s in scales.items()}
    got = paged_attention(q.to(device), k.to(device), v.to(device), [batch], scale, window, **options, **scales)

    k, v = k.float().nan_to_num_(), v.float().nan_to_num_()
    if k_scale is not None and v_scale is not None:
        k, v = k * k_scale.view(-1, 1, 1), v * v_scale.view(-1, 1, 1)
    expected = torch.empty(q.shape)
    for i, n in enumerate(lengths):
        rows = slice(int(starts[i]), int(starts[i]) + n)
        group = RunGroup(0, n, [contexts[i]], table[i : i + 1].long())
        _attend(q[rows].float(), expected[rows], k, v, group, _Rule(scale, window, softcap, chunk, alibi))
    close(got, expected.flatten(1), dtype)
