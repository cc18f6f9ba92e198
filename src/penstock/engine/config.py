"""What the engine is told at its start; everything else it derives and says."""

from __future__ import annotations

import msgspec

DECODE_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


class EngineConfig(msgspec.Struct, frozen=True, omit_defaults=True):
    """Options of one engine. None means: derive it from the model, the memory and the processor.

    model_path: a verified snapshot folder. dtype: auto, float32, bfloat16 or float16. Token counts are tokens, memory
    is bytes. max_batch_prefill_tokens is the budget of one step (the chunk size of prefill), max_batch_total_tokens
    the number of KV slots, max_batch_size the number of sequences that run together. trust_remote_code: Python code in
    the model's folder may run. offload_folder: where weights lie that fit no memory and must be written anew.

    device: auto, cpu, cuda or cuda:I. What begins with cuda_ is for GPUs alone. cuda_graphs: batch
    sizes whose steps of decoding are captured; empty for none.
    """

    model_path: str
    model_name: str = ""
    dtype: str = "auto"
    dummy_weights: bool = False  # random weights in the shape that config.json describes
    quantize: str = "none"  # the format of the matrices, by its name in formats
    max_input_tokens: int | None = None
    max_total_tokens: int | None = None
    max_batch_prefill_tokens: int | None = None
    max_batch_total_tokens: int | None = None
    max_batch_size: int | None = None
    max_concurrent_requests: int = 128
    block_size: int = 16
    prefix_caching: bool = True
    memory_fraction: float = 0.9  # share of the free memory that weights and KV may take
    device: str = "auto"
    kv_cache_dtype: str | None = None  # int8 on processors, fp8_e4m3fn or fp8_e5m2 on GPUs; None is the working type
    kv_cache_gib: float | None = None  # memory of the KV cache
    cuda_memory_fraction: float = 0.9  # share of the whole card that this engine may take
    cuda_graphs: tuple[int, ...] = DECODE_SIZES
    threads: int | None = None
    packed_copy: str = "auto"  # where packed weights are kept for the next start: auto, off, or a folder
    rope_scaling: str | None = None  # linear or dynamic, overrides the checkpoint's
    rope_factor: float | None = None
    watermark_gamma: float = 0.5
    watermark_delta: float = 2.0
    trust_remote_code: bool = False
    offload_folder: str | None = None
    adapters: dict[str, str] = {}  # LoRA adapters by name: their folders
    max_adapters: int = 64
    max_adapter_rank: int = 256
    max_adapter_bytes: int | None = None  # of all of them in memory
