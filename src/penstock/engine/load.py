"""From a snapshot folder to a model in memory with its cache: resolve the numbers, check the fit, load, warm."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from penstock.devices import cuda
from penstock.devices.allocator import keep_freed_memory
from penstock.devices.cpu import choose_dtype
from penstock.devices.memory import available_bytes
from penstock.engine.adapters import Adapters, planned_bytes, read_given
from penstock.engine.config import EngineConfig
from penstock.engine.request import Limits, Stage
from penstock.engine.step import GATHERED
from penstock.errors import ResourceError, UsageError
from penstock.formats import FORMATS, Format
from penstock.hub.checkpoint import TensorEntry
from penstock.hub.weights import read_weights
from penstock.kernels import products
from penstock.kernels.attention import SCORES
from penstock.models.config import DecoderConfig, WeightMap
from penstock.models.decoder import Decoder
from penstock.models.families import describe
from penstock.models.inputs import KVCache
from penstock.models.tensors import CPU
from penstock.plan.memory import GIB, Footprint, KVPlan, human, longest_that_fits, plan_kv
from penstock.plan.work import StepCost

HEAD_ROWS = 64  # rows of scores at a time where every prompt position is scored
_NOT_HERE = "; --kv-cache-dtype is for GPUs, and has no effect"
_STEP_TOKENS = 2048  # default budget of a step: enough rows for full speed of the matrix products


@dataclass
class LoadedModel:
    """A decoder, its empty cache and what they allow."""

    decoder: Decoder
    cache: KVCache
    limits: Limits
    cost: StepCost
    adapters: Adapters


@dataclass(frozen=True)
class Checkpoint:
    """A model that is described and not loaded yet.

    entries: None for random weights. dtype: what is computed in; form: how matrices are stored; weight_bytes: of all
    that will be kept.
    """

    decoder: DecoderConfig
    names: WeightMap
    entries: dict[str, TensorEntry] | None
    dtype: torch.dtype
    form: Format
    weight_bytes: int

    def load(self, positions: int, device: torch.device = CPU) -> Decoder:
        """Read the weights. positions: the longest context that will be asked for."""
        return Decoder.load(self.entries, self.decoder, self.names, self.dtype, positions, self.form, device)

    def cost(self, kv_dtype: torch.dtype) -> StepCost:
        return StepCost.of(self.decoder, self.form.weight_bytes or self.dtype.itemsize, kv_dtype.itemsize)


def read_checkpoint(config: EngineConfig, device: torch.device, clock: Clock) -> Checkpoint:
    """What the model's folder says, and the format to keep it in. Raises PenstockError of the fitting kind."""
    folder = Path(config.model_path)
    decoder, names = describe(folder, config.rope_scaling, config.rope_factor)
    entries = None if config.dummy_weights else read_weights(folder)
    name, dtype, text = _choose_format(config, decoder, names, entries, device)
    weight_bytes = _weight_bytes(entries, decoder, names, dtype, FORMATS[name])
    clock.done("model", f"{decoder.family} decoder {text}")
    return Checkpoint(decoder, names, entries, dtype, FORMATS[name], weight_bytes)


