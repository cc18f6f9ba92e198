"""Steps on a device: their inputs, the model, the choice of tokens, and what comes back. Nothing here waits for it but
`Flight.wait`."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.engine.chooser import Chooser
from penstock.engine.graphs import DecodeGraphs
from penstock.engine.held import PATIENCE
from penstock.engine.output import SequenceOutput
from penstock.engine.prompt import Watch, read_prompts
from penstock.engine.rows import DeviceRows
from penstock.engine.scheduler import Run
from penstock.engine.sequence import Sequence
from penstock.engine.step import Step, row_adapters
from penstock.kernels.sampling import largest
from penstock.models.decoder import Decoder
from penstock.models.inputs import KVCache
from penstock.models.lora import Adapter, RowAdapters


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
        self.chooser = Chooser(self.rows, decoder.config.vocab_size)
        self._with_spans = decoder.config.span_rope is not None
        capturable = self.on_gpu and decoder.flows and not self._with_spans  # with spans, angles are asked for
        self.graphs = DecodeGraphs(self._decode, self.rows, sizes if capturable else ())

    def forget(self, sequence: Sequence) -> None:
        """Keep nothing of a sequence any longer."""
        self.rows.forget(sequence)
        self.chooser.forget(sequence)

    def launch(self, runs: list[Run], running: list[Sequence]) -> Flight:
        """Send a step on its way. running: sequences that keep their rows when there are too few."""
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
        captured = None
        if single and not reading and (adapters is None or adapters.owners is None):
            adapter = None if adapters is None else adapters.adapters[0]
            if adapter is None or not (alone or adapter.routes):
                captured = self.graphs.find(len(runs), alone, adapter)
        if captured is not None:
            places = ends
            packed = self.rows.pack(runs, running, padded=captured.size)
            logits, values, ids = self.graphs.replay(captured, packed)
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
                hidden = hidden[self.rows.send(places)]
            if len(ends) < len(runs):
                index = index[self.rows.send(ends)]
            logits, values, ids = self._best(self.decoder.logits(hidden), index)
            places = list(range(len(ends)))
        chosen: list[tuple[Sequence, int]] = []
        left: list[tuple[Sequence, int]] = []
        # what a grammar allows may still be on its way while the device computes the scores; nobody waits twice
        patience = time.perf_counter() + PATIENCE
        for i, place in zip(ends, places, strict=True):
            s = runs[i].sequence
            here = not self._with_spans and self.chooser.takes(s, max(0.0, patience - time.perf_counter()))
            (chosen if here else left).append((s, place))
        values, ids = self.chooser.choose(logits, values, ids, chosen)
        return Flight(
            runs,
            read,
            chosen,
            [s for s, _place in left],
            self._home(torch.stack((ids.double(), values.double()))) if chosen else None,
            self._home(logits[self.rows.send([place for _s, place in left])]) if left else None,
            parts,
            began,
            self._mark(),
        )

    def _decode(
        self, ids: Tensor, index: Tensor, contexts: Tensor, alone: bool, adapter: Adapter | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The step of decoding that is captured. ids, index (of rows), contexts: [n]; alone: of a deterministic
        sequence; adapter: of all of them."""
        inputs = self.rows.decoding(
            ids, index, contexts, alone, None if adapter is None else RowAdapters((adapter,), None)
        )
        return self._best(self.decoder.logits(self.decoder.forward(inputs, self.cache)), index)

    def _best(self, logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The scores, the largest of each row and its token, which becomes the last one of the row's sequence."""
        values, ids = largest(logits)
        self.rows.tokens.index_copy_(0, index, ids)
        return logits, values.float(), ids

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
