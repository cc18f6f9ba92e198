"""`penstock serve`: a model over HTTP. Takes TGI's launcher flags and their environment names too."""

from __future__ import annotations

import ipaddress
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from penstock.cli.options import (
    COUNT,
    FiniteFloat,
    PortRange,
    Whole,
    adapter_options,
    cpus_option,
    engine_options,
    source_options,
    stack,
    weight_format,
)
from penstock.cli.report import report_option
from penstock.cli.serve_key import hide_key
from penstock.cli.serve_tgi import TGI_ENVIRONMENT, operation_options, refuse, tgi_options
from penstock.errors import PenstockError, UsageError

PORT = click.IntRange(0, 65535)

http_options = stack(
    click.option("--hostname", "--host", "host", default="127.0.0.1", show_default=True, help="Address to listen on."),
    click.option("-p", "--port", type=PORT, default=3000, show_default=True, help="0 takes a free one."),
    click.option(
        "--fallback-ports",
        type=PortRange(),
        metavar="LOW-HIGH",
        help="Try these where --port is taken; 0-0: any free one.",
    ),
    click.option("--uds", metavar="PATH", help="Listen on a unix socket instead of a port."),
    click.option("--api-key-file", metavar="FILE", help="Keys, one a line (mode 600).  [default: a key is made]"),
    click.option("--no-auth", is_flag=True, help="Ask for no key. Every user of the machine can then connect."),
    click.option("--allow-host", multiple=True, metavar="NAME", help="A further name for this server. Repeatable."),
    click.option(
        "--cors-allow-origin", multiple=True, metavar="ORIGIN", help="Let web pages of ORIGIN ask. Repeatable."
    ),
    click.option("--served-model-name", metavar="NAME", help="What clients see as the model.  [default: MODEL]"),
    click.option(
        "--batch-dir",
        metavar="DIR",
        help="Where uploaded files and batches are kept; `off`: nowhere.  [default: ~/.cache/penstock/batches]",
    ),
    click.option(
        "--batch-quota",
        type=Whole(1, 2**63 - 1),
        default=2**30,
        show_default=True,
        help="Bytes that one key may keep there.",
    ),
    click.option("--ask", metavar="TEXT", help="Ask this once the server is ready, and show the answer."),
    click.option("--json", "json_ready", is_flag=True, help="Print one JSON line on stdout when ready."),
    click.option(
        "--drain-seconds",
        type=FiniteFloat(0, 86400),
        default=25.0,
        show_default=True,
        help="On SIGTERM, how long running requests may take to finish.",
    ),
)

limit_options = stack(
    click.option("--max-concurrent-requests", type=COUNT, default=128, show_default=True, help="More get status 429."),
    click.option("--max-input-tokens", type=COUNT, help="Longest prompt.  [default: one less than the total]"),
    click.option("--max-input-length", type=COUNT, help="Old name of --max-input-tokens."),
    click.option("--max-best-of", type=COUNT, default=2, show_default=True, help="Largest `best_of`."),
    click.option(
        "--max-stop-sequences", type=click.IntRange(0), default=4, show_default=True, help="Stop strings a request."
    ),
    click.option(
        "--max-top-n-tokens", type=click.IntRange(0, 128), default=5, show_default=True, help="Alternatives a token."
    ),
    click.option("--max-client-batch-size", type=COUNT, default=4, show_default=True, help="Prompts a request."),
    click.option("--payload-limit", type=COUNT, default=2_000_000, show_default=True, help="Bytes of a request."),
    click.option("--max-images", type=COUNT, default=8, show_default=True, help="Images of a request."),
    click.option("--max-image-bytes", type=COUNT, default=2**24, show_default=True, help="Of one image, as a file."),
    click.option("--max-image-pixels", type=COUNT, default=2**25, show_default=True, help="Of one image."),
    click.option(
        "--allow-image-hosts",
        metavar="HOST,...",
        help="Fetch images from these hosts, by https.  [default: none; data URLs only]",
    ),
    click.option("--validation-workers", type=COUNT, default=2, show_default=True, help="Tokenizing threads."),
    click.option("--strict", is_flag=True, help="Refuse unknown fields on OpenAI routes; else a header names them."),
    click.option("--enable-prefill-logprobs", is_flag=True, help="Allow `decoder_input_details`."),
    click.option(
        "--prefix-caching/--no-prefix-caching", default=True, show_default=True, help="Reuse prompts seen before."
    ),
)

patience_options = stack(
    click.option(
        "--header-seconds",
        type=FiniteFloat(0.1, 3600),
        default=10.0,
        show_default=True,
        help="Until headers are whole.",
    ),
    click.option(
        "--body-seconds", type=FiniteFloat(0.1, 3600), default=30.0, show_default=True, help="Longest pause in a body."
    ),
    click.option(
        "--unread-seconds",
        type=FiniteFloat(0.1, 86400),
        default=60.0,
        show_default=True,
        help="How long a client may leave its stream unread.",
    ),
)

model_options = stack(
    click.option(
        "--lora-adapters",
        metavar="NAME=SOURCE,...",
        help="LoRA adapters to serve, by name; SOURCE is a folder or ORG/NAME[@REVISION].",
    ),
    adapter_options,
    click.option(
        "--chat-template", metavar="FILE", help="A jinja chat template, or a tokenizer_config.json, over the model's."
    ),
    click.option(
        "--rope-scaling", type=click.Choice(["linear", "dynamic"]), help="Stretch the context beyond the model's."
    ),
    click.option("--rope-factor", type=FiniteFloat(1, 1e4), help="How far to stretch it."),
    click.option("--watermark-gamma", type=FiniteFloat(0, 1), default=0.5, show_default=True, help="Of watermarks."),
    click.option("--watermark-delta", type=FiniteFloat(-100, 100), default=2.0, show_default=True, help="Their bias."),
)


