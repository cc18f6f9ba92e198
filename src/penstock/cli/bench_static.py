"""`penstock bench static`, installed as `text-generation-benchmark` too: the engine alone, batch size by batch size."""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from penstock.cli.main import INTERRUPTED, add_common, run_command
from penstock.cli.options import (
    COUNT,
    FiniteFloat,
    Whole,
    cpus_option,
    engine_options,
    find_model,
    source_options,
    stack,
)
from penstock.cli.report import Watch, report_option
from penstock.errors import UsageError

if TYPE_CHECKING:
    from penstock.bench.static import Run, StaticResult, Workload
    from penstock.engine.request import Sampling

BATCH_SIZES = (1, 2, 4, 8, 16, 32)

benchmark_options = stack(
    click.option(
        "-b",
        "--batch-size",
        "batch_sizes",
        type=COUNT,
        multiple=True,
        default=BATCH_SIZES,
        show_default=True,
        help="Rows of a batch. Repeatable.",
    ),
    click.option("-s", "--sequence-length", type=COUNT, default=10, show_default=True, help="Prompt tokens of a row."),
    click.option("-d", "--decode-length", type=Whole(2), default=8, show_default=True, help="New tokens of a row."),
    click.option("-r", "--runs", type=COUNT, default=10, show_default=True, help="Recorded runs of a batch size."),
    click.option("-w", "--warmups", type=Whole(0), default=1, show_default=True, help="Runs before them."),
    click.option("--temperature", type=FiniteFloat(0, 1e6, above_low=True), help="Spread of the choice."),
    click.option("--top-k", type=Whole(0), help="Choose among the K likeliest."),
    click.option("--top-p", type=FiniteFloat(0, 1, above_low=True), help="Choose among the likeliest that sum to P."),
    click.option("--typical-p", type=FiniteFloat(0, 1, above_low=True), help="Locally typical sampling."),
    click.option("--repetition-penalty", type=FiniteFloat(0, 1e6, above_low=True), help="1 is none."),
    click.option("--frequency-penalty", type=FiniteFloat(-2, 2), help="0 is none."),
    click.option("--watermark", is_flag=True, help="Watermark the tokens."),
    click.option("--do-sample", is_flag=True, help="Draw tokens at random."),
    click.option("--top-n-tokens", type=Whole(0, 128), help="So many alternatives of each token."),
    click.option("--csv", "csv_file", metavar="FILE", help="The figures as CSV; - is stdout."),
    click.option("--json", "as_json", is_flag=True, help="Everything, as one JSON object on stdout."),
    report_option,
    click.option("--no-limits", is_flag=True, help="Leave out measuring the machine (a few seconds)."),
)

