"""`penstock convert`: safetensors from .bin files, in a sandbox, once."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from penstock.cli.options import model_argument, source_options


@click.command(short_help="Make safetensors of a model that has only .bin files.")
@model_argument
@source_options
@click.option("--to", metavar="DIR", help="Where to put it.  [default: the folder, or beside the hub's snapshot]")
@click.option("--json", "as_json", is_flag=True, help="What was made, as a JSON object on stdout.")
def convert(model: str, revision: str | None, offline: bool, to: str | None, as_json: bool) -> None:
    """Convert the weights of MODEL, a folder or a hub name, from .bin files to safetensors.

    A .bin file is a pickle: a program. It is not run. A process without files, network or other programs reads the
    description of the tensors in it and copies their bytes.
    """
    from penstock.hub.convert import convert as convert_folder
    from penstock.hub.snapshot import resolve_pickles

    folder = resolve_pickles(model, revision, offline=True if offline else None)
    target = None if to is None else Path(to).expanduser()
    made = convert_folder(folder, target, _say)
    print(f"{made.tensors:,} tensors, {made.tensor_bytes / 1e9:.2f} GB, in {made.folder}", file=sys.stderr)
    if as_json:
        print(json.dumps({"folder": str(made.folder), "tensors": made.tensors, "bytes": made.tensor_bytes}))


def _say(name: str, size: int) -> None:
    print(f"converting {name} ({size / 1e9:.2f} GB)", file=sys.stderr, flush=True)
