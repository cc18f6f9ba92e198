"""Tensors read from files by several threads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from penstock.errors import ModelError
from penstock.hub.checkpoint import read_checkpoint
from penstock.models.tensors import _PIECE, TensorReader


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("rows", [_PIECE // 512 * 3, _PIECE // 512 * 2 + 7, 1])
def test_a_tensor_is_the_same_by_any_number_of_threads(threads: int, rows: int, tmp_path: Path) -> None:
    numbers = torch.randint(-1000, 1000, (rows, 128), generator=torch.Generator().manual_seed(0)).float()
    save_file({"before": torch.zeros(3), "x": numbers}, tmp_path / "model.safetensors")
    torch.set_num_threads(threads)
    entries = read_checkpoint(tmp_path)
    assert torch.equal(TensorReader(entries, torch.float32)("x", (rows, 128)), numbers)
    assert torch.equal(TensorReader(entries, torch.bfloat16)("x", (rows, 128)), numbers.bfloat16())
    if rows > 1:
        os.truncate(tmp_path / "model.safetensors", _PIECE)
        with pytest.raises(ModelError, match="ends early"):
            TensorReader(entries, torch.float32)("x", (rows, 128))
