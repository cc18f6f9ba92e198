"""Steps on a device: their inputs, the model, the choice of tokens, and what comes back. Nothing here waits for it but
`Flight.wait`."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.engine.graphs import DecodeGraphs
from penstock.engine.output import SequenceOutput
from penstock.engine.prompt import Watch, read_prompts
from penstock.engine.rows import DeviceRows
from penstock.engine.sampler import draw_rule
from penstock.engine.scheduler import Run
from penstock.engine.sequence import Sequence
from penstock.engine.step import Step, row_adapters
from penstock.kernels.sampling import DrawRule, draw, largest
from penstock.models.decoder import Decoder
from penstock.models.inputs import KVCache


@dataclass(eq=False)
class Flight:
    """A step under way on the device.

    read: runs that reach the end of a prompt after which nothing is generated. near: sequences whose token the device
    chooses, and their rows in `chosen`; far: those whose token the host will choose, row i of `scores` for the i-th.
    chosen: [2, n] float64, tokens and their log-probabilities or scores; scores: [far, vocab]. Both are on the host,
    and hold nothing before `wait`. parts: of prompts that are read chunk by chunk.
    """

    runs: list[Run]
    read: list[Run]
    near: list[tuple[Sequence, int]]
    far: list[Sequence]
    chosen: Tensor | None
    scores: Tensor | None
    parts: list[SequenceOutput]
    began: torch.cuda.Event | None
    ended: torch.cuda.Event | None = None

    def wait(self) -> float | None:
        """Until the step is done. Returns the seconds that the device took; None where it has no clock."""
        if self.began is None or self.ended is None:
            return None
        self.ended.synchronize()
        return self.began.elapsed_time(self.ended) / 1000


class Runner:
    """A decoder on a device, its cache, and the rows of the sequences that run there.

    rows: sequences that run together; positions: of the longest; sizes: batches whose decoding is captured.
    """

    def __init__(
        self, decoder: Decoder, cache: KVCache, rows: int, positions: int, block_size: int, sizes: tuple[int, ...] = ()
    ) -> None:
        self.decoder, self.cache, self.device = decoder, cache, decoder.device
        self.on_gpu = self.device.type != "cpu"
        self.rows = DeviceRows(rows, -(-positions // block_size), block_size, self.device)
        self._with_spans = decoder.config.span_rope is not None
        capturable = self.on_gpu and decoder.config.experts is None and not self._with_spans
        self.graphs = DecodeGraphs(self._decode, self.rows, sizes if capturable else ())

    def launch(self, runs: list[Run], near: Set[Sequence], running: list[Sequence]) -> Flight:
        """Send a step on its way. near: sequences that reach their end and whose token the device may choose."""
        began = self._mark()
        runs = sorted(runs, key=lambda run: run.length > 1)
        lasts, row = [], -1
        for run in runs:
            row += run.length
            lasts.append(row)
        ends = [i for i, run in enumerate(runs) if run.reaches_end and run.sequence.request.max_new_tokens > 0]
        read = [run for run in runs if run.reaches_end and run.sequence.request.max_new_tokens == 0]
        alone = runs[0].sequence.request.deterministic
        single = runs[-1].length == 1 and not self._with_spans
        reading = any(run.sequence.reads_prompt for run in runs)
        parts: list[SequenceOutput] = []
        adapters = row_adapters(runs, self.device)
        usual = single and not reading and not alone and adapters is None
        size = self.graphs.size_for(len(runs)) if usual else None
        if size is not None:
            places = ends
            logits, values, ids = self.graphs.replay(size, self.rows.pack(runs, running, padded=size))
        else:
            whole = reading or len(ends) == lasts[-1] + 1
            packed = self.rows.pack(runs, running, None if whole else [(lasts[i], i) for i in ends], self._with_spans)
            received = self.rows.receive(packed)
            inputs = self.rows.mixed(packed, received, alone, adapters)
            places = [lasts[i] for i in ends] if whole else list(range(len(ends)))
            firsts = [last + 1 - run.length for run, last in zip(runs, lasts, strict=True)]
            step = Step(runs, inputs, firsts, [runs[i] for i in ends], places, read)
            watch = Watch(step)
            hidden = self.decoder.forward(inputs, self.cache, watch if watch else None)
            parts = read_prompts(step, hidden, self.decoder, watch)
            if not ends:
                return Flight(runs, read, [], [], None, None, parts, began, self._mark())
            index = received[1]
            if len(ends) < len(hidden):
                hidden = hidden[self._sent(places)]
            if len(ends) < len(runs):
                index = index[self._sent(ends)]
            logits, values, ids = self._best(self.decoder.logits(hidden), index)
            places = list(range(len(ends)))
        sequences = [runs[i].sequence for i in ends]
        chosen = [(s, place) for s, place in zip(sequences, places, strict=True) if s in near]
        left = [(s, place) for s, place in zip(sequences, places, strict=True) if s not in near]
        values, ids = self._choose(logits, values, ids, chosen)
        return Flight(
            runs,
            read,
            chosen,
            [s for s, _place in left],
            self._home(torch.stack((ids.double(), values.double()))) if chosen else None,
            self._home(logits[self._sent([place for _s, place in left])]) if left else None,
            parts,
            began,
            self._mark(),
        )

    def _decode(self, ids: Tensor, index: Tensor, contexts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The step of decoding that is captured. ids, index (of rows), contexts: [n]."""
        inputs = self.rows.decoding(ids, index, contexts)
        return self._best(self.decoder.logits(self.decoder.forward(inputs, self.cache)), index)

    def _best(self, logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The scores, the largest of each row and its token, which becomes the last one of the row's sequence."""
        values, ids = largest(logits)
        self.rows.tokens.index_copy_(0, index, ids)
        return logits, values.float(), ids

    def _choose(
        self, logits: Tensor, values: Tensor, ids: Tensor, near: list[tuple[Sequence, int]]
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities where they are asked for, and draws in place of the likeliest tokens.

        logits: [n, vocab]; values, ids: [n]; near: sequences and their places -> values, ids.
        """
        told = [place for s, place in near if s.request.logprobs and not s.request.sampling.draws]
        drawn = [(s, place) for s, place in near if s.request.sampling.draws]
        if told:
            at = self._sent(told)
            values = values.index_copy(0, at, chosen_logprobs(logits[at], ids[at]))
        if drawn:
            at = self._sent([place for _s, place in drawn])
            tokens, logprobs = self._draw(logits[at], [draw_rule(s) for s, _place in drawn])
            values, ids = values.index_copy(0, at, logprobs), ids.index_copy(0, at, tokens)
            rows = self._sent([self.rows.index_of(s) for s, _place in drawn])
            self.rows.tokens.index_copy_(0, rows, tokens)
        return values, ids

    def _draw(self, scores: Tensor, rules: list[DrawRule]) -> tuple[Tensor, Tensor]:
        """A token of each row and its log-probability. scores: [n, vocab]"""
        if not self.on_gpu:
            return draw(scores.float(), rules)
        from penstock.kernels.triton import sampler

        table = torch.tensor([tuple(rule) for rule in rules], dtype=torch.float64, pin_memory=True)
        temperature, top_p, min_p, top_k, at = table.to(self.device, non_blocking=True).unbind(1)
        return sampler.draw(
            scores,
            sampler.SamplerRules(
                temperature=temperature.float(),
                top_k=top_k.int(),
                top_p=top_p.float(),
                typical_p=torch.ones_like(top_p, dtype=torch.float32),
                min_p=min_p.float(),
                at=at.contiguous(),
            ),
        )

    def _sent(self, numbers: list[int]) -> Tensor:
        """Numbers on the device, int64."""
        return torch.tensor(numbers, dtype=torch.int64, pin_memory=self.on_gpu).to(self.device, non_blocking=True)

    def _home(self, x: Tensor) -> Tensor:
        """x on the host, once the step is done. Its memory is fresh: what was sent before may be read still."""
        if not self.on_gpu:
            return x
        return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)

    def _mark(self) -> torch.cuda.Event | None:
        """A point in the device's work."""
        if not self.on_gpu:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def chosen_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities of one token of each row. logits: [n, vocab]; ids: [n] -> [n] float32."""
    if logits.is_cuda:
        from penstock.kernels.triton import penalties

        return penalties.chosen_logprobs(logits, ids)
    scores = logits.float()
    logprobs = scores - torch.logsumexp(scores, dim=-1, keepdim=True)
    return logprobs.gather(1, ids.unsqueeze(1)).squeeze(1)
