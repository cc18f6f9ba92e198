"""`--report`: what a run of the engine in this process did, and what held it back."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import click

from penstock.devices.counters import EnergyMeter, disk_bytes

if TYPE_CHECKING:
    from penstock.devices.probe import MachineLimits
    from penstock.engine.loop import EngineLoop
    from penstock.engine.messages import Stage
    from penstock.engine.report import RunReport

report_option = click.option(
    "--report", is_flag=True, help="At the end: bytes, FLOPs, shares of the machine's limits, the bottleneck."
)


class Watch:
    """Measures a run from its construction on. stages: filled by start_engine."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._energy, self._since, self._disk = EnergyMeter(), time.monotonic(), disk_bytes()
        self.stages: list[Stage] = []
        self._end: tuple[float, float | None, int | None] | None = None

    def stop(self) -> tuple[float, float | None, int | None]:
        """The run is over, unless it was before. Returns its seconds, joules and bytes from disk."""
        if self._end is None:
            disk = disk_bytes()
            read = None if disk is None or self._disk is None else disk - self._disk
            self._end = time.monotonic() - self._since, self._energy.joules(), read
        return self._end

    def report(self, engine: EngineLoop, options: dict[str, Any], limits: MachineLimits | None = None) -> RunReport:
        """The report up to `stop`, told on stderr. limits: of the machine; None measures them now.

        Raises EnvironmentFault.
        """
        from penstock.devices.probe import measure
        from penstock.devices.threads import usable_cores
        from penstock.engine.report import RunReport

        seconds, joules, disk = self.stop()
        limits = limits or measure(options["threads"] or usable_cores(), device=engine.limits.device)
        report = RunReport.of(
            self._model,
            engine.current_stats(),
            self.stages,
            seconds,
            limits,
            limits.flops_of(engine.limits.weight_size),
            disk,
            joules,
        )
        print(report.text(), file=sys.stderr, flush=True)
        return report
