"""`penstock embed`: the hidden states of a file of texts, resumable."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from penstock.cli.main import INTERRUPTED
from penstock.cli.options import (
    check_apart,
    cpus_option,
    engine_options,
    find_model,
    input_path,
    model_argument,
    source_options,
)
from penstock.cli.progress import duration
from penstock.errors import ModelError, PartialResults, UsageError

if TYPE_CHECKING:
    from penstock.batch.record import RunRecord
    from penstock.batch.rows import InputSummary, Row, RowFile
    from penstock.batch.states import StateStore
    from penstock.engine.request import Embed
    from penstock.hub.snapshot import Snapshot

STEP_TOKENS = 512  # of one step where nothing else is asked: its states of all layers are in memory


@dataclass
class Summary:
    """What a run did. Seconds are wall-clock; tokens are those of this run's prompts."""

    model: str
    output: str
    rows: int
    done_before: int
    done: int = 0
    errors: int = 0
    tokens: int = 0
    load_seconds: float = 0.0
    compute_seconds: float = 0.0
    interrupted: bool = False

    def line(self) -> str:
        """The summary for people."""
        earlier = f" ({self.done_before:,} of them by earlier runs)" if self.done_before else ""
        rate = self.tokens / self.compute_seconds if self.compute_seconds else 0.0
        return (
            f"{self.done_before + self.done:,} of {self.rows:,} rows done{earlier}, {self.errors:,} with errors; "
            f"{self.tokens:,} tokens, {rate:,.0f} tokens/s; load {duration(self.load_seconds)}, "
            f"computing {duration(self.compute_seconds)}"
        )


@click.command(short_help="Hidden states for a file of texts; a rerun resumes.")
@model_argument
@click.option("-i", "--input", "source", required=True, metavar="FILE", help="Texts; - is stdin.")
@click.option("-o", "--output", required=True, metavar="FILE", help="Ends in .safetensors, .npz or .parquet.")
@click.option(
    "--input-format",
    type=click.Choice(["auto", "txt", "jsonl"]),
    default="auto",
    show_default=True,
    help="txt: a text a line. jsonl: an object with `prompt` or `prompt_token_ids` a line.",
)
@click.option(
    "--layers",
    default="-1",
    show_default=True,
    metavar="N,..",
    help="Hidden states: 0 is the embedding, N the output of layer N, -1 the last (normed); or `all`.",
)
@click.option(
    "--pool",
    type=click.Choice(["mean", "last", "cls", "none"]),
    default="mean",
    show_default=True,
    help="Over the tokens of a text; none keeps every token's, cls is the first.",
)
@click.option("--overwrite", is_flag=True, help="Lose what the output holds, and start again.")
@source_options
@cpus_option
@engine_options
@click.option("--json", "as_json", is_flag=True, help="The summary as a JSON object on stdout.")
def embed(model: str, output: str, as_json: bool, **options: Any) -> None:
    """Write the hidden states of every row of the input, as transformers' output_hidden_states has them, in float32.

    Killed at any moment, the same command goes on where it was. The arrays are layer_N, in the order of the input; see
    docs/how-to/embed.md.
    """
    target = input_path(output)
    if target is None:
        raise UsageError("The output must be a file, so that a run can go on.", "", "For example: -o states.npz")
    check_apart(input_path(options["source"]), target)
    summary = _embed(model, target, options)
    print(summary.line(), file=sys.stderr)
    if as_json:
        print(json.dumps(asdict(summary)))
    if summary.interrupted:
        print(f"interrupted; the same command continues {summary.output}", file=sys.stderr)
        raise click.exceptions.Exit(INTERRUPTED)
    if summary.errors:
        raise PartialResults(
            f"{summary.errors:,} of {summary.rows:,} rows ended in an error.",
            f"The metadata of {summary.output} says why; their states are NaN, or none.",
            "Shorten or repair those rows.",
        )


def _embed(model: str, output: Path, options: dict[str, Any]) -> Summary:
    from penstock.batch.rows import RowFile
    from penstock.batch.state_files import check_format, write_states
    from penstock.batch.states import StateStore

    check_format(output)
    snapshot = find_model(model, options["revision"], options["offline"], options["trust_remote_code"])
    layers = _layers(options["layers"], snapshot.path)
    pooled = options["pool"] != "none"
    with contextlib.closing(RowFile(input_path(options["source"]), options["input_format"])) as rows:
        found = rows.check()
        about = {"layers": list(layers), "pool": options["pool"]}
        record = _record(snapshot, rows, found, {**about, "dtype": options["dtype"], "quantize": options["quantize"]})
        summary = Summary(snapshot.name, str(output), found.rows, 0)
        if _is_complete(output, record, options["overwrite"]):
            summary.done_before = found.rows
            return summary
        store = StateStore(output, len(layers), overwrite=options["overwrite"])
        with contextlib.closing(store):
            summary.done_before = len(store.done)
            if len(store.done) < found.rows:
                _compute(snapshot, rows, layers, store, summary, options)
            summary.errors = len(store.errors)
            for row in store.rows():
                if row.error is not None:
                    print(f"row {row.id}: {row.error}", file=sys.stderr)
            if not summary.interrupted:
                model_facts = {"model": snapshot.name, "model_sha256": record.model_sha256}
                write_states(output, store, layers, pooled, {**model_facts, **about})
                store.remove()
    return summary


