"""`penstock bench load`: a server under load, over HTTP."""

from __future__ import annotations

import asyncio
import csv
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from penstock.cli.bench_load_options import prompt_options, report_options, shape_options, target_options
from penstock.cli.main import INTERRUPTED
from penstock.cli.options import engine_options, source_options
from penstock.errors import EnvironmentFault, PartialResults, PenstockError, UsageError

if TYPE_CHECKING:
    from penstock.bench.http import Address
    from penstock.bench.load import Level, Record
    from penstock.bench.session import LoadResult

LINE_SECONDS = 15.0


@click.command(short_help="A server under load, over HTTP.")
@click.argument("model", required=False)
@target_options
@shape_options
@prompt_options
@report_options
@source_options
@engine_options
def load(model: str | None, **options: Any) -> int:
    """Load a server and tell its latencies and throughput: one that runs (--url), or one of MODEL that is started for
    it.

    A closed loop (--concurrency) keeps so many requests in the air. An open loop (--rate) sends at that rate whether
    the server keeps up or not, and counts latencies from when a request was due. Tokens are counted as the server
    tells them, not by chunks. Status 429 counts as refused and is waited out. Ctrl-C prints what is there by then.
    """
    from penstock.bench.http import Address
    from penstock.bench.load import Plan, Slo
    from penstock.bench.session import LoadResult, run

    _check(model, options)
    levels = _levels(options)
    plan = Plan(
        new_tokens=options["output_tokens"],
        requests=options["requests"],
        seconds=options["duration"],
        cancel=options["cancel"],
        ignore_eos=not options["stop_at_eos"],
        timeout=options["timeout"],
        seed=options["seed"],
    )
    prompts, shown = _prompts(options)
    slo = Slo(options["slo_ttft"], options["slo_itl"], options["slo_e2e"])
    with ExitStack() as until:
        if model is not None:
            from penstock.bench.own_server import OwnServer

            server = until.enter_context(OwnServer(model, _server_options(options)))
            address = Address.parse(server.url, server.key)
            if options["api"] == "auto":
                options["api"] = "completions"  # there the end of sequence can be ignored
        else:
            address = _address(options)
        result = LoadResult(options["url"] or options["uds"] or str(model), "", "", shown, plan.new_tokens, slo)
        progress = _Progress()
        job = run(
            address,
            result,
            options["api"],
            options["model_name"],
            levels,
            options["sweep"],
            plan,
            prompts,
            lambda line: print(line, file=sys.stderr, flush=True),
            progress.count,
        )
        with progress:
            _runner(job)
    if address.is_local and not result.interrupted and not options["no_limits"] and _has_work(result):
        _measure(result, options)
    _show(result, options)
    return _end(result)


def _check(model: str | None, options: dict[str, Any]) -> None:
    """What only holds between options, before a server starts."""
    if sum(value is not None for value in (model, options["url"], options["uds"])) != 1:
        raise UsageError("Give one of MODEL, --url and --uds.", "", "For example: penstock bench load demo")
    if options["rate"] and (options["concurrency"] or options["sweep"]):
        raise UsageError("--rate is an open loop, --concurrency and --sweep are closed ones.", "", "Give one of them.")
    if options["prompt"] is not None and options["prompts"] is not None:
        raise UsageError("--prompt and --prompts contradict each other.", "", "Give one of them.")
    if options["report"] and model is None:
        raise UsageError("--report tells of a server that is started here.", "", "Give MODEL instead of --url.")
    if options["png_file"] is not None:
        from penstock.bench.plots import require_matplotlib

        require_matplotlib()


def _levels(options: dict[str, Any]) -> list[Level]:
    from penstock.bench.load import Level

    if options["rate"]:
        return [Level(rate=rate, poisson=options["arrivals"] == "poisson") for rate in options["rate"]]
    asked = list(options["concurrency"])
    if options["sweep"]:
        top = max(asked, default=64)
        asked = [*(2**i for i in range(top.bit_length()) if 2**i < top), top]
    return [Level(concurrency=n) for n in asked or [1]]


def _prompts(options: dict[str, Any]) -> tuple[Iterator[str] | tuple[int, int, int], str]:
    """The texts, or the shape of synthetic ones, and what people read of them."""
    from penstock.bench.prompts import cycle, read_file

    if options["prompt"] is not None:
        return cycle([options["prompt"]]), "one prompt"
    if options["prompts"] is not None:
        texts = read_file(options["prompts"])
        return cycle(texts), f"{len(texts)} prompts of {options['prompts']}"
    tokens, shared = options["prompt_tokens"], options["shared_prefix_tokens"]
    if shared > tokens:
        raise UsageError("--shared-prefix-tokens is more than --prompt-tokens.")
    return (tokens, shared, options["prefix_groups"]), ""


