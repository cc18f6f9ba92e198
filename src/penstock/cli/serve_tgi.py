"""TGI's launcher flags on `penstock serve`: their environment names, those without meaning, those refused."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from penstock.cli.options import stack
from penstock.errors import UsageError

# option: the name that TGI's launcher reads
TGI_ENVIRONMENT = {
    "host": "HOSTNAME",
    **{
        name: name.upper()
        for name in (
            "port", "model_id", "revision", "dtype", "max_concurrent_requests", "max_best_of", "max_stop_sequences",
            "max_top_n_tokens", "max_input_tokens", "max_input_length", "max_total_tokens", "max_batch_prefill_tokens",
            "max_batch_total_tokens", "max_batch_size", "max_client_batch_size", "payload_limit", "validation_workers",
            "enable_prefill_logprobs", "rope_scaling", "rope_factor", "watermark_gamma", "watermark_delta",
            "cors_allow_origin", "prefix_caching", "quantize", "num_shard", "sharded", "speculate",
            "kv_cache_dtype", "trust_remote_code", "lora_adapters", "tokenizer_config_path", "ngrok", "otlp_endpoint",
            "json_output", "waiting_served_ratio", "max_waiting_tokens", "shard_uds_path",
            "weights_cache_override", "disable_custom_kernels", "cuda_memory_fraction", "cuda_graphs",
            "disable_grammar_support", "graceful_termination_timeout",
        )
    },
}  # fmt: skip

# Flags that would change what the server does, and cannot yet: the reason, and what to do.
_REFUSED = {
    "api_key": (
        "every user of this machine can read the arguments of a process, with ps",
        "Write the key to a file of mode 600 and give --api-key-file FILE",
    ),
    "quantize": ("quantized weights come in a later version", "Leave it out; --dtype bfloat16 halves float32"),
    "speculate": ("speculation comes in a later version", "Leave it out"),
    "kv_cache_dtype": ("the KV cache has the dtype of the weights", "Leave it out"),
    "lora_adapters": ("adapters come in a later version", "Merge the adapter into its base model"),
    "tokenizer_config_path": ("the model folder's tokenizer_config.json is read", "Put the file there"),
    "otlp_endpoint": ("traces come in a later version", "Leave it out; GET /metrics has the figures"),
    "json_output": ("logs in JSON come in a later version", "Leave it out; --json prints the ready line"),
    "ngrok": ("TGI's own is dead, and a tunnel through a company is not safe", "Use ssh -N -L"),
    "trust_remote_code": (
        "Penstock never runs code from a model's repository",
        "Leave it out: Llama, Mistral and Qwen need none",
    ),
    "weights_cache_override": ("a model folder can be named directly", "Give the folder as MODEL"),
}
_WITHOUT_EFFECT = {
    "waiting_served_ratio": "prefill and decoding share every step",
    "max_waiting_tokens": "prefill and decoding share every step",
    "prometheus_port": "GET /metrics is on the server's own port",
    "shard_uds_path": "the engine is reached over an anonymous socket pair",
    "master_addr": "one process runs the model",
    "master_port": "one process runs the model",
    "disable_custom_kernels": "there are none to disable",
    "cuda_memory_fraction": "this version computes on the CPU; --memory-fraction is for any memory",
    "cuda_graphs": "this version computes on the CPU",
    "disable_grammar_support": "there are no grammars yet",
    "otlp_service_name": "there are no traces yet",
    "usage_stats": "Penstock sends nothing to anybody",
    "env": "`penstock doctor` tells about the machine",
}


def _hidden(flag: str, **settings: Any) -> Any:
    return click.option(flag, hidden=True, **settings)


_FLAGS = ("ngrok", "trust_remote_code", "json_output", "disable_custom_kernels", "disable_grammar_support")

tgi_options = stack(
    click.option("--model-id", metavar="MODEL", help="Another way to give MODEL."),
    _hidden("--huggingface-hub-cache"),
    _hidden("--num-shard", type=click.IntRange(1)),
    _hidden("--sharded", type=bool),
    click.option("-e", "--env", is_flag=True, hidden=True),
    click.option("-g", "--graceful-termination-timeout", type=click.IntRange(0), hidden=True),
    *(_hidden(f"--{name.replace('_', '-')}", is_flag=name in _FLAGS) for name in _REFUSED),
    *(_hidden(f"--{name.replace('_', '-')}", is_flag=name in _FLAGS) for name in _WITHOUT_EFFECT if name != "env"),
)


def refuse(options: dict[str, Any]) -> None:
    """Raises UsageError for a flag that cannot do what it says; tells of those that do nothing."""
    for name, (why, hint) in _REFUSED.items():
        if options[name]:
            raise UsageError(f"--{name.replace('_', '-')} is not supported: {why}.", "", f"{hint}.")
    if os.environ.get("API_KEY"):
        print("note: API_KEY in the environment is not read; give --api-key-file FILE", file=sys.stderr)
    shards = options["num_shard"] or 1
    if shards > 1 or (options["sharded"] and options["num_shard"] is None):
        raise UsageError(
            "--num-shard above 1 is not supported: a model over several devices comes in a later version.",
            "",
            "Leave --num-shard and --sharded out.",
        )
    if options["huggingface_hub_cache"]:
        os.environ["HF_HUB_CACHE"] = options["huggingface_hub_cache"]  # what the hub's own library reads
    if options["graceful_termination_timeout"] is not None:
        options["drain_seconds"] = float(options["graceful_termination_timeout"])
    for name, why in _WITHOUT_EFFECT.items():
        if options[name]:
            print(f"note: --{name.replace('_', '-')} has no effect: {why}", file=sys.stderr)
