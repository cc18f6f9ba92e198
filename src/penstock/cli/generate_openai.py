"""`penstock generate` on a file of OpenAI's batch lines: the server's own routes, without a server."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from penstock.cli.batch_options import generation_options, shape_options
from penstock.errors import UsageError

if TYPE_CHECKING:
    from penstock.batch.openai import AnswerLine, BatchLine
    from penstock.batch.records import Source
    from penstock.batch.results import ResultWriter
    from penstock.cli.generate_summary import Summary
    from penstock.hub.snapshot import Snapshot


def run_lines(snapshot: Snapshot, source: Source, output: Path | None, options: dict[str, Any]) -> Summary:
    """Answer every line that the output lacks. Raises PenstockError; what is done by then stays."""
    from penstock.batch.openai import LineFileReader, done_of_answer
    from penstock.batch.parameters import Parameters
    from penstock.batch.record import make_record
    from penstock.batch.results import ResultWriter
    from penstock.cli.generate_summary import Summary
    from penstock.hub.fingerprint import fingerprint

    _refuse_options()
    lines = LineFileReader(source)
    total, sha256, keys = lines.check()
    settings = {"dtype": options["dtype"], "quantize": options["quantize"], "format": "openai"}
    settings |= {f"adapter {name}": fingerprint(Path(path)) for name, path in options["adapters"].items()}
    model_sha256 = fingerprint(snapshot.path)
    record = make_record(snapshot.name, model_sha256, lines.name, sha256, total, Parameters(), settings)
    writer = ResultWriter(
        output,
        record,
        overwrite=options["overwrite"],
        retry_errors=options["retry_errors"],
        done=done_of_answer,
    )
    summary = Summary(model=snapshot.name, output=writer.name, rows=total, done_before=writer.done_before)
    with contextlib.closing(writer):
        missing = writer.missing(keys, lines.numbered)
        if missing.any():
            todo = (line for (_, line), wanted in zip(lines.numbered(), missing, strict=True) if wanted)
            _answer(snapshot, todo, writer, summary, options)
        summary.done, summary.errors = writer.written, writer.errors
    return summary


def _answer(
    snapshot: Snapshot, lines: Iterable[BatchLine], writer: ResultWriter, summary: Summary, options: dict[str, Any]
) -> None:
    from penstock.batch.openai import encoded
    from penstock.batch.parameters import MAX_SAMPLES, MAX_STOPS
    from penstock.cli.engine import say_stage
    from penstock.cli.options import engine_config
    from penstock.cli.progress import RowProgress
    from penstock.server.config import ServeConfig
    from penstock.server.offline import answer_file

    if summary.done_before:
        print(f"{summary.done_before:,} of {summary.rows:,} rows are done already", file=sys.stderr)
    config = ServeConfig(
        model=snapshot.name,
        engine=engine_config(snapshot, options),
        max_stop_sequences=MAX_STOPS,
        max_concurrent_requests=MAX_SAMPLES,
        max_client_batch_size=MAX_SAMPLES,
    )
    since = time.monotonic()
    progress = RowProgress(summary.rows, summary.done_before)

    def ready() -> None:
        nonlocal since
        summary.load_seconds = time.monotonic() - since
        since = time.monotonic()

    def take(answers: list[AnswerLine]) -> None:
        writer.write_lines([encoded(answer) for answer in answers], sum(answer.failed for answer in answers))
        tokens = sum(_tokens(answer) for answer in answers)
        summary.tokens += tokens
        progress.advance(len(answers), tokens)

    with progress:
        early = asyncio.run(answer_file(config, snapshot, lines, say_stage, ready, take))
    summary.interrupted = early
    summary.generate_seconds = time.monotonic() - since


def _tokens(answer: AnswerLine) -> int:
    """Generated tokens of an answer, by its own account."""
    import msgspec

    if answer.response is None or answer.failed:
        return 0
    usage = msgspec.json.decode(answer.response.body, type=dict[str, Any]).get("usage") or {}
    return int(usage.get("completion_tokens") or usage.get("output_tokens") or 0)


def _refuse_options() -> None:
    """The lines say how to generate. Raises UsageError for options that would have no effect."""
    context = click.get_current_context()

    def mark() -> None: ...

    names = {option.name: option.opts[-1] for option in shape_options(generation_options(click.command()(mark))).params}
    for name, spelled in names.items():
        given = name is not None and context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        if given and name != "input_format":
            raise UsageError(
                f"{spelled} has no effect on a batch file of OpenAI's.",
                "The body of each line says what to generate, and how.",
                "Leave it out, or give --input-format jsonl.",
            )
