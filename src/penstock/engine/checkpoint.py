"""A decoder that is described and not loaded yet, and what the options allow of it, whatever the memory: for a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from penstock.engine.config import EngineConfig
from penstock.engine.limits import Limits
from penstock.engine.load import Clock, choose_format, planned_weight_bytes
from penstock.errors import UsageError
from penstock.formats import FORMATS, Format
from penstock.hub.checkpoint import TensorEntry
from penstock.hub.weights import read_weights
from penstock.models.config import DecoderConfig, WeightMap
from penstock.models.decoder import Decoder
from penstock.models.families import describe
from penstock.plan.work import StepCost


@dataclass(frozen=True)
class Checkpoint:
    """entries: None for random weights. dtype: what is computed in; form: how matrices are stored; weight_bytes: of all
    that will be kept."""

    decoder: DecoderConfig
    names: WeightMap
    entries: dict[str, TensorEntry] | None
    dtype: torch.dtype
    form: Format
    weight_bytes: int

    @classmethod
    def read(cls, config: EngineConfig, device: torch.device, clock: Clock) -> Checkpoint:
        """What the model's folder says, and the format to keep it in. Raises PenstockError of the fitting kind."""
        folder = Path(config.model_path)
        decoder, names = describe(folder, config.rope_scaling, config.rope_factor)
        entries = None if config.dummy_weights else read_weights(folder)
        name, dtype, text = choose_format(config, decoder, names, entries, device)
        weight_bytes = planned_weight_bytes(entries, decoder, names, dtype, FORMATS[name])
        clock.done("model", f"{decoder.family} decoder {text}")
        return cls(decoder, names, entries, dtype, FORMATS[name], weight_bytes)

    @property
    def weight_size(self) -> float:
        """Bytes of one weight of a matrix."""
        return self.form.weight_bytes or self.dtype.itemsize

    def load(self, positions: int, device: torch.device) -> Decoder:
        """Read the weights. positions: the longest context that will be asked for."""
        return Decoder.load(self.entries, self.decoder, self.names, self.dtype, positions, self.form, device)

    def cost(self, kv_dtype: torch.dtype) -> StepCost:
        return StepCost.of(self.decoder, self.weight_size, kv_dtype.itemsize)

    def batch(self, config: EngineConfig, budget: int) -> tuple[int, int]:
        """Sequences that run together and tokens of a step, `budget` where none is given. Raises UsageError for options
        that no memory could satisfy."""
        rows = config.max_batch_size or min(config.max_concurrent_requests, 128)
        budget = config.max_batch_prefill_tokens or budget
        if min(rows, budget, config.block_size) < 1:
            raise UsageError("--max-batch-size and --max-batch-prefill-tokens must be at least 1")
        if not 0 < config.cuda_memory_fraction <= 1 or not 0 <= config.watermark_gamma <= 1:
            raise UsageError("--cuda-memory-fraction and --watermark-gamma are shares: above 0, at most 1")
        asked = max(config.max_total_tokens or 0, (config.max_input_tokens or 0) + 1)
        if asked > self.decoder.max_positions:
            raise UsageError(
                f"{asked} tokens (--max-total-tokens, --max-input-tokens) are beyond the model's "
                f"{self.decoder.max_positions} positions",
                hint="lower it, or stretch the positions with --rope-scaling dynamic --rope-factor N",
            )
        return rows, budget

    def limits(self, config: EngineConfig, rows: int, budget: int, tokens: int, device: torch.device) -> Limits:
        """What may be asked for with so many tokens of KV memory. Raises UsageError."""
        total = min(config.max_total_tokens or self.decoder.max_positions, tokens)
        if total < max(2, config.max_total_tokens or 0, (config.max_input_tokens or 0) + 1):
            raise UsageError(
                f"the KV cache holds {tokens} tokens, less than one sequence of --max-total-tokens",
                hint="lower that, or give the cache more: --kv-cache-gib, --cuda-memory-fraction, --kv-cache-dtype",
            )
        inputs = config.max_input_tokens or total - 1
        if inputs >= total:
            raise UsageError(f"`max_input_tokens`({inputs}) must be < `max_total_tokens`({total})")
        return Limits(
            max_input_tokens=inputs,
            max_total_tokens=total,
            vocab_size=self.decoder.vocab_size,
            eos_ids=list(self.decoder.eos_ids),
            block_size=config.block_size,
            num_blocks=tokens // config.block_size,
            max_batch_prefill_tokens=budget,
            max_batch_size=rows,
            dtype=str(self.dtype).removeprefix("torch."),
            num_layers=self.decoder.num_layers,
            hidden_size=self.decoder.hidden_size,
            device=str(device),
            weight_size=self.weight_size,
        )
