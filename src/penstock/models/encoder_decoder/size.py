"""Bytes of an encoder-decoder, counted before it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch

from penstock.formats import Format
from penstock.hub.checkpoint import TensorEntry
from penstock.kernels.attention import SCORES, SLICE
from penstock.models.encoder_decoder.config import EncoderDecoderConfig
from penstock.models.encoder_decoder.weights import HEAD, embedding_tensor, is_read
from penstock.plan.work import PairCost


def weight_bytes(
    entries: Mapping[str, TensorEntry] | None, config: EncoderDecoderConfig, dtype: torch.dtype, form: Format
) -> int:
    """Bytes of the weights as they will be kept; a tied matrix is kept twice, as table and as packed head. entries:
    None for random weights."""
    size = form.weight_bytes or dtype.itemsize
    table = config.vocab_size * config.hidden_size
    if entries is None:
        return int(PairCost.of(config, size, dtype.itemsize).parameters * size + table * (size + dtype.itemsize))
    kept = embedding_tensor(entries)
    total = 0.0
    for name, entry in entries.items():
        if is_read(name, entries):
            matrix = len(entry.shape) == 2 and name != kept
            total += prod(entry.shape) * (size if matrix else dtype.itemsize)
    if HEAD not in entries and (dtype == torch.bfloat16 or form.weight_bytes):
        total += table * size
    return int(total)


def step_bytes(config: EncoderDecoderConfig, dtype: torch.dtype, tokens: int, total: int) -> int:
    """The most that the intermediate results of one step take, without the scores of the vocabulary.

    tokens: that a step computes; total: length of the longest sequence.
    """
    wide = 4 * config.hidden_size + 3 * config.intermediate_size + 6 * config.inner_size
    scores = min(SCORES, config.num_heads * tokens * total) + 2 * config.num_heads * SLICE * tokens
    return (tokens * wide + 3 * scores) * dtype.itemsize