def load_model(config: EngineConfig, on_stage: Callable[[Stage], None]) -> LoadedModel:
    """Everything between the command and the first step on the processor, each stage reported when it is done.

    The fit is checked before a weight is read. Raises PenstockError of the fitting kind.
    """
    clock = Clock(on_stage)
    checkpoint = read_checkpoint(config, CPU, clock)
    dtype, weight_bytes = checkpoint.dtype, checkpoint.weight_bytes
    cost = checkpoint.cost(dtype)
    given = read_given(config, checkpoint.decoder, checkpoint.names)
    adapter_bytes = planned_bytes(config, given, dtype)
    limits, plan = _fit(config, checkpoint.decoder, dtype, weight_bytes, cost.weight_size, adapter_bytes)
    kv_token = plan.kv_bytes // (plan.num_blocks * plan.block_size)
    kv_text = (
        f"{plan.num_blocks * plan.block_size} tokens x {human(kv_token)} = {human(plan.kv_bytes)} "
        f"({plan.reason}; --max-batch-total-tokens){'' if config.kv_cache_dtype is None else _NOT_HERE}"
    )
    adapter_text = f" + adapters {human(adapter_bytes)}" if adapter_bytes else ""
    clock.done("KV memory", f"weights {human(weight_bytes)}{adapter_text} + KV {kv_text}")

    decoder = checkpoint.load(limits.max_total_tokens)
    keep_freed_memory()  # from here on: what loading frees is not needed again
    cache = decoder.new_cache(plan.num_blocks, plan.block_size)
    kind = "random weights (--dummy-weights)" if checkpoint.entries is None else "weights"
    clock.done("load", f"{human(weight_bytes)} of {kind}, {torch.get_num_threads()} threads")
    # without a bound, those that come while it runs may have half of what is planned for nothing else
    room = adapter_bytes + (plan.spare // 2 if config.max_adapter_bytes is None else 0)
    adapters = Adapters(config, checkpoint.decoder, checkpoint.names, dtype, room)
    for adapter, file in given.items():
        adapters.add(adapter, file)
    if given:
        clock.done("adapters", f"{', '.join(given)}: {human(adapters.nbytes)} of {human(room)}")
    return LoadedModel(decoder, cache, limits, cost, adapters)


def _choose_format(
    config: EngineConfig,
    decoder: DecoderConfig,
    names: WeightMap,
    entries: dict[str, TensorEntry] | None,
    device: torch.device,
) -> tuple[str, torch.dtype, str]:
    """The name of the format, the working type, and both in words."""
    asked = config.quantize
    if asked not in (*FORMATS, "bf16", "auto"):
        raise UsageError(f"unknown format {asked!r}", hint=f"--quantize takes {', '.join(FORMATS)}, bf16, auto")
    name, reason = {"bf16": "none", "auto": "none"}.get(asked, asked), ""
    if device.type != "cpu":
        dtype, why = cuda.choose_dtype("bfloat16" if asked == "bf16" else config.dtype, decoder.dtype)
        if name != "none" and dtype == torch.float32 and config.dtype == "auto":
            dtype, why = torch.bfloat16, "what quantized matrices multiply"
        return name, dtype, _in_words(name, dtype, why, "")
    if name == "fp8":
        raise UsageError("fp8 matrices are for GPUs", hint="--quantize int8 takes as few bytes on a processor")
    if asked == "auto" and products.COMPILED:
        half = available_bytes() // 2
        fits = _weight_bytes(entries, decoder, names, torch.bfloat16, FORMATS["int8"]) <= half
        name = "int8" if fits else "int4"
        reason = ": half the bytes of bfloat16" if fits else ": 8 bits would take half of the free memory"
    dtype, why = choose_dtype(
        "bfloat16" if asked == "bf16" else config.dtype, decoder.dtype, products.COMPILED, name != "none"
    )
    return name, dtype, _in_words(name, dtype, why, reason)


def _in_words(name: str, dtype: torch.dtype, why: str, reason: str) -> str:
    stored = "" if name == "none" else f", its matrices in {name}{reason} (--quantize)"
    return f"in {str(dtype).removeprefix('torch.')}: {why} (--dtype){stored}"


class Clock:
    """Reports stages with the seconds since the last one."""

    def __init__(self, on_stage: Callable[[Stage], None]) -> None:
        self._on_stage, self._since = on_stage, time.perf_counter()

    def done(self, name: str, text: str) -> None:
        now = time.perf_counter()
        self._on_stage(Stage(name, text, now - self._since))
        self._since = now


def _weight_bytes(
    entries: dict[str, TensorEntry] | None, config: DecoderConfig, names: WeightMap, dtype: torch.dtype, form: Format
) -> int:
    """Bytes of the weights as they will be kept; a tied matrix is kept twice, as table and as packed head. entries:
    None for random weights."""
    size = form.weight_bytes or dtype.itemsize
    if entries is None:
        cost = StepCost.of(config, size, dtype.itemsize)
        return int(cost.parameters * size + cost.head * (size + dtype.itemsize))
    names = names.found_in(entries)
    tables = {names.embedding_tensor, f"{names.base}{names.positions}.weight"}
    total = 0.0
    for name, entry in entries.items():
        ours = name.startswith((names.base, names.head))  # a larger model has more, which is not read
        if ours and len(entry.shape) <= 3:  # masks that old checkpoints store have four axes
            matrix = len(entry.shape) >= 2 and name not in tables
            total += prod(entry.shape) * (size if matrix else dtype.itemsize)
    if config.tie_head and names.head_tensor not in entries and (dtype == torch.bfloat16 or form.weight_bytes):
        total += config.vocab_size * (config.embedding_size or config.hidden_size) * size
    return int(total)


def _fit(
    config: EngineConfig,
    decoder: DecoderConfig,
    dtype: torch.dtype,
    weight_bytes: int,
    weight_size: float,
    adapter_bytes: int,
) -> tuple[Limits, KVPlan]:
    """Derive every limit that was not given, and check that it all fits."""
    rows, budget = check_options(config, decoder, _STEP_TOKENS)
    kv_token = decoder.kv_elements * dtype.itemsize
    step = _step_bytes(decoder, dtype, budget, rows, config.max_total_tokens or decoder.max_positions)
    if adapter_bytes:  # the two halves of a gated MLP apart, and what is added to them
        step += 3 * budget * decoder.mlp_width * dtype.itemsize
    footprint = Footprint(weight_bytes, kv_token, step, adapter_bytes)
    available = available_bytes()
    slots = config.max_batch_total_tokens
    if slots is None and config.kv_cache_gib is not None:
        slots = int(config.kv_cache_gib * GIB) // kv_token
    total = config.max_total_tokens or _default_total(config, decoder, footprint, available)
    plan = plan_kv(
        footprint,
        available,
        config.memory_fraction,
        config.block_size,
        total,
        slots,
        rows,
    )
    return make_limits(config, decoder, dtype, weight_size, rows, budget, total, plan.num_blocks), plan


def check_options(config: EngineConfig, decoder: DecoderConfig, budget: int) -> tuple[int, int]:
    """Sequences that run together and tokens of a step, `budget` where none is given. Raises UsageError for options
    that no memory could satisfy."""
    rows = config.max_batch_size or min(config.max_concurrent_requests, 128)
    budget = config.max_batch_prefill_tokens or budget
    if min(rows, budget, config.block_size) < 1:
        raise UsageError("--max-batch-size and --max-batch-prefill-tokens must be at least 1")
    shares = config.memory_fraction, config.cuda_memory_fraction
    if not all(0 < share <= 1 for share in shares) or not 0 <= config.watermark_gamma <= 1:
        raise UsageError("the memory fraction and --watermark-gamma are shares: above 0, at most 1")
    asked = max(config.max_total_tokens or 0, (config.max_input_tokens or 0) + 1)
    if asked > decoder.max_positions:
        raise UsageError(
            f"{asked} tokens (--max-total-tokens, --max-input-tokens) are beyond the model's "
            f"{decoder.max_positions} positions",
            hint="lower it, or stretch the positions with --rope-scaling dynamic --rope-factor N",
        )
    return rows, budget


def make_limits(
    config: EngineConfig,
    decoder: DecoderConfig,
    dtype: torch.dtype,
    weight_size: float,
    rows: int,
    budget: int,
    total: int,
    num_blocks: int,
) -> Limits:
    """The limits of a model that fits. total: tokens of the longest sequence. Raises UsageError."""
    inputs = config.max_input_tokens or total - 1
    if inputs >= total:
        raise UsageError(f"`max_input_tokens`({inputs}) must be < `max_total_tokens`({total})")
    return Limits(
        max_input_tokens=inputs,
        max_total_tokens=total,
        vocab_size=decoder.vocab_size,
        eos_ids=list(decoder.eos_ids),
        block_size=config.block_size,
        num_blocks=num_blocks,
        max_batch_prefill_tokens=budget,
        max_batch_size=rows,
        dtype=str(dtype).removeprefix("torch."),
        num_layers=decoder.num_layers,
        hidden_size=decoder.hidden_size,
        weight_size=weight_size,
    )


def _step_bytes(decoder: DecoderConfig, dtype: torch.dtype, budget: int, rows: int, total: int) -> int:
    """The most that the intermediate results of one step take."""
    wide = 4 * decoder.hidden_size + 3 * decoder.mlp_width + 2 * decoder.num_heads * decoder.head_width
    gathered = 2 * decoder.num_kv_heads * decoder.head_width * max(GATHERED, total)
    scores = 3 * min(SCORES, decoder.num_heads * max(budget, rows) * total)
    logits = max(rows, HEAD_ROWS) * decoder.vocab_size  # float32, and for draws a copy and probabilities
    return (budget * wide + gathered + scores) * dtype.itemsize + logits * 16


def _default_total(config: EngineConfig, decoder: DecoderConfig, footprint: Footprint, available: int) -> int:
    """The longest sequence to promise when the user names none: the model's context, or what the memory holds."""
    ceiling = decoder.max_positions
    if config.max_batch_total_tokens is not None:
        ceiling = min(ceiling, config.max_batch_total_tokens // config.block_size * config.block_size)
    if config.max_input_tokens is not None:
        ceiling = max(ceiling, config.max_input_tokens + 1)
    fits = longest_that_fits(footprint, available, config.memory_fraction, config.block_size)
    if fits < min(ceiling, 16 * config.block_size):
        # not worth starting: let the plan refuse with the sums
        return min(ceiling, decoder.max_positions)
    total = min(ceiling, fits)
    if total < 2:
        raise ResourceError("the KV cache holds less than two tokens", hint="raise --max-batch-total-tokens")
    return total
