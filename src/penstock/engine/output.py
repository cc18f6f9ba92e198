"""What the engine's steps make, and what they took."""

from __future__ import annotations

from typing import Literal

import msgspec

from penstock.plan.work import Work

FinishReason = Literal["length", "eos_token", "stop_sequence", "aborted", "error"]


class Token(msgspec.Struct, frozen=True, array_like=True):
    """One generated token. `top` are (id, logprob) of the likeliest alternatives, best first."""

    id: int
    logprob: float | None = None
    top: list[tuple[int, float]] = []


class SequenceOutput(msgspec.Struct, omit_defaults=True):
    """What one step made for one request.

    `finish` is set on the last output of a request. The first output carries the prompt's share: log-probabilities
    (the first is None: nothing precedes it), how many tokens came from the prefix cache, and the seconds in the queue.
    `error` is our own text for a client; it never holds a traceback.

    embedding: float32 as it lies in memory, [layers, tokens, hidden], tokens being 1 where they are pooled. Where they
    are not, each output has those of the next positions, and several may come before the first token.
    """

    id: int
    tokens: list[Token] = []
    finish: FinishReason | None = None
    prompt_logprobs: list[float | None] | None = None
    prompt_top: list[list[tuple[int, float]]] | None = None  # as Token.top; empty for the first
    embedding: bytes | None = None
    cached_tokens: int = 0
    queue_seconds: float | None = None
    error: str | None = None
    invalid: bool = False  # the error is the request's own fault (422 rather than 424)


class Totals(msgspec.Struct, omit_defaults=True):
    """What all steps together took and did. The seconds are of the model's arithmetic in steps with prompt tokens and
    in those without, and of everything else in a step: scheduling, sampling. The peaks are of single steps."""

    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0
    other_seconds: float = 0.0
    weight_bytes: float = 0.0
    kv_bytes: float = 0.0
    flops: float = 0.0
    peak_bytes_per_second: float = 0.0
    peak_flops_per_second: float = 0.0

    def count(self, work: Work, model_seconds: float, prompts: bool) -> None:
        """Add one step."""
        if prompts:
            self.prompt_seconds += model_seconds
        else:
            self.decode_seconds += model_seconds
        self.weight_bytes += work.weight_bytes
        self.kv_bytes += work.kv_bytes
        self.flops += work.flops
        if model_seconds > 0:
            self.peak_bytes_per_second = max(self.peak_bytes_per_second, work.bytes / model_seconds)
            self.peak_flops_per_second = max(self.peak_flops_per_second, work.flops / model_seconds)

    @property
    def work(self) -> Work:
        return Work(self.weight_bytes, self.kv_bytes, self.flops)


class EngineStats(msgspec.Struct, omit_defaults=True):
    """Counters and gauges of the engine, sent with each step."""

    running: int = 0
    waiting: int = 0
    free_blocks: int = 0
    cached_blocks: int = 0
    used_blocks: int = 0
    total_blocks: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    step_seconds: float = 0.0  # of the last step; and so are the rest
    forward_seconds: float = 0.0  # the model's part of it
    model_seconds: float = 0.0  # forward_seconds and the output matrix
    step_prompts: int = 0  # sequences that computed tokens of their prompts
    step_decodes: int = 0  # sequences that only computed their latest token
    totals: Totals = msgspec.field(default_factory=Totals)


class StepOutput(msgspec.Struct, tag="step"):
    """Everything that one step made, all sequences in one message."""

    outputs: list[SequenceOutput]
    stats: EngineStats
