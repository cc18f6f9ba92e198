"""TGI's launcher on `penstock serve`: its flags, their environment names, those without meaning, those refused."""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn

import click
from click.core import ParameterSource

from penstock.cli.options import stack
from penstock.errors import UsageError
from penstock.logs import JSON_VARIABLE

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
            "disable_grammar_support", "graceful_termination_timeout", "api_key", "huggingface_hub_cache",
            "master_addr", "master_port", "prometheus_port", "otlp_service_name", "usage_stats", "ngrok_authtoken",
            "ngrok_edge",
        )
    },
}  # fmt: skip

# Flags that would change the answers, and cannot yet: the reason, and what to do.
_REFUSED = {
    "ngrok": ("TGI's own is dead, and a tunnel through a company is not safe", "Use ssh -N -L"),
}
_WITHOUT_EFFECT = {
    "speculate": "there is no speculation yet; the answers are the same without",
    "num_shard": "one process runs the model, on all of its memory",
    "sharded": "one process runs the model, on all of its memory",
    "waiting_served_ratio": "prefill and decoding share every step",
    "max_waiting_tokens": "prefill and decoding share every step",
    "prometheus_port": "GET /metrics is on the server's own port",
    "shard_uds_path": "the engine is reached over an anonymous socket pair",
    "master_addr": "one process runs the model",
    "master_port": "one process runs the model",
    "disable_custom_kernels": "there are none to disable",
    "usage_stats": "Penstock sends nothing to anybody",
    "env": "`penstock doctor` tells about the machine",
    "ngrok_authtoken": "there is no ngrok",
    "ngrok_edge": "there is no ngrok",
}


def _hidden(flag: str, **settings: Any) -> Any:
    return click.option(flag, hidden=True, **settings)


_FLAGS = ("ngrok", "disable_custom_kernels")
_TYPES: dict[str, Any] = {
    "usage_stats": click.Choice(["on", "off", "no-stack"]),
    "num_shard": click.IntRange(1),
    "sharded": bool,
    "speculate": click.IntRange(0),
    "waiting_served_ratio": float,
    "max_waiting_tokens": click.IntRange(0),
    "prometheus_port": click.IntRange(0, 65535),
    "master_port": click.IntRange(0),
}


def _option(name: str) -> Any:
    flag = f"--{name.replace('_', '-')}"
    if name in _FLAGS:
        return _hidden(flag, is_flag=True)
    return _hidden(flag, type=_TYPES.get(name, str))


operation_options = stack(
    click.option("--json-output", is_flag=True, help="Write the log as JSON, one object a line."),
    click.option("--otlp-endpoint", metavar="URL", help="Send traces there (OTLP over HTTP, port 4318)."),
    click.option(
        "--otlp-service-name",
        default="text-generation-inference.router",
        show_default=True,
        help="Name of this server in traces.",
    ),
    click.option("--disable-grammar-support", is_flag=True, help="Refuse `grammar` and `response_format`."),
    click.option(
        "--tokenizer-config-path", metavar="FILE", help="Take the chat template of this tokenizer_config.json."
    ),
)

tgi_options = stack(
    click.option("--model-id", metavar="MODEL", help="Another way to give MODEL."),
    _hidden("--api-key", metavar="KEY"),
    _hidden("--huggingface-hub-cache"),
    _hidden("--weights-cache-override"),
    _hidden("--launcher", is_flag=True),
    click.option("-e", "--env", is_flag=True, hidden=True),
    click.option("-g", "--graceful-termination-timeout", type=click.IntRange(0), hidden=True),
    *(_option(name) for name in (*_REFUSED, *_WITHOUT_EFFECT) if name != "env"),
)


def refuse(options: dict[str, Any]) -> None:
    """Raises UsageError for a flag that cannot do what it says; tells of those that do nothing."""
    for name, (why, hint) in _REFUSED.items():
        if options[name]:
            raise UsageError(f"--{name.replace('_', '-')} is not supported: {why}.", "", f"{hint}.")
    if options["huggingface_hub_cache"]:
        os.environ["HF_HUB_CACHE"] = options["huggingface_hub_cache"]  # what the hub's own library reads
    if options["graceful_termination_timeout"] is not None:
        options["drain_seconds"] = float(options["graceful_termination_timeout"])
    if options["json_output"]:
        os.environ[JSON_VARIABLE] = "1"
    context = click.get_current_context()
    for name, why in _WITHOUT_EFFECT.items():
        # The environment may hold the names of other programs: only what was typed is spoken of.
        typed = context.get_parameter_source(name) is not ParameterSource.ENVIRONMENT
        harmless = name in ("num_shard", "sharded", "speculate") and int(options[name] or 0) == (name == "num_shard")
        if options[name] is not None and options[name] is not False and typed and not harmless:
            print(f"note: --{name.replace('_', '-')} has no effect: {why}", file=sys.stderr)


class _Launcher(click.Context):
    """Of `penstock serve` where it is called by the name that its help and its errors then show."""

    command_path = "text-generation-launcher"


def main() -> NoReturn:
    """`text-generation-launcher`: TGI's command, which is `penstock serve` with TGI's log lines."""
    from penstock.cli.main import penstock, run_command
    from penstock.cli.serve import serve

    serve.context_class = _Launcher
    given = sys.argv[1:]
    version = given[:1] in (["--version"], ["-V"])
    run_command(penstock, ["--version"] if version else ["serve", "--launcher", *given], "text-generation-launcher")


if __name__ == "__main__":
    main()
