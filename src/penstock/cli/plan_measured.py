"""Predictions beside measurements: published ones, and those of `penstock bench static --json` on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.cli.plan_here import processors
from penstock.devices.probe import MachineLimits
from penstock.errors import UsageError
from penstock.plan.hardware import gpu
from penstock.plan.known import Measured, published
from penstock.plan.roofline import tokens_per_second
from penstock.plan.weights import HALVES

if TYPE_CHECKING:
    from penstock.cli.plan_model import Described
    from penstock.plan.fit import Plan
    from penstock.plan.hardware import Device

_WEIGHT_SIZES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "int4": 0.5625}  # bytes of a weight


def comparisons(described: Described, best: Plan, files: tuple[str, ...]) -> list[dict[str, Any]]:
    """What was measured of this model on this hardware, what is predicted for just that, and the error as a share.

    A published figure counts when card and format are the plan's, whatever the number of cards; a file of the
    benchmark is about this model on the machine whose limits the file has.
    """
    card = best.device.name.partition(":")[0]
    found = [m for m in published() if m.model == described.known and m.gpu == card and _same(m.format, best.form)]
    rows = [
        _row(m, tokens_per_second(described.shape, m.format, gpu(m.gpu), m.cards, m.batch, m.context)) for m in found
    ]
    for name in files:
        device, measured = read_bench(Path(name).expanduser(), best.device)
        rows += [
            _row(m, tokens_per_second(described.shape, m.format, device, best.cards, m.batch, m.context))
            for m in measured
        ]
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


def read_bench(file: Path, device: Device) -> tuple[Device, list[Measured]]:
    """The decoding speeds in a report of `penstock bench static --json`, and the device with the limits that the report
    measured where it has them (the speed of a memory bus changes from hour to hour). Raises UsageError."""
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        work, size = report["workload"], float(report["weight_size"])
        form = min(_WEIGHT_SIZES, key=lambda name: abs(_WEIGHT_SIZES[name] - size))
        measured = [
            Measured(
                model="",
                gpu="here",
                tokens_per_second=float(batch["throughput"]["Decode"]["average"]),
                source=file.name,
                batch=int(batch["batch_size"]),
                context=int(work["sequence_length"] + work["decode_length"] / 2),
                format=form,
            )
            for batch in report["batches"]
        ]
        if report.get("machine") and device.is_cpu:
            device = processors(MachineLimits(**report["machine"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(
            f"{file} is no report of `penstock bench static --json`.",
            f"{type(error).__name__}: {error}"[:160],
            "Make one: penstock bench static MODEL --json > FILE",
        ) from None
    return device, measured
