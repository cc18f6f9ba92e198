"""What Prometheus sees: TGI's names, and ours."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from penstock.server import journal
from penstock.server.timings import Timings

if TYPE_CHECKING:
    from penstock.engine.client import EngineClient
    from penstock.engine.limits import Limits
    from penstock.engine.output import EngineStats

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
DURATIONS = [0.0001 * 1.5**n for n in range(1, 36)]  # TGI's buckets, seconds
# TGI's counters have no `_total` at their end; the client library insists on one.
_TOTAL = re.compile(rb"^((?:# (?:HELP|TYPE) )?tgi_\w+?)_total\b", re.MULTILINE)


def _lengths(largest: int) -> list[float]:
    return [largest * n / 100 for n in range(1, 101)]


class Metrics:
    """Counts what happens to requests. Times are seconds."""

    def __init__(self, limits: Limits, engine: EngineClient) -> None:
        disable_created_metrics()
        registry = self._registry = CollectorRegistry()
        registry.register(_Engine(engine, lambda: self._finished))
        self._finished = 0

        def histogram(name: str, text: str, buckets: list[float]) -> Histogram:
            return Histogram(name, text, registry=registry, buckets=buckets)

        durations, totals = DURATIONS, _lengths(limits.max_total_tokens)
        self.requests = Counter("tgi_request_count", "Generations asked for", registry=registry)
        self._success = Counter("tgi_request_success", "Generations completed", registry=registry)
        self._failure = Counter("tgi_request_failure", "Generations that failed", ["err"], registry=registry)
        self._duration = histogram("tgi_request_duration", "Whole time of a request", durations)
        self._validation = histogram("tgi_request_validation_duration", "Time until it is queued", durations)
        self._queue = histogram("tgi_request_queue_duration", "Time in the queue", durations)
        self._inference = histogram("tgi_request_inference_duration", "Time from the queue to the end", durations)
        self._per_token = histogram(
            "tgi_request_mean_time_per_token_duration", "Inference time per generated token", durations
        )
        self._input = histogram("tgi_request_input_length", "Prompt tokens", _lengths(max(limits.max_input_tokens, 1)))
        self._generated = histogram("tgi_request_generated_tokens", "Generated tokens", totals)
        self._wanted = histogram("tgi_request_max_new_tokens", "Tokens asked for", totals)
        self._first = histogram("penstock_time_to_first_token_seconds", "From arrival to first token", durations)
        self._next = histogram("penstock_inter_token_seconds", "Between two tokens of a request", durations)
        self._batch = _Batches(registry, histogram)
        engine.on_step = self._batch.step
        self.connections = Gauge("penstock_requests_in_flight", "Requests being answered", registry=registry)

    def failed(self, cause: str) -> None:
        """A generation ended without an answer; cause is one of TGI's labels."""
        self._failure.labels(cause).inc()

    def submitted(self, prompt_tokens: int, max_new_tokens: int) -> None:
        """A request goes to the engine."""
        journal.submitted(prompt_tokens)
        self._input.observe(prompt_tokens)
        self._wanted.observe(max_new_tokens)

    def first_token(self, seconds: float) -> None:
        """Since the request's arrival."""
        self._first.observe(seconds)

    def next_tokens(self, seconds: float, count: int) -> None:
        """So many tokens came together, so long after the ones before."""
        for _ in range(count):
            self._next.observe(seconds / count)

    def finished(self, timings: Timings, generated_tokens: int) -> None:
        """A generation is complete."""
        journal.finished(timings, generated_tokens)
        now = time.monotonic()
        submitted = timings.submitted or now
        started = timings.started or submitted
        self._finished += 1
        self._success.inc()
        self._duration.observe(now - timings.arrived)
        self._validation.observe(submitted - timings.arrived)
        self._queue.observe(started - submitted)
        self._inference.observe(now - started)
        self._per_token.observe((now - started) / max(generated_tokens, 1))
        self._generated.observe(generated_tokens)

    def exposition(self) -> bytes:
        """The text that GET /metrics answers."""
        return _TOTAL.sub(rb"\1", generate_latest(self._registry))


