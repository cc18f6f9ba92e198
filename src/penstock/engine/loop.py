"""The engine loop: requests in, one step at a time, tokens out. Runs in whatever process owns the model."""

from __future__ import annotations

import itertools
import logging
import secrets
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path

import torch
from torch import Tensor

from penstock.devices.cuda import choose_device
from penstock.engine import sampler
from penstock.engine.block_pool import BlockPool
from penstock.engine.config import EngineConfig
from penstock.engine.encoded_step import build_encoded_step
from penstock.engine.grammar import Cursor, Grammars
from penstock.engine.held import PATIENCE, HeldRows
from penstock.engine.images import Eyes, PromptImages
from penstock.engine.kv_type import check_device
from penstock.engine.limits import validate
from penstock.engine.load import LoadedModel
from penstock.engine.messages import Stage
from penstock.engine.open import open_model, runs_ahead
from penstock.engine.output import EngineStats, FinishReason, SequenceOutput, StepOutput, Token
from penstock.engine.prompt import Watch, is_broken, read_prompts, report
from penstock.engine.request import EngineRequest
from penstock.engine.sampler import BrokenScores, Watermark
from penstock.engine.scheduler import Run, Scheduler
from penstock.engine.sequence import Sequence
from penstock.engine.states import PromptStates
from penstock.engine.step import build_step
from penstock.errors import InvalidRequest, ModelError

log = logging.getLogger("penstock.engine")

_MAX_FAILURES = 3  # failed steps in a row before the engine gives up
_PATIENCE_SHARE = 0.2  # of a step's own time, which it may wait for late masks where that is more
_NAP = 0.01  # seconds to sleep where every sequence waits for its grammar
FAILED = "the model failed while computing this request"
_NOT_NUMBERS = "the model's scores are not numbers; are its weights damaged?"


