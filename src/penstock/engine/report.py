"""The run report: what a run did, how close it came to the machine's limits, and what held it back."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from penstock.devices.probe import MachineLimits
from penstock.engine.messages import Stage
from penstock.engine.output import EngineStats

_LOW = 0.3  # below such shares of both limits neither memory nor arithmetic is what a step waits for


class RunReport(msgspec.Struct, frozen=True):
    """One run of an engine. Seconds are wall-clock, rates are a second, shares are of the measured limits.

    seconds_by_stage: of the start, then the model's arithmetic in steps with prompt tokens and without, the rest of the
    steps (scheduling, sampling), and `outside`: no step was running.
    """

    model: str
    seconds: float
    seconds_by_stage: dict[str, float]
    prompt_tokens: int
    cached_prompt_tokens: int
    generated_tokens: int
    tokens_per_minute: float
    disk_bytes: int | None
    weight_bytes: float
    kv_bytes: float
    flops: float
    average_bytes_per_second: float
    peak_bytes_per_second: float
    average_flops_per_second: float
    peak_flops_per_second: float
    bytes_limit: float
    flops_limit: float
    bytes_share: float
    flops_share: float
    joules: float | None
    bottleneck: str

    @classmethod
    def of(
        cls,
        model: str,
        stats: EngineStats,
        stages: Sequence[Stage],
        seconds: float,
        limits: MachineLimits,
        flops_limit: float,
        disk: int | None,
        joules: float | None,
        serving: bool = False,
    ) -> RunReport:
        """stages: of the start; seconds: the whole run; serving: time outside of steps is waiting for clients."""
        totals = stats.totals
        started: dict[str, float] = {}
        for stage in stages:
            started[stage.name] = started.get(stage.name, 0.0) + stage.seconds
        steps = {"prompts": totals.prompt_seconds, "decoding": totals.decode_seconds, "choosing": totals.other_seconds}
        outside = max(0.0, seconds - sum(started.values()) - sum(steps.values()))
        busy = totals.prompt_seconds + totals.decode_seconds
        moved, computed = totals.work.bytes / busy if busy else 0.0, totals.flops / busy if busy else 0.0
        report = cls(
            model=model,
            seconds=seconds,
            seconds_by_stage={**started, **steps, "outside": outside},
            prompt_tokens=stats.prompt_tokens,
            cached_prompt_tokens=stats.cached_prompt_tokens,
            generated_tokens=stats.generated_tokens,
            tokens_per_minute=60 * (stats.prompt_tokens + stats.generated_tokens) / seconds if seconds else 0.0,
            disk_bytes=disk,
            weight_bytes=totals.weight_bytes,
            kv_bytes=totals.kv_bytes,
            flops=totals.flops,
            average_bytes_per_second=moved,
            peak_bytes_per_second=totals.peak_bytes_per_second,
            average_flops_per_second=computed,
            peak_flops_per_second=totals.peak_flops_per_second,
            bytes_limit=limits.read_bytes_per_second,
            flops_limit=flops_limit,
            bytes_share=moved / limits.read_bytes_per_second,
            flops_share=computed / flops_limit,
            joules=joules,
            bottleneck="",
        )
        python = totals.other_seconds + (0.0 if serving else outside)
        return msgspec.structs.replace(report, bottleneck=report._bottleneck(sum(started.values()), busy, python))

    def _bottleneck(self, start: float, busy: float, python: float) -> str:
        """One sentence. start, busy, python: seconds of the start, of the model's arithmetic, of everything else."""
        if not busy:
            return "Nothing was computed."
        if start > busy + python:
            read = f", of which {self.disk_bytes / 1e9:.2f} GB came from disk" if self.disk_bytes else ""
            place = "Disk" if self.disk_bytes and self.disk_bytes > 0.5e9 * start else "The start"
            return f"{place}: {start:.1f} of {self.seconds:.1f} s went into starting{read}; longer runs pay it once."
        if python > busy:
            return f"Python: {python:.1f} s went into scheduling, choosing and text, {busy:.1f} s into the model."
        if max(self.bytes_share, self.flops_share) < _LOW:
            return (
                f"Python and small operations: the model's steps reached {self.bytes_share:.0%} of the memory's "
                f"bandwidth and {self.flops_share:.0%} of the arithmetic; a larger batch or model would use more."
            )
        if self.bytes_share >= self.flops_share:
            return (
                f"Memory bandwidth: the steps moved {self.average_bytes_per_second / 1e9:.1f} GB/s, "
                f"{self.bytes_share:.0%} of what this machine reads; fewer bits a weight or more streams would help."
            )
        return (
            f"Compute: the steps did {self.average_flops_per_second / 1e12:.2f} TFLOP/s, "
            f"{self.flops_share:.0%} of what this machine multiplies in this format."
        )

    def text(self) -> str:
        """The report for people."""
        stages = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.seconds_by_stage.items())
        cached = f" (and {self.cached_prompt_tokens:,} from the prefix cache)" if self.cached_prompt_tokens else ""
        disk = "not told" if self.disk_bytes is None else f"{self.disk_bytes / 1e9:.3f} GB"
        energy = "not readable here" if self.joules is None else f"{self.joules:,.0f} J"
        if self.joules and self.generated_tokens:
            energy += f", {self.joules / self.generated_tokens:.3f} J for each generated token"
        average, peak = self.average_bytes_per_second / 1e9, self.peak_bytes_per_second / 1e9
        computed, most = self.average_flops_per_second / 1e12, self.peak_flops_per_second / 1e12
        lines = {
            "report": f"{self.model}, {self.seconds:.1f} s",
            "tokens": f"{self.prompt_tokens:,} in{cached}, {self.generated_tokens:,} out; "
            f"{self.tokens_per_minute:,.0f} tokens/min",
            "seconds": stages,
            "disk": f"{disk} read",
            "moved": f"{self.weight_bytes / 1e9:,.2f} GB of weights, {self.kv_bytes / 1e9:,.2f} GB of keys and values",
            "memory": f"{average:.2f} GB/s on average, {peak:.2f} at the peak; "
            f"{self.bytes_share:.0%} of {self.bytes_limit / 1e9:.1f} GB/s",
            "compute": f"{self.flops / 1e12:,.3f} TFLOP; {computed:.3f} TFLOP/s on average, {most:.3f} at the peak; "
            f"{self.flops_share:.0%} of {self.flops_limit / 1e12:.2f} TFLOP/s",
            "energy": energy,
            "bottleneck": self.bottleneck,
        }
        return "\n".join(f"{name:<10} {text}" for name, text in lines.items())