def _address(options: dict[str, Any]) -> Address:
    """Where the server is, and its key: the file's, or that of a server of this user on this machine."""
    from urllib.parse import quote

    from penstock.bench.http import Address
    from penstock.cli.server_key import key_of_port, key_of_socket, read_key

    url = options["url"] or f"http+unix://{quote(options['uds'], safe='')}"
    bare = Address.parse(url)
    if options["api_key_file"] is not None:
        key: str | None = read_key(Path(options["api_key_file"]))
    else:
        key = key_of_port(bare.host, bare.port) if bare.uds is None else key_of_socket(bare.uds)
    return Address.parse(url, key)


def _server_options(options: dict[str, Any]) -> list[str]:
    """The flags that `penstock serve` gets: those of the engine and of the source that were set."""
    flags: list[str] = []
    for option in _engine_flags():
        value, flag = options[str(option.name)], option.opts[-1]
        if value is True:
            flags.append(flag)
        elif value not in (None, False):
            flags += [flag, str(value)]
    streams = max([*options["concurrency"], 64 if options["sweep"] else 0, 128])
    flags += ["--report"] if options["report"] else []
    return [*flags, "--max-concurrent-requests", str(streams)]


def _engine_flags() -> list[click.Option]:
    """The options of engine_options and source_options."""

    @engine_options
    @source_options
    def nothing(**_: Any) -> None: ...

    return [p for p in nothing.__click_params__ if isinstance(p, click.Option)]  # type: ignore[attr-defined]


def _runner(job: Any) -> None:
    """Run the load on the fastest event loop there is."""
    try:
        import uvloop

        factory: Callable[[], asyncio.AbstractEventLoop] | None = uvloop.new_event_loop
    except ImportError:
        factory = None
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(job)


class _Progress:
    """Requests as they end: a line that is rewritten on a terminal, one every 15 seconds anywhere else. On stderr."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._ended = self._tokens = 0
        self._since = self._last = time.monotonic()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._live and self._ended:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def count(self, record: Record) -> None:
        self._ended += 1
        self._tokens += record.output_tokens
        now = time.monotonic()
        if now - self._last < (0.2 if self._live else LINE_SECONDS):
            return
        self._last = now
        rate = self._tokens / (now - self._since)
        line = f"{self._ended:,} requests ended, {self._tokens:,} tokens, {rate:,.0f} tokens/s"
        print(f"\r\033[K{line}" if self._live else line, end="" if self._live else "\n", file=sys.stderr, flush=True)


def _has_work(result: LoadResult) -> bool:
    return any(stage.bytes_per_second is not None for stage in result.stages)


def _measure(result: LoadResult, options: dict[str, Any]) -> None:
    from penstock.devices.probe import measure
    from penstock.devices.threads import usable_cores

    result.machine = measure(options["threads"] or usable_cores())
    result.flops_limit = result.machine.flops_of(result.weight_size or 2)


def _show(result: LoadResult, options: dict[str, Any]) -> None:
    from penstock.bench import load_report, plots

    if result.stages and options["html_file"] is not None:
        plots.write_html(result, Path(options["html_file"]).expanduser())
    if result.stages and options["png_file"] is not None:
        plots.write_png(result, Path(options["png_file"]).expanduser())
    if options["csv_file"] == "-":
        csv.writer(sys.stdout).writerows(load_report.csv_rows(result))
    elif options["csv_file"] is not None:
        try:
            with Path(options["csv_file"]).expanduser().open("w", newline="") as file:
                csv.writer(file).writerows(load_report.csv_rows(result))
        except OSError as error:
            raise EnvironmentFault(f"{options['csv_file']} cannot be written: {error.strerror}.") from None
    if options["as_json"]:
        import msgspec

        click.echo(msgspec.json.encode(asdict(result)))
    elif options["csv_file"] != "-" and result.stages:
        click.echo(load_report.markdown(result))


def _end(result: LoadResult) -> int:
    """The exit code, or the error that says what went wrong."""
    if result.interrupted:
        return INTERRUPTED
    ok = sum(stage.outcomes.get("ok", 0) for stage in result.stages)
    failed = sum(stage.outcomes.get("failed", 0) for stage in result.stages)
    first = next((error for stage in result.stages for error in stage.errors), "")
    if result.hopeless and not ok:
        raise PenstockError("No request was answered.", first)
    if result.hopeless:
        raise PartialResults("The server stopped answering, so the load test ended early.", first)
    if failed:
        raise PartialResults(f"{failed} requests failed.", first)
    return 0