class EngineLoop:
    """One model and the sequences that run on it. Not thread-safe: one thread calls everything."""

    def __init__(self, model: LoadedModel, config: EngineConfig) -> None:
        self.limits = model.limits
        start_id = model.limits.start_id
        self._start = None if start_id is None else (start_id, model.limits.block_size)
        self._prefix_caching = config.prefix_caching
        self._decoder, self._cache, self.cost = model.decoder, model.cache, model.cost
        self.adapters = model.adapters
        self._pool = BlockPool(model.limits.num_blocks, model.limits.block_size)
        self._scheduler = Scheduler(
            self._pool,
            model.limits.max_batch_prefill_tokens,
            model.limits.max_batch_size,
            self._prefix_caching,
        )
        self._watermark = Watermark(config.watermark_gamma, config.watermark_delta)
        self._sequences: dict[int, Sequence] = {}
        self._numbers = itertools.count()
        self._nonce = secrets.token_bytes(32)
        self._span_rope = model.decoder.span_rope
        self._eos = frozenset(model.limits.eos_ids)
        self._grammars = Grammars(
            Path(config.model_path), model.limits.vocab_size, model.limits.eos_ids, fresh=start_id is not None
        )
        self._beginning: dict[Sequence, Future[Cursor]] = {}  # sequences whose grammar is being made
        self._held = HeldRows()
        self._vision = model.vision
        self._eyes = None if model.tower is None else Eyes(model.tower)
        self._failures = 0
        self.stats = EngineStats(total_blocks=model.limits.num_blocks)

    @classmethod
    def load(cls, config: EngineConfig, on_stage: Callable[[Stage], None] = lambda stage: None) -> EngineLoop:
        """Load a model onto its device and run one token through it. Raises PenstockError."""
        device = choose_device(config.device)
        check_device(config, device)
        if device.type != "cpu" and runs_ahead(config):
            from penstock.engine.gpu import load_on_gpu

            return load_on_gpu(config, device, on_stage)
        loop = cls(open_model(config, on_stage, device), config)
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

    def prepare(self) -> bool:
        """Use a moment without requests for what will speed up later ones. Returns whether there is more of that."""
        return False

    def add(self, request: EngineRequest) -> None:
        """Queue a request. Raises InvalidRequest, and nothing else, for one that cannot run."""
        if request.id in self._sequences:
            raise InvalidRequest(f"a request with id {request.id} is already running")
        validate(request, self.limits)
        adapter = None if request.adapter is None else self.adapters.find(request.adapter)
        images = PromptImages(request, self._vision) if self._vision is not None and request.images else None
        whole = self._vision is not None and (self._vision.whole if request.images else self._vision.whole_text)
        sequence = Sequence.of(
            request,
            next(self._numbers),
            self._nonce,
            self._span_rope,
            self._eos,
            self._start,
            adapter,
            images,
            whole,
        )
        if request.embed is not None:
            sequence.states = PromptStates(request.embed, self.limits.num_layers)
        self._sequences[request.id] = sequence
        if request.grammar is None:
            self._scheduler.add(sequence)
        else:
            self._beginning[sequence] = self._grammars.begin(request.grammar.source)

    def abort(self, request_id: int) -> None:
        """Forget a request; one that is unknown or finished is fine."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return
        self._held.drop(sequence)
        beginning = self._beginning.pop(sequence, None)
        if beginning is None:
            self._scheduler.remove(sequence)
        else:
            beginning.cancel()

    def step(self) -> StepOutput:
        """Run one step and return what it made. Never raises for what one batch did; after three failed steps in a
        row it raises RuntimeError: the process is not healthy."""
        since = time.perf_counter()
        outputs = self._begin_grammars()
        runs = self._scheduler.next()
        self.stats.step_prompts = sum(run.sequence.computed < run.sequence.prompt_length for run in runs)
        self.stats.step_decodes = len(runs) - self.stats.step_prompts
        self.stats.model_seconds = 0.0
        try:
            outputs += self._compute(runs)
            self._failures = 0
        except Exception as error:
            self._failures += 1
            log.exception("a step of %d sequences failed", len(runs))
            hit = dict.fromkeys([run.sequence for run in runs] + self._held.sequences())
            outputs += [self._fail(s, FAILED) for s in hit if self._sequences.get(s.id) is s]
            if self._failures >= _MAX_FAILURES:
                raise RuntimeError(f"{_MAX_FAILURES} steps in a row failed") from error
        self.stats.steps += bool(runs)
        self.stats.step_seconds = time.perf_counter() - since
        if runs:
            self.stats.totals.other_seconds += self.stats.step_seconds - self.stats.model_seconds
        return StepOutput(outputs, self.current_stats())

    def current_stats(self) -> EngineStats:
        """The counters, with the gauges as they are now."""
        s = self.stats
        s.free_blocks, s.cached_blocks, s.used_blocks = self._pool.counts()
        s.running = len(self._scheduler.running)
        s.waiting = len(self._scheduler.waiting) + len(self._beginning)
        s.preemptions = self._scheduler.preemptions
        return s

    def _begin_grammars(self) -> list[SequenceOutput]:
        """Let the sequences wait for their turn whose grammar has been made, and end those whose grammar is no good."""
        outputs = []
        for sequence, future in [item for item in self._beginning.items() if item[1].done()]:
            try:
                sequence.cursor = future.result()
            except InvalidRequest as error:
                outputs.append(self._fail(sequence, error.what, invalid=True))
                continue
            del self._beginning[sequence]
            self._scheduler.add(sequence)
        return outputs

    @torch.inference_mode()
    def _compute(self, runs: list[Run]) -> list[SequenceOutput]:
        """One forward pass over the runs, and the next token of each that reaches its end."""
        since = time.perf_counter()
        ending: list[Sequence] = []
        logits: Tensor | None = None
        runs, outputs = self._see(runs)
        if runs:
            if self._start is None:
                step = build_step(runs, self._pool.block_size, self._span_rope is not None)
            else:
                step = build_encoded_step(runs, self._pool.block_size)
            watch = Watch(step)
            inputs = step.inputs.to(self._decoder.device)
            hidden = self._decoder.forward(inputs, self._cache, watch if watch else None)
            self.stats.forward_seconds = time.perf_counter() - since
            parts = read_prompts(step, hidden, self._decoder, watch)
            if step.ending:
                ending = [run.sequence for run in step.ending]
                last = hidden if len(ending) == len(hidden) else hidden[torch.tensor(step.ending_rows)]
                logits = self._decoder.logits(last).to("cpu")  # where such a loop chooses
            self._count(runs, len(ending), time.perf_counter() - since)
            outputs += [self._check_states(part) for part in parts]
            outputs += [self._end_prompt(run.sequence) for run in step.read]
        patience = max(PATIENCE, _PATIENCE_SHARE * (time.perf_counter() - since))
        chosen, logits = self._held.exchange(ending, logits, patience)
        if logits is not None:
            outputs += self._choose(chosen, logits)
        elif not runs:
            self._nap()
        return outputs

    def _see(self, runs: list[Run]) -> tuple[list[Run], list[SequenceOutput]]:
        """Let the tower see the images of which these runs compute rows. Returns the runs that can be computed, and
        the ends of those whose images cannot."""
        seen: list[Run] = []
        failed: list[SequenceOutput] = []
        for run in runs:
            sequence = run.sequence
            if sequence.images is not None and self._eyes is not None:
                try:
                    sequence.images.see(
                        sequence.computed, sequence.computed + run.length, self._eyes, sequence.request.salt
                    )
                except Exception:
                    log.exception("the vision tower failed")
                    failed.append(self._fail(sequence, "the model's vision tower cannot take this image"))
                    continue
            seen.append(run)
        return seen, failed

    def _count(self, runs: list[Run], scored: int, seconds: float) -> None:
        """The runs are computed, in so many seconds: their tokens count, their full blocks may be shared."""
        self.stats.model_seconds = seconds
        work = self.cost.step([(run.length, run.sequence.computed, run.sequence.encoded) for run in runs], scored)
        self.stats.totals.count(work, seconds, prompts=self.stats.step_prompts > 0)
        for run in runs:
            self.stats.prompt_tokens += max(0, min(run.length, run.sequence.prompt_length - run.sequence.computed))
            run.sequence.computed += run.length
            if self._prefix_caching:
                run.sequence.publish(self._pool)

    def _nap(self) -> None:
        """Nothing can be computed before a grammar is made or a mask is there."""
        if self._held:
            self._held.wait(_NAP)
        elif self._beginning:
            wait(self._beginning.values(), _NAP, FIRST_COMPLETED)

    def _check_states(self, output: SequenceOutput) -> SequenceOutput:
        """The states of a part of a prompt, or the error that they are none."""
        if not is_broken(output):
            return output
        sequence = self._sequences[output.id]
        self._clean(sequence)
        return self._fail(sequence, _NOT_NUMBERS)

    def _end_prompt(self, sequence: Sequence) -> SequenceOutput:
        """The one output of a request that generates nothing."""
        output = self._first_output(SequenceOutput(sequence.id, finish="length"), sequence)
        if is_broken(output):
            self._clean(sequence)
            return self._fail(sequence, _NOT_NUMBERS)
        self.abort(sequence.id)
        return output

    def _first_output(self, output: SequenceOutput, sequence: Sequence) -> SequenceOutput:
        if sequence.started is not None:
            output.queue_seconds = sequence.started - sequence.arrival
        output.cached_tokens = sequence.cached_tokens
        self.stats.cached_prompt_tokens += sequence.cached_tokens
        report(sequence, output)
        return output

    def _choose(self, sequences: list[Sequence], logits: Tensor) -> list[SequenceOutput]:
        """The next token of each sequence, with those that its grammar forces. logits: [n, vocab], a row each."""
        outputs = {s: SequenceOutput(s.id) for s in sequences}
        free = [i for i, s in enumerate(sequences) if s.cursor is None or not s.cursor.forced]
        tokens = sampler.choose(
            logits if len(free) == len(sequences) else logits[free], [sequences[i] for i in free], self._watermark
        )
        moves: list[tuple[Cursor, int]] = []
        for i, token in zip(free, tokens, strict=True):
            sequence = sequences[i]
            if isinstance(token, BrokenScores):
                outputs[sequence] = self._break(sequence)
                continue
            self._append(sequence, token, outputs[sequence])
            if sequence.cursor is not None and sequence.id in self._sequences:
                moves.append((sequence.cursor, token.id))
        for sequence in outputs if self._held else ():
            self._held.drop(sequence)
        self._follow(moves, outputs)
        return list(outputs.values())

    def _follow(self, moves: list[tuple[Cursor, int]], outputs: dict[Sequence, SequenceOutput]) -> None:
        """Let grammars take the tokens that were chosen; what they force behind these joins the outputs."""
        self._grammars.move(moves)
        for sequence, output in outputs.items():
            cursor = sequence.cursor
            if cursor is not None and cursor.ready() and cursor.forced:
                self._append_forced(sequence, cursor, output)

    def _append(self, sequence: Sequence, token: Token, output: SequenceOutput) -> None:
        """Append a token, and finish the sequence if it was the last."""
        sequence.ids.append(token.id)
        sequence.restart_beyond(self._span_rope, self._pool)
        output.tokens.append(token)
        if sequence.generated == 1:
            self._first_output(output, sequence)
        self.stats.generated_tokens += 1
        output.finish = self._finish_reason(sequence, token.id)
        if output.finish:
            self.abort(sequence.id)

    def _append_forced(self, sequence: Sequence, cursor: Cursor, output: SequenceOutput) -> None:
        """Append what the grammar leaves no choice about; that is certain, so its log-probability is 0."""
        forced, cursor.forced = cursor.forced, []
        request = sequence.request
        for token_id in forced:
            if output.finish:
                return
            top = [(token_id, 0.0)] if request.top_n_tokens else []
            self._append(sequence, Token(token_id, 0.0 if request.logprobs else None, top), output)

    def _break(self, sequence: Sequence) -> SequenceOutput:
        """End a sequence whose scores allow no token."""
        if sequence.cursor is not None and sequence.cursor.error is not None:
            return self._fail(sequence, sequence.cursor.error, invalid=True)
        self._clean(sequence)
        return self._fail(sequence, _NOT_NUMBERS)

    def _finish_reason(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        """Why the sequence ends with this token, in TGI's order: length goes before end of sequence. A stop id ends it
        as the end of sequence does, and so does the end of a grammar, whatever is ignored: nothing can follow."""
        if sequence.generated >= sequence.request.max_new_tokens:
            return "length"
        if token_id in sequence.ends or (sequence.cursor is not None and token_id in sequence.cursor.ends):
            return "eos_token"
        return None

    def _clean(self, sequence: Sequence) -> None:
        """Zero what a broken sequence left in its blocks: a NaN there would reach whoever gets them next, through the
        masked part of a product."""
        for block in self._pool.forget(sequence.blocks):
            for keys, values in self._cache:
                keys[block].zero_()
                values[block].zero_()

    def _fail(self, sequence: Sequence, text: str, invalid: bool = False) -> SequenceOutput:
        """End a sequence with an error. invalid: its own request is at fault."""
        self.abort(sequence.id)
        return SequenceOutput(sequence.id, finish="error", error=text, invalid=invalid)
