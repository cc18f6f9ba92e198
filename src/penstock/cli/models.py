"""`penstock models`: the catalogue, and which of its models are on this machine."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

_WEIGHT_BYTES = {"bfloat16": 2.0, "int8": 1.0, "int4": 0.5625}


@click.command(short_help="List the catalogue of models by their short names.")
@click.argument("pattern", required=False)
@click.option("--here", is_flag=True, help="Only models that are on this machine.")
@click.option("--json", "as_json", is_flag=True, help="A JSON array on stdout.")
def models(pattern: str | None, here: bool, as_json: bool) -> None:
    """List the catalogue: names that are a MODEL in every command, with size, licence and what they need.

    PATTERN: a part of a name, of a hub name or of a family. Sites add theirs in a TOML file that PENSTOCK_CATALOGUE
    names, users in ~/.config/penstock/models.toml (docs/how-to/gguf-and-bin.md).
    """
    rows = [row for row in _rows() if (row["here"] or not here) and _matches(row, pattern)]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        size = f"{row['parameters']:.3g} B" if row["parameters"] else "?"
        gated = ", gated" if row["gated"] else ""
        mark = "*" if row["here"] else " "
        print(f"{mark} {row['name']:<24} {size:>7}  {row['family']:<11} {row['model']}")
        print(f"  {'':<24} {'':>7}  {row['recommended'] or 'resources unknown'}; {row['license'] or '?'}{gated}")
        if row["note"]:
            print(f"  {'':<24} {'':>7}  {row['note']}")
    count = len(rows)
    print(f"{count} model{'s' * (count != 1)}; * is on this machine", file=sys.stderr)


def _rows() -> list[dict[str, Any]]:
    from penstock.hub import cache, catalogue

    cached = set(cache.names())
    return [
        {
            "name": entry.name,
            "model": entry.model,
            "revision": entry.revision,
            "family": entry.family,
            "parameters": entry.parameters,  # billions
            "weight_bytes": {name: entry.memory(size) for name, size in _WEIGHT_BYTES.items()},
            "recommended": entry.recommended(),
            "license": entry.license,
            "gated": entry.gated,
            "note": entry.note,
            "here": entry.model in cached or entry.model.startswith(("/", "~")),
        }
        for entry in catalogue.entries()
    ]


def _matches(row: dict[str, Any], pattern: str | None) -> bool:
    words = f"{row['name']} {row['model']} {row['family']}".lower()
    return pattern is None or pattern.lower() in words