class _Batches:
    """TGI's series of batches. A step that computes prompts is a prefill, also when others decode in it."""

    def __init__(self, registry: CollectorRegistry, histogram: Callable[..., Histogram]) -> None:
        def counter(name: str, text: str, label: str) -> Counter:
            return Counter(f"tgi_batch_{name}", text, [label], registry=registry)

        def durations(name: str, text: str) -> Histogram:
            return Histogram(f"tgi_batch_{name}", text, ["method"], registry=registry, buckets=DURATIONS)

        self._count = counter("inference_count", "Steps", "method")
        self._success = counter("inference_success", "Steps that gave results", "method")
        self._failure = counter("inference_failure", "Steps that failed", "method")
        self._inference = durations("inference_duration", "Whole time of a step")
        self._forward = durations("forward_duration", "The model's part of a step")
        self._decode = durations("decode_duration", "Choosing tokens")
        self._filter = durations("filter_duration", "Handing out the results of a step")
        self._concat = counter("concat", "Prompts that joined running requests", "reason")
        self._concat_duration = durations("concat_duration", "Time to let a prompt join: none, the step takes it in")
        self._next = histogram(
            "tgi_batch_next_size", "Prompts that a step computes", [float(n) for n in range(1, 1025)]
        )

    def step(self, stats: EngineStats, failed: bool, handing_out: float) -> None:
        """Count one step; times are seconds."""
        method = "prefill" if stats.step_prompts else "decode"
        self._count.labels(method).inc()
        (self._failure if failed else self._success).labels(method).inc()
        self._inference.labels(method).observe(stats.step_seconds)
        self._forward.labels(method).observe(stats.forward_seconds)
        self._decode.labels(method).observe(max(stats.step_seconds - stats.forward_seconds, 0))
        self._filter.labels(method).observe(handing_out)
        if stats.step_prompts:
            self._next.observe(stats.step_prompts)
            if stats.step_decodes:
                self._concat.labels("chunking").inc()
                self._concat_duration.labels("decode").observe(0)


class _Engine(Collector):
    """The engine's own counters, read when somebody asks."""

    def __init__(self, engine: EngineClient, finished: Callable[[], int]) -> None:
        self._engine, self._finished = engine, finished

    def collect(self) -> Iterable[Metric]:
        stats = self._engine.stats
        yield GaugeMetricFamily("tgi_queue_size", "Requests waiting", value=stats.waiting)
        yield GaugeMetricFamily("tgi_batch_current_size", "Requests running", value=stats.running)
        skipped = Metric("tgi_request_skipped_tokens", "Speculated tokens accepted: there is no speculation", "summary")
        for quantile in ("0", "0.5", "0.9", "0.95", "0.99", "0.999", "1"):
            skipped.add_sample(skipped.name, {"quantile": quantile}, 0)
        skipped.add_sample(f"{skipped.name}_sum", {}, 0)
        skipped.add_sample(f"{skipped.name}_count", {}, self._finished())
        yield skipped
        held = stats.used_blocks * self._engine.limits.block_size
        yield GaugeMetricFamily("tgi_batch_current_max_tokens", "Tokens of KV memory that requests hold", value=held)
        blocks = GaugeMetricFamily("penstock_kv_blocks", "Blocks of the KV cache", labels=["state"])
        blocks.add_metric(["free"], stats.free_blocks)
        blocks.add_metric(["cached"], stats.cached_blocks)
        blocks.add_metric(["used"], stats.used_blocks)
        yield blocks
        used = stats.used_blocks / stats.total_blocks if stats.total_blocks else 0.0
        yield GaugeMetricFamily("penstock_kv_used_ratio", "Share of the KV cache that requests hold", value=used)
        seen = stats.cached_prompt_tokens + stats.prompt_tokens  # the second are those that were computed
        hits = stats.cached_prompt_tokens / seen if seen else 0.0
        yield GaugeMetricFamily("penstock_prefix_hit_ratio", "Share of prompt tokens found in the cache", value=hits)
        yield GaugeMetricFamily("penstock_kv_blocks_capacity", "All blocks", value=stats.total_blocks)
        yield GaugeMetricFamily("penstock_engine_healthy", "1 while it runs", value=int(self._engine.healthy))
        size = self._engine.limits.weight_size
        yield GaugeMetricFamily("penstock_weight_size_bytes", "Bytes of a stored weight", value=size)
        yield GaugeMetricFamily("penstock_step_seconds", "The last step", value=stats.step_seconds)
        for name, text, value in (
            ("steps", "Engine steps", stats.steps),
            ("prompt_tokens", "Prompt tokens seen", stats.prompt_tokens),
            ("prefix_hit_tokens", "Prompt tokens found in the prefix cache", stats.cached_prompt_tokens),
            ("generated_tokens", "Tokens generated", stats.generated_tokens),
            ("weight_bytes", "Bytes of weights that the steps read", stats.totals.weight_bytes),
            ("kv_bytes", "Bytes of keys and values that the steps moved", stats.totals.kv_bytes),
            ("flops", "Floating-point operations of the steps", stats.totals.flops),
            ("preemptions", "Requests put back for lack of KV blocks", stats.preemptions),
            ("engine_restarts", "Restarts after a crash", self._engine.restarts),
        ):
            yield CounterMetricFamily(f"penstock_{name}", text, value=value)
