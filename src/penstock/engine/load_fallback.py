"""From a snapshot folder to a model of transformers in memory, behind the same engine."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path

import msgspec
import torch

from penstock.devices import cuda
from penstock.devices.cpu import DTYPES, choose_dtype
from penstock.devices.memory import available_bytes
from penstock.engine.adapters import Adapters, read_given
from penstock.engine.config import EngineConfig
from penstock.engine.kv_type import kv_bytes, kv_dtype, kv_in_words, refuse
from penstock.engine.limits import Limits
from penstock.engine.load import Clock, LoadedModel, fit, step_bytes, with_room
from penstock.errors import EnvironmentFault, ModelError, ResourceError, UsageError
from penstock.hub.checkpoint import read_checkpoint
from penstock.hub.config import read_config
from penstock.hub.gguf.link import linked_files
from penstock.models.config import WeightMap
from penstock.models.fallback.agreement import tolerance
from penstock.models.fallback.config import Found, TransformersConfig, find, measured
from penstock.models.fallback.load import Room, load, make, place_of, require_accelerate
from penstock.models.fallback.own import OwnMemory
from penstock.models.fallback.paged import PagedTransformer, page
from penstock.models.fallback.trace import CannotReplace
from penstock.models.families import read_eos_ids
from penstock.models.reader import refuse_quantized
from penstock.models.tensors import CPU
from penstock.plan.memory import human
from penstock.plan.work import StepCost

_HOST_SHARE = 0.8  # of the free main memory, for weights that a GPU has no room for
_PROMISED = 2048  # tokens of a text that there is to be room for beside the weights, where none are asked for
_STEP_TOKENS = 512  # default budget of a step: every one of its tokens may be scored
_LONG = 8192  # the same where each text has a memory of its own and its prompt is computed in one go
_ROWS = 8  # sequences at a time where each has a memory of its own
_TOGETHER = {
    "any": "in static batches",
    "equal": "in static batches of texts of equal length",
    "none": "one sequence at a time",
    "never": "one sequence to its end before the next",
}


def load_transformers(
    config: EngineConfig,
    clock: Clock,
    why: str,
    refusal: ResourceError | None = None,
    device: torch.device = CPU,
) -> LoadedModel:
    """Load a model that our decoder does not take: `why`, in a few words. refusal: what is raised where it cannot be
    placed either. device: where it will compute."""
    _check_options(config)
    read_given(config, None, WeightMap())
    folder = Path(config.model_path)
    raw = read_config(folder)
    refuse_quantized(raw)
    if linked_files(folder) is not None:
        raise refusal or ModelError("GGUF files are for the families that Penstock describes", f"This model has {why}.")
    found = find(folder, raw, config.trust_remote_code)
    config, available = with_room(config, device)
    dtype, type_reason, room = _choose(config, found, available, device)
    if room is not None and refusal is not None:
        try:
            require_accelerate()
        except EnvironmentFault:
            refusal.hint = f"{refusal.hint}; or pip install accelerate, and the rest stays on disk"
            raise refusal from None
    if config.dummy_weights:
        model, places = make(found, dtype, device)
    else:
        model, places = load(found, dtype, room, config.offload_folder, device)
    in_memory = places.get(place_of(device), 0)
    kind = "random weights (--dummy-weights), " if config.dummy_weights else ""
    clock.done("load", f"{kind}{_where(places)}, {torch.get_num_threads()} threads")

    code = "" if not found.own_code else f", its own code {'without' if found.offline else 'NOT kept from the'} network"
    in_words = f"by transformers ({why}){code}; in {str(dtype).removeprefix('torch.')}: {type_reason} (--dtype)"
    shape = replace(measured(found, model), eos_ids=read_eos_ids(folder, raw))
    runner: PagedTransformer | OwnMemory
    try:
        runner = page(found, model, dtype, device)
        runner.config = replace(shape, kv_elements=runner.kv_elements, kv_vectors=runner.kv_vectors)
        kept = kv_dtype(config, dtype)
        clock.done("model", f"{found.name} {in_words}; our paged cache")
        limits, kv_text = _fit_paged(config, runner.config, dtype, in_memory, available)
        kv_text += kv_in_words(config, device)
    except CannotReplace as error:
        refuse(config, f"this model keeps a memory of its own for each text ({error})")
        runner = OwnMemory(model, device)
        runner.config = shape
        kept = dtype
        text_bytes = runner.try_batches(shape.vocab_size, tolerance(dtype))
        clock.done("model", f"{found.name} {in_words}; {_TOGETHER[runner.together]}: {error}")
        longest = config.max_total_tokens or min(shape.max_positions, _PROMISED if room is not None else _LONG)
        rows = 1 if runner.together == "never" else config.max_batch_size or _ROWS
        limits, kv_text = _fit_own(config, longest, rows, shape, text_bytes, dtype, in_memory, available)
    clock.done("KV memory", f"weights {human(in_memory)} + {kv_text}")
    limits = msgspec.structs.replace(limits, hidden_states=shape.hidden_states)
    cost = StepCost.of(runner.config, dtype.itemsize, kv_bytes(runner.config, kept) / max(1, runner.config.kv_elements))
    cache = runner.new_cache(limits.num_blocks, limits.block_size, kept)
    return LoadedModel(runner, cache, limits, cost, Adapters(config, None, WeightMap(), dtype, 0))


def _check_options(config: EngineConfig) -> None:
    """Raises UsageError for what only our own decoder can do."""
    if config.quantize not in ("none", "bf16", "auto"):
        raise UsageError(
            f"--quantize {config.quantize} is for the families that Penstock describes; this model runs through "
            "transformers.",
            "",
            "Leave --quantize out, or take --dtype bfloat16.",
        )
    if config.rope_scaling is not None:
        raise UsageError("--rope-scaling is for the families that Penstock describes.", "", "Leave it out.")


def _choose(
    config: EngineConfig, found: Found, available: int, device: torch.device
) -> tuple[torch.dtype, str, Room | None]:
    """The type to compute in, why, and the bytes that weights may take; None where there is room for all."""
    asked = "bfloat16" if config.quantize == "bf16" else config.dtype
    if device.type == "cpu":
        dtype, reason = choose_dtype(asked, found.dtype, packed=False, quantized=False)
    else:
        dtype, reason = cuda.choose_dtype(asked, found.dtype)
    entries = {} if config.dummy_weights else read_checkpoint(found.folder)
    numbers = sum(prod(entry.shape) for entry in entries.values())

    def room(dtype: torch.dtype) -> int:
        shape = found.shape
        total = min(shape.max_positions, config.max_total_tokens or _PROMISED)
        budget = max(total, config.max_batch_prefill_tokens or _STEP_TOKENS)  # a prompt may have to be one run
        step = step_bytes(shape, dtype, budget, config.max_batch_size or 1, total)
        kv = max(total, config.max_batch_total_tokens or 0) * kv_bytes(shape, kv_dtype(config, dtype))
        return max(0, int(available * config.memory_fraction) - step - kv)

    if asked == "auto" and found.dtype in DTYPES and numbers * dtype.itemsize > room(dtype):
        dtype, reason = DTYPES[found.dtype], "as the checkpoint is, for want of memory"
    if numbers * dtype.itemsize <= room(dtype):
        return dtype, reason, None
    if device.type == "cpu":
        return dtype, reason, {"cpu": room(dtype)}
    return dtype, reason, {device.index or 0: room(dtype), "cpu": int(available_bytes() * _HOST_SHARE)}


def _where(places: dict[str, int]) -> str:
    """What lies where, in words."""
    names = {"cpu": "in memory", "disk": "on disk, read whenever needed"}
    return " + ".join(f"{human(size)} {names.get(place, f'on {place}')}" for place, size in places.items())


def _fit_paged(
    config: EngineConfig, shape: TransformersConfig, dtype: torch.dtype, in_memory: int, available: int
) -> tuple[Limits, str]:
    """The limits of a model over our paged cache, and the sum of its cache in words."""
    config = msgspec.structs.replace(config, max_batch_prefill_tokens=config.max_batch_prefill_tokens or _STEP_TOKENS)
    limits, plan = fit(config, shape, dtype, in_memory, dtype.itemsize, available)
    tokens, each = plan.num_blocks * plan.block_size, kv_bytes(shape, kv_dtype(config, dtype))
    return limits, (
        f"KV {tokens} tokens x {human(each)} = {human(plan.kv_bytes)} ({plan.reason}; --max-batch-total-tokens)"
    )


def _fit_own(
    config: EngineConfig,
    longest: int,
    rows: int,
    shape: TransformersConfig,
    text_bytes: tuple[int, int],
    dtype: torch.dtype,
    in_memory: int,
    available: int,
) -> tuple[Limits, str]:
    """The limits of a model that keeps a memory of its own for each text, of up to `longest` tokens, and its sum in
    words. text_bytes: what it keeps of any text, and of each token.

    A sequence's one block is as long as the longest text; there are as many as fit, however many may wait.
    """
    fixed, token = text_bytes
    shape = replace(shape, kv_elements=max(1, token // dtype.itemsize))
    asked = msgspec.structs.replace(
        config, max_total_tokens=longest, max_batch_size=rows, block_size=16, max_batch_prefill_tokens=longest
    )
    limits, plan = fit(asked, shape, dtype, in_memory + rows * fixed, dtype.itemsize, available)
    total = limits.max_total_tokens
    rows = max(1, min(rows, plan.num_blocks * plan.block_size // total))
    limits = msgspec.structs.replace(
        limits,
        block_size=total,
        num_blocks=rows,
        max_batch_size=rows,
    )
    each = fixed + token * total
    return limits, (
        f"memory of {rows} x {total} tokens, {human(each)} each = {human(rows * each)} "
        "(--max-batch-size, --max-total-tokens)"
    )
