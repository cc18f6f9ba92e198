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
from penstock.kernels import products
from penstock.kernels.stored import StoredMatrix, whole
from penstock.models.tensors import _CONVERTED, _PIECE, TensorReader


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


def test_a_matrix_is_packed_from_its_files_as_from_memory(tmp_path: Path) -> None:
    sizes, columns = (40, 3, 129), 96  # parts end inside of what a thread reads at a time
    random = torch.Generator().manual_seed(0)
    parts = {f"x{i}": torch.randn(n, columns, generator=random).bfloat16() for i, n in enumerate(sizes)}
    save_file({"x0": parts["x0"], "x2": parts["x2"]}, tmp_path / "a.safetensors")
    save_file({"x1": parts["x1"]}, tmp_path / "b.safetensors")
    stored = TensorReader(read_checkpoint(tmp_path), torch.bfloat16).matrix(
        list(zip(parts, sizes, strict=True)), columns
    )
    assert isinstance(stored, StoredMatrix)
    expected = torch.cat(list(parts.values()))
    assert torch.equal(whole(stored), expected)
    for form in ("bf16", "int8", "int4"):
        if products.can_multiply(form, stored):
            got, known = products.pack(form, (stored,), (None,)), products.pack(form, (expected,), (None,))
            assert isinstance(got, products.Packed)
            assert isinstance(known, products.Packed)
            ours, theirs = (got.weights, *got.scales, *got.offsets), (known.weights, *known.scales, *known.offsets)
            assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(ours, theirs, strict=True))


def test_halves_of_a_stored_matrix_are_those_of_the_tensor(tmp_path: Path) -> None:
    save_file({"x": torch.arange(24.0).view(6, 4)}, tmp_path / "model.safetensors")
    stored = TensorReader(read_checkpoint(tmp_path), torch.float32).matrix([("x", 6)], 4)
    for half, expected in zip(stored.split(3), torch.arange(24.0).view(6, 4).split(3), strict=True):
        assert torch.equal(whole(half), expected)


@pytest.mark.skipif(not products.COMPILED, reason="needs the compiled kernels")
@pytest.mark.parametrize("form", ["bf16", "int8", "int4"])
def test_a_file_that_ends_early_or_is_gone_is_said_while_it_is_packed(form: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"x": torch.ones(300, 64).bfloat16()}, file)
    stored = TensorReader(read_checkpoint(tmp_path), torch.bfloat16).matrix([("x", 300)], 64)
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(ModelError, match="ends early"):
        products.pack(form, (stored,), (None,))
    file.unlink()
    with pytest.raises(ModelError, match=r"cannot read model\.safetensors"):
        products.pack(form, (stored,), (None,))


def test_a_long_tensor_of_another_type_is_converted_in_pieces(tmp_path: Path) -> None:
    numbers = torch.arange(_CONVERTED + 5).half()
    save_file({"x": numbers}, tmp_path / "model.safetensors")
    assert torch.equal(TensorReader(read_checkpoint(tmp_path), torch.float32)("x", (len(numbers),)), numbers.float())
