"""Products, norms and activations as Triton kernels."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton cannot be imported on this machine", exc_type=ImportError)

from penstock.kernels.triton import product
from tests.kernels import triton_twins as twins

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, of infinities that are meant


@pytest.mark.parametrize("rows", [1, 2, 3, 40])
@pytest.mark.parametrize("form", ["bf16", "fp8", "int8", "int4"])
def test_products_equal_those_of_torch(form: str, rows: int) -> None:
    twins.multiplies(twins.seeded(rows), twins.DEVICE, torch.bfloat16, form, rows)


@pytest.mark.parametrize("form", ["bf16", "fp8", "int8", "int4"])
def test_products_of_many_rows_go_by_the_library(form: str) -> None:
    twins.multiplies(twins.seeded(9), twins.DEVICE, torch.float16, form, 300)


def test_a_row_of_a_product_does_not_depend_on_the_others() -> None:
    weight, x = (torch.randn(n, 320).bfloat16().to(twins.DEVICE) for n in (48, 30))
    matrix = product.pack("bf16", (weight,), (None,), None)
    assert torch.equal(product.multiply(matrix, x)[:5], product.multiply(matrix, x[:5]))


@pytest.mark.parametrize("seed", range(6))
def test_norms_and_activations_equal_those_of_torch(seed: int) -> None:
    twins.normalizes(twins.seeded(seed), twins.DEVICE, torch.float32 if seed % 2 else torch.bfloat16)


def test_an_empty_step_has_no_results() -> None:
    weight = torch.randn(16, 64).bfloat16().to(twins.DEVICE)
    assert product.multiply(product.pack("int8", (weight,), (None,), None), weight[:0]).shape == (0, 16)
