"""From a snapshot folder to an engine on a GPU: load the weights, measure the largest step, the rest is KV blocks."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import msgspec
import torch

from penstock.devices import cuda
from penstock.engine.adapters import Adapters, planned_bytes, read_given
from penstock.engine.ahead import AheadLoop
from penstock.engine.checkpoint import Checkpoint
from penstock.engine.chooser import count_bytes, counted_rows
from penstock.engine.config import EngineConfig
from penstock.engine.graphs import graph_count, usable_sizes
from penstock.engine.limits import Limits
from penstock.engine.load import Clock, LoadedModel
from penstock.engine.messages import Stage
from penstock.engine.output import EngineStats
from penstock.engine.request import EngineRequest, Sampling
from penstock.errors import ModelError, ResourceError
from penstock.models.decoder import Decoder
from penstock.plan.memory import GIB, CardMemory, human, plan_card

_STEP_TOKENS = 4096  # default budget of a step: the matrix units are busy from far fewer on
_GRAPH_BYTES = 2**24  # what the driver keeps for each captured step


def load_on_gpu(config: EngineConfig, device: torch.device, on_stage: Callable[[Stage], None]) -> AheadLoop:
    """Everything between the command and the first request, each stage reported when it is done.

    The weights are weighed against the free memory before they are read; the KV cache gets what is free once they are
    there and the largest step has been measured. A step of that size runs once more at the end, so that whatever the
    server will ever need is in its hands when it is ready. Raises PenstockError of the fitting kind.
    """
    clock = Clock(on_stage)
    name = cuda.describe(device)
    free, total = cuda.free_and_total(device)
    clock.done("device", f"{name}, {human(free)} free")
    cuda.require_formats(config.quantize, config.kv_cache_dtype, device)
    checkpoint = Checkpoint.read(config, device, clock)
    rows, budget = checkpoint.batch(config, _STEP_TOKENS)
    given = read_given(config, checkpoint.decoder, checkpoint.names)
    adapter_bytes = planned_bytes(config, given, checkpoint.dtype)
    usable = min(free, int(total * config.cuda_memory_fraction))
    if checkpoint.weight_bytes + adapter_bytes > usable:
        raise ResourceError(
            f"the weights take {human(checkpoint.weight_bytes)}, and {human(usable)} of the GPU may be used",
            f"of {human(total)} {human(free)} are free; this server may take {config.cuda_memory_fraction:.0%} "
            "(--cuda-memory-fraction)",
            "try --quantize fp8 or int4, another card, or end what else runs on it",
        )
    decoder = checkpoint.load(config.max_total_tokens or checkpoint.decoder.max_positions, device)
    kind = "random weights (--dummy-weights)" if checkpoint.entries is None else "weights"
    clock.done("load", f"{human(checkpoint.weight_bytes)} of {kind}")

    adapters = Adapters(config, checkpoint.decoder, checkpoint.names, checkpoint.dtype, adapter_bytes, device)
    for adapter, file in given.items():
        adapters.add(adapter, file)
    if given:
        clock.done("adapters", f"{', '.join(given)}: {human(adapters.nbytes)} of {human(adapter_bytes)}")
    kv_dtype = checkpoint.dtype if config.kv_cache_dtype is None else cuda.KV_DTYPES[config.kv_cache_dtype]
    step, decoding = _measure(config, checkpoint, decoder, kv_dtype, rows, budget, adapters)
    if adapter_bytes:  # the two halves of a gated MLP apart, and what is added to them
        step += 3 * budget * checkpoint.decoder.mlp_width * checkpoint.dtype.itemsize
    clock.done("dry step", f"{budget} tokens of {rows} sequences take {human(step)}")
    now, total = cuda.free_and_total(device)
    sizes, vocab = usable_sizes(config.cuda_graphs, rows), checkpoint.decoder.vocab_size
    graphs = 0
    if sizes:  # what they keep, what one of them takes while it runs, and the same for the step that goes before it
        scores = (1 + bool(adapter_bytes)) * sum(sizes) * vocab * checkpoint.dtype.itemsize
        graphs = 2 * decoding + scores + graph_count(sizes, bool(adapter_bytes)) * _GRAPH_BYTES
    later = adapter_bytes - adapters.nbytes + counted_rows(rows, vocab) * count_bytes(vocab)
    card = CardMemory(total, now, max(0, free - now), step, graphs + later)
    kv_token = checkpoint.decoder.kv_elements * kv_dtype.itemsize
    plan = plan_card(
        card,
        config.cuda_memory_fraction,
        kv_token,
        config.block_size,
        None if config.kv_cache_gib is None else int(config.kv_cache_gib * GIB),
        config.max_batch_total_tokens,
    )
    tokens = plan.num_blocks * plan.block_size
    limits = checkpoint.limits(config, rows, budget, tokens, device)
    loop = _loop(config, checkpoint, decoder, limits, kv_dtype, adapters)
    clock.done(
        "KV memory",
        f"weights and torch {human(card.held)} + step {human(card.step)} + graphs {human(card.graphs)} "
        f"+ KV {tokens} tokens x {human(kv_token)} = {human(plan.kv_bytes)} ({plan.reason})",
    )
    since = time.perf_counter()
    run_largest(loop)
    on_stage(Stage("warm", f"a step of {budget} tokens, and {rows} sequences at once", time.perf_counter() - since))
    return loop


def _loop(
    config: EngineConfig,
    checkpoint: Checkpoint,
    decoder: Decoder,
    limits: Limits,
    kv_dtype: torch.dtype,
    adapters: Adapters,
) -> AheadLoop:
    cache = decoder.new_cache(limits.num_blocks, limits.block_size, kv_dtype)
    return AheadLoop(LoadedModel(decoder, cache, limits, checkpoint.cost(kv_dtype), adapters), config)


def _measure(
    config: EngineConfig,
    checkpoint: Checkpoint,
    decoder: Decoder,
    kv_dtype: torch.dtype,
    rows: int,
    budget: int,
    adapters: Adapters,
) -> tuple[int, int]:
    """The most that the largest step takes beside weights and cache, and the most that one of decoding does. Bytes.

    The steps are those of the real loop, with a cache that holds no more than them.
    """
    tokens = budget + 2 * (rows + 1) * config.block_size
    small = msgspec.structs.replace(
        config, cuda_graphs=(), prefix_caching=False, max_total_tokens=None, max_input_tokens=None
    )
    loop = _loop(
        small, checkpoint, decoder, checkpoint.limits(small, rows, budget, tokens, decoder.device), kv_dtype, adapters
    )
    largest = cuda.peak_bytes(partial(run_largest, loop))
    decoding = cuda.peak_bytes(partial(run_largest, loop, prompt=1))
    del loop
    cuda.give_back()
    return largest, decoding


def run_largest(loop: AheadLoop, prompt: int | None = None) -> None:
    """A step of the whole budget, shared by as many sequences as may run, then some of decoding with draws, penalties
    and log-probabilities. prompt: tokens of each instead. Raises ModelError when the model does not compute."""
    limits = loop.limits
    share = max(1, limits.max_batch_prefill_tokens // limits.max_batch_size)
    length = prompt or max(1, min(share, limits.max_total_tokens - 4))
    new = min(3, limits.max_total_tokens - length)
    for i in range(limits.max_batch_size):
        sampling = Sampling(temperature=0.9, top_p=0.9, repetition_penalty=1.1) if i else Sampling()
        loop.add(EngineRequest(-1 - i, [0] * length, new, sampling, ignore_eos=True, logprobs=True, salt=b"dry"))
    while loop.has_work:
        for output in loop.step().outputs:
            if output.error is not None:
                raise ModelError("the model does not compute", output.error, "download the model again")
    loop.stats = EngineStats(total_blocks=limits.num_blocks)
