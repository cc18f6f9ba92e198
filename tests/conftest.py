"""Fixtures for every room: thread counts, tiny random checkpoints."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # kernels for GPUs then run on Triton's interpreter: to be said before it is imported
    os.environ["TRITON_INTERPRET"] = "1"

from tests.checkpoints import save_tiny


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer Llama in float32, a byte-level tokenizer and a chat template."""
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny-llama", "llama")
