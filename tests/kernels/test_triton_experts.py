"""A mixture of experts as Triton kernels."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton cannot be imported on this machine", exc_type=ImportError)

from penstock.models.experts import stack
from tests.kernels import triton_twins as twins


@pytest.mark.parametrize("form", ["bf16", "fp8", "int8", "int4"])
@pytest.mark.parametrize(("rows", "weighs_input"), [(1, False), (3, True), (40, False)])
def test_every_row_meets_its_own_experts(form: str, rows: int, weighs_input: bool) -> None:
    dtype = torch.float32 if form == "bf16" else torch.bfloat16
    twins.mixes(twins.seeded(rows), twins.DEVICE, dtype, form, rows, weighs_input)


def test_experts_that_differ_are_not_stacked() -> None:
    one, other = (twins.an_expert(twins.DEVICE, form, torch.bfloat16, 64, 128) for form in ("int8", "fp8"))
    assert stack([one, other]) == (None, [one, other])