@click.command(short_help="Serve a model over HTTP, compatible with TGI and OpenAI clients.")
@click.argument("model", required=False)
@http_options
@limit_options
@report_option
@cpus_option
@engine_options
@model_options
@source_options
@patience_options
@operation_options
@tgi_options
def serve(model: str | None, **options: Any) -> int:
    """Serve MODEL: `demo`, a folder, or a hub name.

    Prints what to paste into a shell, a program or a laptop once it is ready. Ctrl-C stops it.
    """
    hide_key(options)
    refuse(options)
    name = _model(model, options["model_id"])
    if options["launcher"] and options["revision"] and Path(name).expanduser().is_dir():
        print("note: --revision has no effect: the model is a folder", file=sys.stderr)
        options["revision"] = None
    _check(options)
    from penstock.engine.config import EngineConfig
    from penstock.hub.adapters import parse_adapters
    from penstock.server.config import ServeConfig
    from penstock.server.launch import serve as run

    engine = {field: options[field] for field in EngineConfig.__struct_fields__ if options.get(field) is not None}
    http = {field: options[field] for field in ServeConfig.__struct_fields__ if options.get(field) is not None}
    engine |= {
        "quantize": weight_format(options["quantize"]),
        "model_path": "",
        "model_name": options["served_model_name"] or name,
        "adapters": parse_adapters(options["lora_adapters"] or ""),
    }
    http["batch_dir"] = _batch_dir(options["batch_dir"])
    http["allow_image_hosts"] = tuple(
        host.strip().lower() for host in (options["allow_image_hosts"] or "").split(",") if host.strip()
    )
    config = ServeConfig(
        **http,
        model=options["weights_cache_override"] or name,
        engine=EngineConfig(**engine),
        auth=not options["no_auth"],
        allow_hosts=tuple(options["allow_host"]),
    )
    visitor = _asker(options["ask"], config.name) if options["ask"] else None
    return run(config, offline=True if options["offline"] else None, first_visitor=visitor)


def _batch_dir(given: str | None) -> str | None:
    """The folder of files and batches; None turns them off."""
    if given == "off":
        return None
    if given is not None:
        return str(Path(given).expanduser().absolute())
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return str(Path(cache).expanduser() / "penstock" / "batches")


def _asker(question: str, model: str) -> Callable[[str, Path | None, Path | None], None]:
    """A client that asks one question over HTTP and streams the answer to stdout."""

    def ask(url: str, uds: Path | None, key_file: Path | None) -> None:
        from penstock.cli.chat_remote import RemoteChat, Server
        from penstock.cli.conversation import Finish

        print(f"\n> {question}", file=sys.stderr, flush=True)
        try:
            server = Server(url, None if uds is None else str(uds), None if key_file is None else str(key_file))
            chat = RemoteChat(server, model, {"temperature": 0, "max_new_tokens": 200})
            for piece in chat.reply([{"role": "user", "content": question}], Finish()):
                print(piece, end="", flush=True)
            print(flush=True)
        except PenstockError as error:  # the server serves on
            print(f"The question was not answered: {error}", file=sys.stderr, flush=True)

    return ask


def _model(argument: str | None, model_id: str | None) -> str:
    if argument and model_id and argument != model_id and not _from_environment("model_id"):
        raise UsageError(f"Two models: {argument!r} and --model-id {model_id!r}.", "", "Give one.")
    name = argument or model_id
    if not name:
        raise UsageError("There is no model to serve.", "", "For example: penstock serve demo")
    return name


def _check(options: dict[str, Any]) -> None:
    """What only holds between options; also the old name of one."""
    if options["max_input_length"] is not None:
        if options["max_input_tokens"] is not None:
            raise UsageError(
                f"Both `max_input_tokens` ({options['max_input_tokens']}) and `max_input_length` "
                f"({options['max_input_length']}) are set.",
                "`max_input_length` is the old name of `max_input_tokens`.",
                "Give --max-input-tokens only.",
            )
        options["max_input_tokens"] = options["max_input_length"]
    longest, total = options["max_input_tokens"], options["max_total_tokens"]
    if longest is not None and total is not None and longest >= total:
        raise UsageError(f"`max_input_tokens`({longest}) must be < `max_total_tokens`({total})")
    slots = options["max_batch_total_tokens"]
    if total is not None and slots is not None and total > slots:
        raise UsageError(f"`max_total_tokens` must be <= `max_batch_total_tokens`. Given: {total} and {slots}")
    if options["no_auth"] and options["api_key_file"] is not None:
        raise UsageError("--no-auth and --api-key-file contradict each other.", "", "Give one of them.")
    if options["chat_template"] is not None:
        from penstock.text.template_files import read_template_file

        read_template_file(Path(options["chat_template"]))  # now, rather than after the model is found
    if options["rope_factor"] is not None and options["rope_scaling"] is None:
        options["rope_scaling"] = "linear"
    if options["rope_scaling"] is not None and options["rope_factor"] is None:
        options["rope_factor"] = 1.0
    if _from_environment("host") and not _is_address(options["host"]):
        # Shells and containers put the machine's name there; binding to it would open the server to the network.
        print("note: HOSTNAME is not an address, so it is ignored; --hostname sets where to listen", file=sys.stderr)
        options["host"] = "127.0.0.1"


def _from_environment(parameter: str) -> bool:
    context = click.get_current_context()
    return context.get_parameter_source(parameter) is click.core.ParameterSource.ENVIRONMENT


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    return True


for _option in serve.params:
    if isinstance(_option, click.Option) and _option.name in TGI_ENVIRONMENT:
        _option.envvar = TGI_ENVIRONMENT[_option.name]
