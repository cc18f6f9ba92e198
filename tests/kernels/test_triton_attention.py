"""Paged attention and the write into the cache as Triton kernels."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton cannot be imported on this machine", exc_type=ImportError)

from penstock.kernels.attention import PagedBatch
from penstock.kernels.triton.attention import paged_attention
from tests.kernels import triton_twins as twins

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, of infinities that are meant


@pytest.mark.parametrize("seed", range(12))
def test_attention_equals_its_twin(seed: int) -> None:
    twins.attends(twins.seeded(seed), twins.DEVICE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_in_sixteen_bits(dtype: torch.dtype) -> None:
    twins.attends(twins.seeded(1), twins.DEVICE, dtype, lengths=[1, 3])


@pytest.mark.parametrize("cache", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_attention_over_a_cache_of_eight_bits(cache: torch.dtype) -> None:
    twins.attends(twins.seeded(2), twins.DEVICE, torch.bfloat16, cache, lengths=[1, 1])


@pytest.mark.parametrize("seed", range(4))
def test_a_cache_is_written_as_by_its_twin(seed: int) -> None:
    twins.writes(twins.seeded(seed), twins.DEVICE, torch.float32, torch.float32, scaled=False)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_cache_of_eight_bits_is_written(scaled: bool) -> None:
    twins.writes(twins.seeded(5), twins.DEVICE, torch.bfloat16, torch.float8_e4m3fn, scaled)


def test_runs_that_only_fill_up_a_batch_are_zeros_and_wide_tables_are_not_read() -> None:
    with torch.device(twins.DEVICE):
        q, k = torch.randn(3, 2, 16), torch.randn(4, 1, 4, 16)
        table = torch.tensor([[1, 2, 2**30], [2**30, 2**30, 2**30], [3, 2**30, 2**30]], dtype=torch.int32)
        contexts = torch.tensor([7, 0, 4], dtype=torch.int32)
        batch = PagedBatch(torch.arange(4, dtype=torch.int32), contexts, table, rows=3, max_length=1, max_context=12)
    out = paged_attention(q, k, k, [batch], 0.25, None)
    assert out[1].abs().max() == 0
    scores = torch.softmax(q[2] @ k[3, 0].T * 0.25, dim=1)
    torch.testing.assert_close(out[2].view(2, 16), scores @ k[3, 0])


def test_with_fixed_splits_a_run_does_not_depend_on_its_neighbours() -> None:
    with torch.device(twins.DEVICE):
        k, v = torch.randn(80, 2, 16, 32), torch.randn(80, 2, 16, 32)
        q, table = torch.randn(5, 4, 32), torch.randperm(80).view(5, 16).to(torch.int32)
        contexts = torch.tensor([200, 3, 256, 17, 90], dtype=torch.int32)

    def attend(runs: list[int]) -> torch.Tensor:
        starts = torch.arange(len(runs) + 1, dtype=torch.int32, device=twins.DEVICE)
        batch = PagedBatch(starts, contexts[runs], table[runs], len(runs), 1, 256, fixed_splits=True)
        return paged_attention(q[runs], k, v, [batch], 0.2, None)

    assert torch.equal(attend([0]), attend([3, 1, 0])[2:])
