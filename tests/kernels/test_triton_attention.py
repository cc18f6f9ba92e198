"""Paged attention and the write into the cache as Triton kernels, on the interpreter."""

from __future__ import annotations

import pytest
import torch

from tests.kernels import triton_twins as twins

pytest.importorskip("triton", reason="Triton has no wheel for this machine")


@pytest.mark.parametrize("seed", range(12))
def test_attention_equals_its_twin(seed: int) -> None:
    twins.attention(twins.seeded(seed), "cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_in_sixteen_bits(dtype: torch.dtype) -> None:
    twins.attention(twins.seeded(1), "cpu", dtype, lengths=[1, 3])


@pytest.mark.parametrize("cache", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_attention_over_a_cache_of_eight_bits(cache: torch.dtype) -> None:
    twins.attention(twins.seeded(2), "cpu", torch.bfloat16, cache, lengths=[1, 1])