FIELDS = ("temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "frequency_penalty")
WORDS = ("Temperature", "Top K", "Top P", "Typical P", "Repetition Penalty", "Frequency Penalty")


@click.command(short_help="The engine alone, as text-generation-benchmark does.")
@click.argument("model")
@benchmark_options
@source_options
@cpus_option
@engine_options
def static(model: str, **options: Any) -> int:
    """Time batches of equal prompts on MODEL in this process: no HTTP, no queue, no text.

    Prefill is the time until every row has its first token, decode the rest. Ends of sequence are ignored. The tables
    are those of text-generation-benchmark, then the share of this machine's memory bandwidth and arithmetic, which are
    measured before and after the runs. Ctrl-C prints what is done by then.
    """
    from penstock.bench import static as bench
    from penstock.cli.engine import start_engine
    from penstock.devices.probe import measure
    from penstock.devices.threads import usable_cores

    snapshot = find_model(model, options["revision"], options["offline"], options["trust_remote_code"])
    workload = _workload(options)
    rows = max(workload.batch_sizes)
    length = workload.sequence_length + workload.decode_length
    fitting = {  # every batch runs at once, its prompts in one step
        "max_batch_size": rows,
        "max_batch_prefill_tokens": max(2048, rows * workload.sequence_length),
        "max_total_tokens": length,
        "max_batch_total_tokens": rows * (-(-length // 16) * 16 + 16),
        "prefix_caching": False,
    }
    watch = Watch(snapshot.name)
    engine = start_engine(
        snapshot,
        {**options, **{name: value for name, value in fitting.items() if not options.get(name)}},
        stages=watch.stages,
    )
    result = bench.StaticResult(snapshot.name, engine.limits.dtype, engine.limits.weight_size, workload)
    interrupted = False
    wants_limits = not options["no_limits"]
    threads, device = options["threads"] or usable_cores(), engine.limits.device
    before = measure(threads, products=False, device=device) if wants_limits else None
    with Progress(workload) as progress:
        runs: list[Run] = []
        try:
            for run in bench.run_batches(engine, workload):
                runs += [] if run is None else [run]
                progress.advance(run)
                if len(runs) == workload.runs:
                    result.batches.append(bench.Batch.of(workload, runs))
                    runs = []
        except KeyboardInterrupt:
            interrupted = True
            if runs:
                result.batches.append(bench.Batch.of(workload, runs))
    watch.stop()
    if result.batches and not interrupted and before is not None:
        result.machine = measure(threads, device=device).beside(before)
    if options["report"]:
        result.report = watch.report(engine, options, result.machine)
    _print(result, options)
    return INTERRUPTED if interrupted else 0


def _workload(options: dict[str, Any]) -> Workload:
    from penstock.bench.static import Workload

    return Workload(
        batch_sizes=tuple(options["batch_sizes"]),
        sequence_length=options["sequence_length"],
        decode_length=options["decode_length"],
        runs=options["runs"],
        warmups=options["warmups"],
        top_n_tokens=options["top_n_tokens"] or 0,
        sampling=_sampling(options),
    )


def _sampling(options: dict[str, Any]) -> Sampling:
    from penstock.engine.request import Sampling

    given = {name: options[name] for name in FIELDS if options[name] is not None}
    return Sampling(**given, do_sample=options["do_sample"], watermark=options["watermark"])


def _print(result: StaticResult, options: dict[str, Any]) -> None:
    from penstock.bench import static as bench

    if options["csv_file"] is not None:
        _write_csv(result, options["csv_file"])
    if options["as_json"]:
        import msgspec

        click.echo(msgspec.json.encode({**asdict(result), "flops_limit": result.flops_limit}))
        return
    if options["csv_file"] == "-":
        return
    values = [
        (word, "None" if options[name] is None else f"Some({options[name]})")
        for word, name in zip(WORDS, FIELDS, strict=True)
    ]
    values += [("Watermark", str(options["watermark"]).lower()), ("Do Sample", str(options["do_sample"]).lower())]
    tables = [bench.parameters_table(result, values), bench.latency_table(result), bench.throughput_table(result)]
    click.echo("\n\n".join(table for table in [*tables, bench.limits_table(result)] if table))


def _write_csv(result: StaticResult, name: str) -> None:
    from penstock.bench import static as bench

    if name == "-":
        csv.writer(sys.stdout).writerows(bench.csv_rows(result))
        return
    try:
        with Path(name).expanduser().open("w", newline="") as file:
            csv.writer(file).writerows(bench.csv_rows(result))
    except OSError as error:
        raise UsageError(f"{name} cannot be written: {error.strerror}.") from None


class Progress:
    """A bar on a terminal with the latest run; a line a batch size anywhere else. On stderr."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._done = 0
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
            self._bar = Progress(*columns, TextColumn("{task.fields[latest]}"), console=Console(stderr=True))
            w = self._workload
            total = len(w.batch_sizes) * (w.warmups + w.runs)
            self._task = self._bar.add_task("benchmark", total=total, latest="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, run: Run | None) -> None:
        """One run more; None for one that warmed up."""
        w = self._workload
        size = w.batch_sizes[min(self._done // (w.warmups + w.runs), len(w.batch_sizes) - 1)]
        self._done += 1
        latest = "warming up"
        if run is not None:
            rate = run.batch_size * w.steps / run.decode
            latest = (
                f"prefill {1e3 * run.prefill:.1f} ms, decode {1e3 * run.decode / w.steps:.2f} ms, {rate:,.0f} tokens/s"
            )
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, description=f"batch {size}", latest=latest)
        elif self._done % (w.warmups + w.runs) == 0:
            print(f"batch {size}: {latest}", file=sys.stderr, flush=True)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "-t", "--tokenizer-name", "model", required=True, envvar="TOKENIZER_NAME", metavar="MODEL", help="The model."
)
@click.option(
    "-m",
    "--master-shard-uds-path",
    envvar="MASTER_SHARD_UDS_PATH",
    metavar="PATH",
    help="No effect: the model is loaded here, no server has to run.",
)
@benchmark_options
@source_options
@engine_options
@click.pass_context
def text_generation_benchmark(ctx: click.Context, master_shard_uds_path: str | None, **options: Any) -> int:
    """TGI's benchmark of the engine, with its flags and tables. The same as `penstock bench static`."""
    if master_shard_uds_path is not None:
        print("note: --master-shard-uds-path has no effect: the model is loaded here", file=sys.stderr)
    code: int = ctx.invoke(static, **options)
    return code


def main(args: Sequence[str] | None = None) -> None:
    """The console script `text-generation-benchmark`."""
    for option in text_generation_benchmark.params:
        if isinstance(option, click.Option) and option.envvar is None and option.name in TGI_ENVIRONMENT:
            option.envvar = TGI_ENVIRONMENT[option.name]
    add_common(text_generation_benchmark)
    run_command(text_generation_benchmark, args, "text-generation-benchmark")


TGI_ENVIRONMENT = {name: name.upper() for name in (*FIELDS, "watermark", "do_sample", "top_n_tokens")}
TGI_ENVIRONMENT |= {name: name.upper() for name in ("sequence_length", "decode_length", "runs", "warmups", "revision")}
