"""The engine loop: requests in, one step at a time, tokens out. Runs in whatever process owns the model."""

from __future__ import annotations

import itertools
import logging
import secrets
import time
from collections.abc import Callable

import torch

from penstock.engine import sampler
from penstock.engine.block_pool import BlockPool
from penstock.engine.config import EngineConfig
from penstock.engine.load import HEAD_ROWS, LoadedModel, load_model
from penstock.engine.request import (
    EngineRequest,
    EngineStats,
    FinishReason,
    SequenceOutput,
    Stage,
    StepOutput,
    Token,
    validate,
)
from penstock.engine.sampler import BrokenScores, Watermark
from penstock.engine.scheduler import Run, Scheduler
from penstock.engine.sequence import Sequence
from penstock.engine.step import Step, build_step
from penstock.errors import InvalidRequest, ModelError

log = logging.getLogger("penstock.engine")

_MAX_FAILURES = 3  # failed steps in a row before the engine gives up


class EngineLoop:
    """One model and the sequences that run on it. Not thread-safe: one thread calls everything."""

    def __init__(self, model: LoadedModel, config: EngineConfig) -> None:
        self.limits = model.limits
        self._decoder, self._cache = model.decoder, model.cache
        self._pool = BlockPool(model.limits.num_blocks, model.limits.block_size)
        self._scheduler = Scheduler(
            self._pool,
            model.limits.max_batch_prefill_tokens,
            model.limits.max_batch_size,
            config.prefix_caching,
        )
        self._prefix_caching = config.prefix_caching
        self._watermark = Watermark(config.watermark_gamma, config.watermark_delta)
        self._sequences: dict[int, Sequence] = {}
        self._numbers = itertools.count()
        self._nonce = secrets.token_bytes(32)
        self._dynamic_rope = model.decoder.config.rope.kind == "dynamic"
        self._eos = frozenset(model.limits.eos_ids)
        self._failures = 0
        self.stats = EngineStats(total_blocks=model.limits.num_blocks)

    @classmethod
    def load(cls, config: EngineConfig, on_stage: Callable[[Stage], None] = lambda stage: None) -> EngineLoop:
        """Load a model and run one token through it. Raises PenstockError."""
        loop = cls(load_model(config, on_stage), config)
        since = time.perf_counter()
        loop.warm()
        on_stage(Stage("warm", "one token", time.perf_counter() - since))
        return loop

    def warm(self) -> None:
        """One greedy token, so that a model that cannot compute is refused now and the first request pays for no first
        use. Raises ModelError."""
        self.add(EngineRequest(id=-1, prompt_ids=[0], max_new_tokens=1, logprobs=True))
        while self.has_work:
            for output in self.step().outputs:
                if output.error is not None:
                    raise ModelError("the model does not compute", output.error, "download the model again")
        self.stats = EngineStats(total_blocks=self.limits.num_blocks)

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    def add(self, request: EngineRequest) -> None:
        """Queue a request. Raises InvalidRequest, and nothing else, for one that cannot run."""
        if request.id in self._sequences:
            raise InvalidRequest(f"a request with id {request.id} is already running")
        validate(request, self.limits)
        rope = self._decoder.config.rope
        span_limit = rope.original_max_positions if self._dynamic_rope else None
        sequence = Sequence.of(request, next(self._numbers), self._nonce, span_limit)
        self._sequences[request.id] = sequence
        self._scheduler.add(sequence)

    def abort(self, request_id: int) -> None:
        """Forget a request; one that is unknown or finished is fine."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            self._scheduler.remove(sequence)

    def step(self) -> StepOutput:
        """Run one step and return what it made. Never raises for what one batch did; after three failed steps in a
        row it raises RuntimeError: the process is not healthy."""
        since = time.perf_counter()
        runs = self._scheduler.next()
        try:
            outputs = self._compute(runs)
            self._failures = 0
        except Exception as error:
            self._failures += 1
            log.exception("a step of %d sequences failed", len(runs))
            outputs = [self._fail(run.sequence, "the model failed while computing this request") for run in runs]
            if self._failures >= _MAX_FAILURES:
                raise RuntimeError(f"{_MAX_FAILURES} steps in a row failed") from error
        self.stats.steps += 1
        self.stats.step_seconds = time.perf_counter() - since
        return StepOutput(outputs, self.current_stats())

    def current_stats(self) -> EngineStats:
        """The counters, with the gauges as they are now."""
        s = self.stats
        s.free_blocks, s.cached_blocks, s.used_blocks = self._pool.counts()
        s.running, s.waiting = len(self._scheduler.running), len(self._scheduler.waiting)
        s.preemptions = self._scheduler.preemptions
        return s

    @torch.inference_mode()
    def _compute(self, runs: list[Run]) -> list[SequenceOutput]:
        """One forward pass over the runs, and the next token of each that reaches its end."""
        if not runs:
            return []
        step = build_step(runs, self._pool.block_size, self._dynamic_rope)
        hidden = self._decoder.forward(step.inputs, self._cache)
        self._score_prompts(step, hidden)
        tokens: list[Token | BrokenScores] = []
        if step.ending:
            logits = self._decoder.logits(hidden[step.ending_rows])
            tokens = sampler.choose(logits, [run.sequence for run in step.ending], self._watermark)
        for run in step.runs:
            self.stats.prompt_tokens += max(0, min(run.length, run.sequence.prompt_length - run.sequence.computed))
            run.sequence.computed += run.length
            if self._prefix_caching:
                run.sequence.publish(self._pool)
        return [self._advance(run.sequence, token) for run, token in zip(step.ending, tokens, strict=True)]

    def _score_prompts(self, step: Step, hidden: torch.Tensor) -> None:
        """Log-probabilities of prompt tokens, for the runs whose requests ask."""
        for run, last in zip(step.runs, step.last_rows, strict=True):
            sequence = run.sequence
            if not sequence.request.prompt_logprobs:
                continue
            start = sequence.computed
            stop = min(start + run.length, sequence.prompt_length - 1)  # row i scores token i + 1
            known = sequence.prompt_logprobs
            if not known:
                known.append(None)  # nothing precedes the first token
            for a in range(max(start, len(known) - 1), stop, HEAD_ROWS):
                b = min(a + HEAD_ROWS, stop)
                first = last - run.length + 1 + a - start
                logits = self._decoder.logits(hidden[first : first + b - a])
                known += sampler.prompt_logprobs(logits, torch.tensor(sequence.ids[a + 1 : b + 1]))

    def _advance(self, sequence: Sequence, token: Token | BrokenScores) -> SequenceOutput:
        """Append a chosen token, and finish the sequence if it was the last."""
        if isinstance(token, BrokenScores):
            self._clean(sequence)
            return self._fail(sequence, "the model's scores are not numbers; are its weights damaged?")
        sequence.ids.append(token.id)
        output = SequenceOutput(sequence.id, [token])
        if sequence.generated == 1 and sequence.started is not None:
            output.queue_seconds = sequence.started - sequence.arrival
            output.cached_tokens = sequence.cached_tokens
            output.prompt_logprobs = sequence.prompt_logprobs or None
            self.stats.cached_prompt_tokens += sequence.cached_tokens
        self.stats.generated_tokens += 1
        output.finish = self._finish_reason(sequence, token.id)
        if output.finish:
            self.abort(sequence.id)
        return output

    def _finish_reason(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        """Why the sequence ends with this token, in TGI's order: length goes before end of sequence."""
        if sequence.generated >= sequence.request.max_new_tokens:
            return "length"
        if token_id in self._eos and not sequence.request.ignore_eos:
            return "eos_token"
        return None

    def _clean(self, sequence: Sequence) -> None:
        """Zero what a broken sequence left in its blocks: a NaN there would reach whoever gets them next, through the
        masked part of a product."""
        for block in self._pool.forget(sequence.blocks):
            for keys, values in self._cache:
                keys[:, block] = 0
                values[:, block] = 0

    def _fail(self, sequence: Sequence, text: str) -> SequenceOutput:
        self.abort(sequence.id)
        return SequenceOutput(sequence.id, finish="error", error=text)