def _layers(asked: str, folder: Path) -> tuple[int, ...]:
    """The numbers of the hidden states that the option means, from 0. Raises UsageError."""
    count = _layer_count(folder)
    if asked.strip() == "all":
        return tuple(range(count + 1))
    try:
        numbers = [int(part) for part in asked.split(",")]
    except ValueError:
        raise UsageError(
            f"--layers {asked!r} is not a list of numbers.", "", "For example: --layers -1,-2 or all"
        ) from None
    found = tuple(n + count + 1 if n < 0 else n for n in numbers)
    if not all(0 <= n <= count for n in found) or len(set(found)) != len(found):
        raise UsageError(
            f"--layers {asked}: the model has the hidden states 0 to {count}, and each can be asked for once.",
            "0 is what goes into the first layer, -1 (the last) what comes out behind the final norm.",
        )
    return found


def _layer_count(folder: Path) -> int:
    """How many layers the model has; an encoder-decoder's encoder. Raises ModelError."""
    from penstock.hub.config import read_config
    from penstock.models.encoder_decoder.config import encodes, read_encoder_decoder
    from penstock.models.families import describe, is_described

    raw = read_config(folder)
    if is_described(raw):
        return describe(folder)[0].num_layers
    if encodes(folder):
        return read_encoder_decoder(folder).encoder_layers
    keys = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
    count = next((raw[key] for key in keys if isinstance(raw.get(key), int)), 0)
    if count < 1:
        raise ModelError(f"The config.json in {folder} does not say how many layers the model has.")
    return int(count)


def _record(snapshot: Snapshot, rows: RowFile, found: InputSummary, parameters: dict[str, Any]) -> RunRecord:
    """The identity of the run: what changes its numbers."""
    from penstock.batch.record import RunRecord
    from penstock.hub.fingerprint import fingerprint

    return RunRecord(
        model=snapshot.name,
        model_sha256=fingerprint(snapshot.path),
        input=rows.name,
        input_sha256=found.sha256,
        rows=found.rows,
        parameters=parameters,
        parameters_sha256=hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest(),
    )


def _is_complete(output: Path, record: RunRecord, overwrite: bool) -> bool:
    """Whether an earlier run wrote the whole output; notes whose it will be otherwise. Raises UsageError where it is
    another run's."""
    from penstock.batch.record import another_run, differences, read_record, write_record

    earlier = read_record(output)
    begun = output.exists() or output.with_name(output.name + ".part").exists()
    if begun and not overwrite:
        if earlier is None:
            raise UsageError(
                f"The output {output} exists, and it is not from `penstock embed`.",
                "",
                "Give another output, or --overwrite to lose what it holds.",
            )
        changes = differences(earlier, record)
        if earlier.input_sha256 != record.input_sha256:
            was = f"{earlier.input} with {earlier.rows:,} rows"
            changes.append(f"the input ({was}, now {record.input} with {record.rows:,})")
        if changes:
            raise another_run(output, changes)
        return output.exists()
    write_record(output, record)
    output.unlink(missing_ok=True)
    return False


def _compute(
    snapshot: Snapshot,
    rows: RowFile,
    layers: tuple[int, ...],
    store: StateStore,
    summary: Summary,
    options: dict[str, Any],
) -> None:
    """The engine's part: load, then step until all rows are stored or somebody interrupts."""
    from penstock.batch.embed import embed_rows
    from penstock.batch.interrupt import Interrupt
    from penstock.cli.engine import start_engine
    from penstock.cli.progress import RowProgress
    from penstock.text.tokenizer import load_tokenizer

    if summary.done_before:
        print(f"{summary.done_before:,} of {summary.rows:,} rows are done already", file=sys.stderr)
    options["max_batch_prefill_tokens"] = options["max_batch_prefill_tokens"] or STEP_TOKENS
    tokenizer = load_tokenizer(snapshot.path)
    since = time.monotonic()
    engine = start_engine(snapshot, options)
    summary.load_seconds = time.monotonic() - since
    todo: Iterator[tuple[int, Row]] = ((n, row) for n, row in enumerate(rows) if n not in store.done)
    since, counted = time.monotonic(), engine.stats.prompt_tokens
    with Interrupt() as interrupt, RowProgress(summary.rows, summary.done_before) as progress:
        for parts in embed_rows(engine, tokenizer, todo, _asked(layers, options["pool"])):
            store.write(parts, engine.limits.hidden_size, options["pool"] == "none")
            fresh = engine.stats.prompt_tokens - counted
            counted += fresh
            progress.advance(sum(part.last for part in parts), fresh)
            summary.tokens += fresh
            summary.done = len(store.done) + len(store.errors) - summary.done_before
            if interrupt.asked:
                summary.interrupted = summary.done_before + summary.done < summary.rows
                break
    summary.compute_seconds = time.monotonic() - since


def _asked(layers: tuple[int, ...], pool: str) -> Embed:
    from penstock.engine.request import Embed

    return Embed(layers, {"cls": "first"}.get(pool, pool))  # type: ignore[arg-type]
