"""From a snapshot folder to our decoder in memory with its cache: resolve the numbers, check the fit, load."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import msgspec
import torch

from penstock.devices import cuda
from penstock.devices.allocator import keep_freed_memory
from penstock.devices.cpu import choose_dtype
from penstock.devices.memory import available_bytes
from penstock.engine.adapters import Adapters, planned_bytes, read_given
from penstock.engine.config import EngineConfig
from penstock.engine.kv_type import kv_bytes, kv_dtype, kv_in_words
from penstock.engine.limits import Limits
from penstock.engine.messages import Stage
from penstock.engine.step import GATHERED
from penstock.engine.weights import load_weights
from penstock.errors import ResourceError, UsageError
from penstock.formats import FORMATS, Format
from penstock.hub.checkpoint import TensorEntry
from penstock.hub.weights import read_weights
from penstock.kernels import products
from penstock.kernels.attention import SCORES
from penstock.models.config import DecoderConfig, VisionConfig, WeightMap
from penstock.models.encoder_decoder import size
from penstock.models.encoder_decoder.config import EncoderDecoderConfig, encodes, read_encoder_decoder
from penstock.models.fallback.config import TransformersConfig
from penstock.models.families import describe, describe_vision
from penstock.models.inputs import KVCache
from penstock.models.model import Model
from penstock.models.tensors import CPU
from penstock.models.vision import VisionTower, tower_entries
from penstock.plan.memory import CARD_MARGIN, GIB, Footprint, KVPlan, human, longest_that_fits, plan_kv
from penstock.plan.work import PairCost, StepCost

HEAD_ROWS = 64  # rows of scores at a time where every prompt position is scored
_TOWER_BYTES = 2**28  # what a vision tower's intermediate results may take: pieces of an image, a layer at a time
_STEP_TOKENS = 2048  # default budget of a step: enough rows for full speed of the matrix products


Config = DecoderConfig | EncoderDecoderConfig


@dataclass
class LoadedModel:
    """A model, its empty cache and what they allow; of one that takes images also how, and its tower."""

    decoder: Model
    cache: KVCache
    limits: Limits
    cost: StepCost | PairCost
    adapters: Adapters
    vision: VisionConfig | None = None
    tower: VisionTower | None = None


def load_decoder(config: EngineConfig, clock: Clock, device: torch.device = CPU) -> LoadedModel:
    """Our own decoder, for a family that it knows, each stage reported when it is done. device: where it will compute.

    The fit is checked before a weight is read. Raises PenstockError of the fitting kind.
    """
    folder = Path(config.model_path)
    described, names = _describe(folder, config)
    entries = None if config.dummy_weights else read_weights(folder)
    name, dtype, text = choose_format(config, described, names, entries, device)
    form = FORMATS[name]
    vision = None if isinstance(described, EncoderDecoderConfig) else describe_vision(folder)
    weight_bytes = planned_weight_bytes(entries, described, names, dtype, form)
    if vision is not None and entries is not None:
        weight_bytes += sum(prod(e.shape) for e in tower_entries(entries, names).values()) * dtype.itemsize

    kept = kv_dtype(config, dtype)
    cost = _cost(described, form.weight_bytes or dtype.itemsize, kv_bytes(described, kept) / described.kv_elements)
    decoder_config = described if isinstance(described, DecoderConfig) else None
    given = read_given(config, decoder_config, names)
    adapter_bytes = planned_bytes(config, given, dtype)
    config, available = with_room(config, device)
    limits, plan = fit(config, described, dtype, weight_bytes, cost.weight_size, available, adapter_bytes, vision)
    clock.done("model", f"{described.family} {_kind(described)} {text}{'' if vision is None else '; takes images'}")
    kv_token = plan.kv_bytes // (plan.num_blocks * plan.block_size)
    kv_text = (
        f"{plan.num_blocks * plan.block_size} tokens x {human(kv_token)} = {human(plan.kv_bytes)} "
        f"({plan.reason}; --max-batch-total-tokens){kv_in_words(config, device)}"
    )
    adapter_text = f" + adapters {human(adapter_bytes)}" if adapter_bytes else ""
    clock.done("KV memory", f"weights {human(weight_bytes)}{adapter_text} + KV {kv_text}")

    tower = None if vision is None else VisionTower.load(folder, entries, names, dtype, device)
    decoder, remark = load_weights(
        config, described, names, entries, dtype, name, limits.max_total_tokens, weight_bytes, device
    )
    keep_freed_memory()  # from here on: what loading frees is not needed again
    cache = decoder.new_cache(plan.num_blocks, plan.block_size, kept)
    kind = "random weights (--dummy-weights)" if entries is None else "weights"
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    clock.done("load", f"{human(weight_bytes)} of {kind}{threads}{remark}")
    # without a bound, those that come while it runs may have half of what is planned for nothing else
    room = adapter_bytes + (plan.spare // 2 if config.max_adapter_bytes is None else 0)
    adapters = Adapters(config, decoder_config, names, dtype, room, device)
    for adapter, file in given.items():
        adapters.add(adapter, file)
    if given:
        clock.done("adapters", f"{', '.join(given)}: {human(adapters.nbytes)} of {human(room)}")
    return LoadedModel(decoder, cache, limits, cost, adapters, vision, tower)


def with_room(config: EngineConfig, device: torch.device) -> tuple[EngineConfig, int]:
    """The memory that a model may share out on a device, and the configuration with the share of it."""
    if device.type == "cpu":
        return config, available_bytes()
    usable = cuda.usable_bytes(device, config.cuda_memory_fraction)
    return msgspec.structs.replace(config, memory_fraction=1.0), max(0, usable - CARD_MARGIN)


def _describe(folder: Path, config: EngineConfig) -> tuple[Config, WeightMap]:
    """What to compute, and, of a decoder, where its tensors lie."""
    if encodes(folder):
        return read_encoder_decoder(folder, config.rope_scaling, config.rope_factor), WeightMap()
    return describe(folder, config.rope_scaling, config.rope_factor)


def _kind(described: Config) -> str:
    return "encoder-decoder" if isinstance(described, EncoderDecoderConfig) else "decoder"


def _cost(described: Config, weight_size: float, kv_size: float) -> StepCost | PairCost:
    if isinstance(described, EncoderDecoderConfig):
        return PairCost.of(described, weight_size, kv_size)
    return StepCost.of(described, weight_size, kv_size)


def choose_format(
    config: EngineConfig,
    decoder: Config,
    names: WeightMap,
    entries: dict[str, TensorEntry] | None,
    device: torch.device = CPU,
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
        fits = planned_weight_bytes(entries, decoder, names, torch.bfloat16, FORMATS["int8"]) <= half
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


def planned_weight_bytes(
    entries: dict[str, TensorEntry] | None, config: Config, names: WeightMap, dtype: torch.dtype, form: Format
) -> int:
    """Bytes of the weights as they will be kept; a tied matrix is kept twice, as table and as packed head. entries:
    None for random weights."""
    if isinstance(config, EncoderDecoderConfig):
        return size.weight_bytes(entries, config, dtype, form)
    one = form.weight_bytes or dtype.itemsize
    if entries is None:
        cost = StepCost.of(config, one, dtype.itemsize)
        return int(cost.parameters * one + cost.head * (one + dtype.itemsize))
    names = names.found_in(entries)
    tables = {names.embedding_tensor, f"{names.base}{names.positions}.weight"}
    total = 0.0
    for name, entry in entries.items():
        ours = name.startswith((names.base, names.head))  # a larger model has more, which is not read
        if ours and len(entry.shape) <= 3:  # masks that old checkpoints store have four axes
            matrix = len(entry.shape) >= 2 and name not in tables
            total += prod(entry.shape) * (one if matrix else dtype.itemsize)
    if config.tie_head and names.head_tensor not in entries and (dtype == torch.bfloat16 or form.weight_bytes):
        total += config.vocab_size * (config.embedding_size or config.hidden_size) * one
    return int(total)


Shape = Config | TransformersConfig


def fit(
    config: EngineConfig,
    decoder: Shape,
    dtype: torch.dtype,
    weight_bytes: int,
    weight_size: float,
    available: int,
    adapter_bytes: int = 0,
    vision: VisionConfig | None = None,
) -> tuple[Limits, KVPlan]:
    """Derive every limit that was not given, and check that it all fits. available: bytes free before the weights."""
    encodes = isinstance(decoder, EncoderDecoderConfig)
    rows = config.max_batch_size or min(config.max_concurrent_requests, 128)
    budget = config.max_batch_prefill_tokens or _STEP_TOKENS
    if min(rows, budget, config.block_size) < 1:
        raise UsageError("--max-batch-size and --max-batch-prefill-tokens must be at least 1")
    if not 0 < config.memory_fraction <= 1 or not 0 <= config.watermark_gamma <= 1:
        raise UsageError("the memory fraction and --watermark-gamma are shares: above 0, at most 1")
    kv_token = kv_bytes(decoder, kv_dtype(config, dtype))
    longest = config.max_total_tokens or decoder.max_positions
    if encodes:  # which reads a prompt whole, beside all that decode
        budget = max(budget, (config.max_input_tokens or longest - 1) + config.block_size + rows)
    step = step_bytes(decoder, dtype, budget, rows, longest)
    if adapter_bytes and isinstance(decoder, DecoderConfig):  # a gated MLP's halves apart, and what is added to them
        step += 3 * budget * decoder.mlp_width * dtype.itemsize
    if vision is not None:
        step += _TOWER_BYTES
    footprint = Footprint(weight_bytes, kv_token, step, adapter_bytes)

    asked = max(config.max_total_tokens or 0, (config.max_input_tokens or 0) + 1)
    if asked > decoder.max_positions and not encodes:
        raise UsageError(
            f"{asked} tokens (--max-total-tokens, --max-input-tokens) are beyond the model's "
            f"{decoder.max_positions} positions",
            hint="lower it, or stretch the positions with --rope-scaling dynamic --rope-factor N",
        )
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
    if encodes:  # where a prompt's keys and values end, a block ends
        block = config.block_size * kv_token
        plan = replace(plan, num_blocks=plan.num_blocks + 1, kv_bytes=plan.kv_bytes + block)
    inputs = config.max_input_tokens or total - 1
    if vision is not None and vision.whole and isinstance(decoder, DecoderConfig):
        # such a prompt is computed in one step, and inside every window
        inputs = min(inputs, budget, *(window for window in decoder.windows if window is not None))
    if inputs >= total:
        raise UsageError(f"`max_input_tokens`({inputs}) must be < `max_total_tokens`({total})")
    limits = Limits(
        max_input_tokens=inputs,
        max_total_tokens=total,
        vocab_size=decoder.vocab_size,
        eos_ids=list(decoder.eos_ids),
        block_size=config.block_size,
        num_blocks=plan.num_blocks,
        max_batch_prefill_tokens=budget,
        max_batch_size=rows,
        dtype=str(dtype).removeprefix("torch."),
        num_layers=decoder.encoder_layers if isinstance(decoder, EncoderDecoderConfig) else decoder.num_layers,
        hidden_size=decoder.hidden_size,
        weight_size=weight_size,
        start_id=decoder.start_id if isinstance(decoder, EncoderDecoderConfig) else None,
        image_token=None if vision is None else vision.image_token,
    )
    return limits, plan


def step_bytes(decoder: Shape, dtype: torch.dtype, budget: int, rows: int, total: int) -> int:
    """The most that the intermediate results of one step take."""
    logits = max(rows, HEAD_ROWS) * decoder.vocab_size * 16  # float32, and for draws a copy and probabilities
    if isinstance(decoder, EncoderDecoderConfig):
        gathered = 2 * decoder.inner_size * max(GATHERED, total) * dtype.itemsize
        return size.step_bytes(decoder, dtype, budget, total) + gathered + logits
    wide = 4 * decoder.hidden_size + 3 * decoder.mlp_width + 2 * decoder.num_heads * decoder.head_width
    gathered = 2 * decoder.num_kv_heads * decoder.head_width * max(GATHERED, total)
    scores = 3 * min(SCORES, decoder.num_heads * max(budget, rows) * total)
    return (budget * wide + gathered + scores) * dtype.itemsize + logits


def _default_total(config: EngineConfig, decoder: Shape, footprint: Footprint, available: int) -> int:
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
