"""Predictions beside measurements: published ones, and those of `penstock bench static --json` on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.errors import UsageError
from penstock.plan.hardware import gpu
from penstock.plan.known import Measured, published
from penstock.plan.roofline import tokens_per_second
from penstock.plan.weights import HALVES

if TYPE_CHECKING:
    from penstock.cli.plan_model import Described
    from penstock.plan.fit import Plan


def comparisons(described: Described, best: Plan, files: tuple[str, ...]) -> list[dict[str, Any]]:
    """What was measured of this model on this hardware, what is predicted for just that, and the error as a share.

    A published figure counts when card and format are the plan's, whatever the number of cards; a file of the
    benchmark is about this model on this machine.
    """
    card = best.device.name.partition(":")[0]
    found = [m for m in published() if m.model == described.known and m.gpu == card and _same(m.format, best.form)]
    rows = [
        _row(m, tokens_per_second(described.shape, m.format, gpu(m.gpu), m.cards, m.batch, m.context)) for m in found
    ]
    for name in files:
        for m in read_bench(Path(name).expanduser()):
            predicted = tokens_per_second(described.shape, best.form, best.device, best.cards, m.batch, m.context)
            rows.append(_row(m, predicted))
    return rows


def _same(one: str, other: str) -> bool:
    return one == other or (one in HALVES and other in HALVES)


def _row(m: Measured, predicted: float) -> dict[str, Any]:
    cards = "" if m.gpu == "here" else f"{m.cards}x {m.gpu}, "
    return {
        "what": f"{cards}batch {m.batch}, {m.context} tokens, {m.format}",
        "source": m.source,
        "measured": m.tokens_per_second,
        "predicted": round(predicted, 2),
        "error": round(predicted / m.tokens_per_second - 1, 4),
    }


def read_bench(file: Path) -> list[Measured]:
    """The decoding speeds in a report of `penstock bench static --json`. Raises UsageError."""
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        length, new = report["sequence_length"], report["decode_length"]
        return [
            Measured(
                model="",
                gpu="here",
                tokens_per_second=float(batch["throughput"]["Decode"]["average"]),
                source=file.name,
                batch=int(batch["batch_size"]),
                context=int(length + new / 2),
                format=str(report.get("format", "")),
            )
            for batch in report["batches"]
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(
            f"{file} is no report of `penstock bench static --json`.",
            f"{type(error).__name__}: {error}"[:160],
            "Make one: penstock bench static MODEL --json > FILE",
        ) from None
