"""`penstock generate`: a file of prompts through the engine of this process, resumable."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from penstock.cli.batch_options import generation_options, parameters_of, shape_of, shape_options
from penstock.cli.generate_summary import Summary
from penstock.cli.options import (
    adapter_options,
    adapters_of,
    check_apart,
    cpus_option,
    engine_options,
    find_model,
    input_path,
    model_argument,
    source_options,
)
from penstock.cli.report import Watch, report_option
from penstock.errors import ModelError

if TYPE_CHECKING:
    from penstock.batch.parameters import Parameters
    from penstock.batch.results import ResultWriter
    from penstock.batch.rows import Row
    from penstock.hub.snapshot import Snapshot
    from penstock.text.tokenizer import Tokenizer


@click.command(short_help="Generate for a file of prompts; a rerun resumes.")
@model_argument
@click.option("-i", "--input", "source", required=True, metavar="FILE", help="Prompts; - is stdin.")
@click.option("-o", "--output", required=True, metavar="FILE", help="JSONL of results; - is stdout.")
@shape_options
@generation_options
@click.option(
    "--adapter",
    "adapter_sources",
    multiple=True,
    metavar="[NAME=]SOURCE",
    help="Compute with this LoRA adapter. Of several, rows choose by `adapter`.",
)
@adapter_options
@click.option("--overwrite", is_flag=True, help="Start again: lose what the output holds.")
@click.option("--retry-errors", is_flag=True, help="Run the rows again that ended in an error.")
@click.option("--json", "as_json", is_flag=True, help="The summary as one JSON line on stdout.")
@report_option
@click.option(
    "--prefix-caching/--no-prefix-caching", default=True, show_default=True, help="Compute what prompts share once."
)
@source_options
@cpus_option
@engine_options
def generate(model: str, source: str, output: str, as_json: bool, **options: Any) -> None:
    """Generate text for every prompt of FILE with MODEL.

    A .txt input has one prompt a line. A .jsonl input has one object a line with `prompt`, `messages` or
    `prompt_token_ids`, and, if wanted, `id` and parameters of its own: max_new_tokens, temperature, top_k, top_p,
    typical_p, min_p, repetition_penalty, frequency_penalty, seed, n, stop, ignore_eos, do_sample, watermark, chat,
    system, adapter, grammar (an object of kind, which is json_schema, json_object, regex, lark or choice, and value).
    A .csv, .tsv or .parquet input has a column of prompts. A row without an id gets its line number. A file of OpenAI's
    batch lines is answered line by line as the server would.

    The output has one object a line, in the order of completion: id, prompt, text, token_ids, finish_reason,
    prompt_tokens, generated_tokens, hash (of what the row asks for), samples if there are several, and error if the
    row failed. Interrupted or killed, the same command goes on where it stopped; rows may have been added meanwhile.
    """
    if as_json and output == "-":
        raise click.UsageError("--json and --output - both write to stdout; leave one out.")
    check_apart(input_path(source), input_path(output))
    summary = run(model, input_path(source), input_path(output), options)
    print(summary.line(), file=sys.stderr, flush=True)
    if as_json:
        import msgspec

        click.echo(msgspec.json.encode(summary))
    summary.end()


def run(model: str, source: Path | None, output: Path | None, options: dict[str, Any]) -> Summary:
    """Generate for all rows that the output lacks. Raises PenstockError; what is done by then stays."""
    from penstock.batch.record import make_record
    from penstock.batch.results import ResultWriter, todo
    from penstock.batch.rows import RowFile
    from penstock.hub.fingerprint import fingerprint
    from penstock.text.tokenizer import load_tokenizer

    options["adapters"] = adapters_of(options["adapter_sources"], options["offline"])
    if len(options["adapters"]) == 1:
        (options["adapter"],) = options["adapters"]
    parameters, shape = parameters_of(options), shape_of(options)
    snapshot = find_model(model, options["revision"], options["offline"], options["trust_remote_code"])
    with contextlib.closing(RowFile(source, options["input_format"], shape)) as rows:
        if rows.kind == "openai":
            from penstock.cli.generate_openai import run_lines

            return run_lines(snapshot, rows.source, output, options)
        found = rows.check()
        tokenizer = load_tokenizer(snapshot.path)
        if tokenizer is None and found.text_line is not None:
            raise ModelError(
                f"The model {snapshot.name} has no tokenizer, but {rows.name} has text (line {found.text_line}).",
                f"{snapshot.path} holds no tokenizer.json.",
                "Give rows with prompt_token_ids, or copy the tokenizer's files into the folder.",
            )
        settings = {"dtype": options["dtype"], "quantize": options["quantize"], **shape.settings()}
        settings |= {f"adapter {name}": fingerprint(Path(path)) for name, path in options["adapters"].items()}
        record = make_record(
            snapshot.name, fingerprint(snapshot.path), rows.name, found.sha256, found.rows, parameters, settings
        )
        writer = ResultWriter(output, record, overwrite=options["overwrite"], retry_errors=options["retry_errors"])
        summary = Summary(model=snapshot.name, output=writer.name, rows=found.rows, done_before=writer.done_before)
        with contextlib.closing(writer):
            missing = writer.missing(found.keys, rows.numbered)
            del found  # and its keys
            if missing.any():
                _generate(snapshot, tokenizer, todo(rows, missing), parameters, writer, summary, options)
            summary.done, summary.errors = writer.written, writer.errors
    return summary


def _generate(
    snapshot: Snapshot,
    tokenizer: Tokenizer | None,
    rows: Iterable[Row],
    parameters: Parameters,
    writer: ResultWriter,
    summary: Summary,
    options: dict[str, Any],
) -> None:
    """The engine's part of a run: load, then step until all rows are written or somebody interrupts."""
    from penstock.batch.interrupt import Interrupt
    from penstock.batch.local import generate_rows
    from penstock.batch.prompts import Prompter
    from penstock.cli.engine import start_engine
    from penstock.cli.progress import RowProgress

    if summary.done_before:
        print(f"{summary.done_before:,} of {summary.rows:,} rows are done already", file=sys.stderr)
    since, watch = time.monotonic(), Watch(snapshot.name)
    engine = start_engine(snapshot, options, stages=watch.stages)
    summary.load_seconds = time.monotonic() - since
    since = time.monotonic()
    progress = RowProgress(summary.rows, summary.done_before)
    with Interrupt() as interrupt, Prompter(tokenizer) as prompter, progress:
        for step in generate_rows(engine, prompter, rows, parameters):
            writer.write(step.results)
            summary.tokens += step.tokens
            progress.advance(len(step.results), step.tokens)
            if interrupt.asked:
                summary.interrupted = writer.done_before + writer.written < summary.rows
                break
    summary.generate_seconds = time.monotonic() - since
    if options["report"]:
        summary.report = watch.report(engine, options)
