"""The engine loop of a GPU: the next step is on its way before the results of this one are read.

A step's results come back while the next one runs, so the device never waits for the host. A token that the device has
chosen is the next step's input there; here it is only counted (`Sequence.ahead`) until it is known. What follows from
that is small: a sequence that ends with a token is computed once more, and that is dropped. Where the host must know a
token before it can go on, the sequence sits out one step; others go on. That is so with a grammar, whose next mask
follows from the token, and where the host itself chooses: alternatives, a watermark, a grammar whose mask is late.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from penstock.engine.config import EngineConfig
from penstock.engine.grammar import Cursor
from penstock.engine.held import PATIENCE
from penstock.engine.load import LoadedModel
from penstock.engine.loop import FAILED, EngineLoop
from penstock.engine.output import SequenceOutput, Token
from penstock.engine.runner import Flight, Runner
from penstock.engine.scheduler import Run
from penstock.engine.sequence import Sequence
from penstock.models.decoder import Decoder
from penstock.plan.work import Work

_NOTHING = float("-inf")


@dataclass(frozen=True)
class _UnderWay:
    """A launched step and what its results are counted with. ahead: sequences that went on without knowing their token;
    lengths: tokens before the one that each gets; host_seconds: what it took where the host computes."""

    flight: Flight
    work: Work
    prompts: bool
    ahead: set[Sequence]
    lengths: dict[Sequence, int]
    host_seconds: float | None


class AheadLoop(EngineLoop):
    """One model and the sequences that run on it, one step ahead of what is known. Not thread-safe."""

    def __init__(self, model: LoadedModel, config: EngineConfig) -> None:
        super().__init__(model, config)
        limits = model.limits
        self._runner = Runner(
            cast(Decoder, model.decoder),
            model.cache,
            limits.max_batch_size,
            limits.max_total_tokens,
            limits.block_size,
            config.cuda_graphs,
        )
        self._under_way: _UnderWay | None = None
        self._rescued: list[SequenceOutput] = []  # of a step that failed later on

    @property
    def has_work(self) -> bool:
        return bool(self._sequences or self._rescued)

    def prepare(self) -> bool:
        """Capture one more step of decoding."""
        with torch.inference_mode():
            return self._runner.graphs.capture_next()

    def abort(self, request_id: int) -> None:
        """Forget a request; what the device still computes for it is dropped when it comes."""
        sequence = self._sequences.get(request_id)
        super().abort(request_id)
        if sequence is not None:
            self._runner.forget(sequence)

    @torch.inference_mode()
    def _compute(self, runs: list[Run]) -> list[SequenceOutput]:
        """Launch a step, then read the one before it. What one of the two made goes out later if the other fails."""
        before, self._under_way = self._under_way, None
        outputs, self._rescued = self._rescued, []
        failure: Exception | None = None
        if runs:
            try:
                outputs += self._launch(runs)
            except Exception as error:  # the step before is not to blame
                failure = error
        try:
            outputs += self._land(before)
        except Exception:
            lost = [] if before is None else [*(s for s, _place in before.flight.near), *before.flight.far]
            self._rescued = outputs + [self._fail(s, FAILED) for s in lost if self._has(s)]
            raise
        if failure is not None:
            self._rescued = outputs
            raise failure
        return outputs

    def _launch(self, runs: list[Run]) -> list[SequenceOutput]:
        """Send a step on its way. Its tokens count as computed: whatever comes later on the device finds them there."""
        since = time.perf_counter()
        flight = self._runner.launch(runs, self._scheduler.running)
        if self._held:  # their scores are computed anew, after a preemption
            for run in runs:
                self._held.drop(run.sequence)
        work = self.cost.step(
            [(run.length, run.sequence.computed, 0) for run in runs], len(flight.near) + len(flight.far)
        )
        for run in runs:
            s = run.sequence
            self.stats.prompt_tokens += max(0, min(run.length, s.prompt_length - s.computed))
            self._publish(s)  # what the steps before this one computed; its own last token may not be known
            s.computed += run.length
        lengths = {s: len(s.ids) + s.ahead for s in (*(s for s, _place in flight.near), *flight.far)}
        ahead = {s for s, _place in flight.near if self._goes_on(s)}
        for s in ahead:
            s.ahead += 1
        host_seconds = None if self._runner.on_gpu else time.perf_counter() - since
        self._under_way = _UnderWay(flight, work, self.stats.step_prompts > 0, ahead, lengths, host_seconds)
        outputs = [self._check_states(part) for part in flight.parts]
        return outputs + [self._end_prompt(run.sequence) for run in flight.read if self._has(run.sequence)]

    def _land(self, step: _UnderWay | None) -> list[SequenceOutput]:
        """What a step made, once it is done, and the choices that are the host's."""
        outputs: list[SequenceOutput] = []
        sequences: list[Sequence] = []
        logits: Tensor | None = None
        if step is not None:
            seconds = step.host_seconds or step.flight.wait() or 0.0
            self.stats.forward_seconds = self.stats.model_seconds = seconds
            self.stats.totals.count(step.work, seconds, step.prompts)
            outputs = self._take(step)
            left = [i for i, s in enumerate(step.flight.far) if self._wants(s, step)]
            sequences = [step.flight.far[i] for i in left]
            for s in sequences:
                self._publish(s)
            if step.flight.scores is not None and left:
                logits = step.flight.scores[left]
        chosen, logits = self._held.exchange(sequences, logits, PATIENCE)
        if logits is not None:
            outputs += self._choose(chosen, logits)
        elif step is None and self._under_way is None:
            self._nap()
        return outputs

    def _take(self, step: _UnderWay) -> list[SequenceOutput]:
        """The tokens that the device chose."""
        outputs: dict[Sequence, SequenceOutput] = {}
        flight = step.flight
        if flight.chosen is None:
            return []
        ids, values = flight.chosen.tolist()
        moves: list[tuple[Cursor, int]] = []
        for s, place in flight.near:
            if not self._wants(s, step):
                continue
            if s in step.ahead:
                s.ahead -= 1
            else:
                self._publish(s)
            output = SequenceOutput(s.id)
            if values[place] > _NOTHING:
                token = Token(int(ids[place]), values[place] if s.request.logprobs else None)
                self._append(s, token, output)
                if s.cursor is not None and self._has(s):
                    moves.append((s.cursor, token.id))
            else:
                output = self._break(s)
            outputs[s] = output
        self._follow(moves, outputs)
        return list(outputs.values())

    def _has(self, sequence: Sequence) -> bool:
        """Whether a sequence is still wanted."""
        return self._sequences.get(sequence.id) is sequence

    def _wants(self, sequence: Sequence, step: _UnderWay) -> bool:
        """Whether what a step made for a sequence is still wanted: not where it ended with the token before, was
        aborted, or was preempted and computed again before it got the very token."""
        return self._has(sequence) and len(sequence.ids) == step.lengths[sequence]

    def _publish(self, sequence: Sequence) -> None:
        """Offer the blocks whose tokens are all known to the prefix index."""
        if self._prefix_caching and sequence.computed <= len(sequence.ids):
            sequence.publish(self._pool)

    def _goes_on(self, sequence: Sequence) -> bool:
        """Whether a sequence goes on behind the token that is chosen now before the host knows it. What a grammar
        allows next depends on that."""
        return sequence.cursor is None and sequence.generated + sequence.ahead + 1 < sequence.request.max_new_tokens
