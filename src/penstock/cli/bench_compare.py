"""`penstock bench compare`: Penstock and other engines on one model, in turn, in one run."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path

import click

from penstock.cli.main import INTERRUPTED
from penstock.cli.options import COUNT, find_model, source_options
from penstock.errors import PartialResults, PenstockError

JOBS = ("1x128+64", "8x128+64", "32x128+64", "1x512+1")


def default_rivals() -> Path:
    """Where benchmarks/make_rivals.py puts them."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "penstock" / "rivals"


@click.command(short_help="Penstock beside llama.cpp, OpenVINO and others, in turn.")
@click.argument("model")
@click.option(
    "-e",
    "--engine",
    "engines",
    multiple=True,
    metavar="NAME[:FORMAT]",
    help="One to measure. Repeatable.  [default: all]",
)
@click.option(
    "-j",
    "--job",
    "jobs",
    multiple=True,
    metavar="NxP+D",
    default=JOBS,
    help="Streams x prompt + new tokens. Repeatable.",
)
@click.option("-r", "--rounds", type=COUNT, default=5, show_default=True, help="Of each job.")
@click.option("--threads", type=COUNT, help="Of each engine.  [default: the cores that are ours]")
@click.option("--rivals", metavar="DIR", help="What make_rivals.py made.  [default: ~/.cache/penstock/rivals]")
@click.option("--cache", metavar="DIR", help="Converted models.  [default: in --rivals]")
@click.option("--json", "as_json", is_flag=True, help="Every sample, as one JSON object on stdout.")
@source_options
def compare(
    model: str,
    engines: tuple[str, ...],
    jobs: tuple[str, ...],
    rounds: int,
    threads: int | None,
    rivals: str | None,
    cache: str | None,
    as_json: bool,
    revision: str | None,
    offline: bool,
) -> int:
    """Measure Penstock and other engines on MODEL, in turn, and print their speeds and ratios.

    All engines get the same token ids and make the same number of tokens. A job of several streams runs them as one
    batch. Decode speed counts from the moment when every stream had its first token, prefill speed until then. Ratios
    are taken within a round; shown are the median and the range.
    """
    from penstock.bench import compare as bench
    from penstock.bench.driver import choose, read_manifest
    from penstock.devices.threads import usable_cores
    from penstock.hub.config import read_config
    from penstock.hub.fingerprint import fingerprint

    folder = Path(rivals).expanduser() if rivals else default_rivals()
    chosen = choose(read_manifest(folder), engines)
    work = [bench.Job.parse(text) for text in jobs]
    snapshot = find_model(model, revision, offline)
    vocab_size = read_config(snapshot.path).get("vocab_size") or 0
    converted = Path(cache).expanduser() if cache else folder / "models"
    result, interrupted = bench.Comparison(str(snapshot.path), threads or usable_cores()), False
    try:
        bench.compare(
            result,
            chosen,
            work,
            rounds,
            converted / fingerprint(snapshot.path)[:16],
            vocab_size,
            lambda line: print(line, file=sys.stderr, flush=True),
        )
    except KeyboardInterrupt:
        interrupted = True
    if as_json:
        import msgspec

        click.echo(msgspec.json.encode(asdict(result)))
    else:
        click.echo(bench.markdown(result, work))
    if interrupted:
        return INTERRUPTED
    if result.errors and not result.samples:
        raise PenstockError("No engine could be measured.", next(iter(result.errors.values())))
    if result.errors:
        raise PartialResults(
            f"{len(result.errors)} of {len(chosen)} engines failed: {', '.join(result.errors)}",
            next(iter(result.errors.values())),
        )
    return 0
