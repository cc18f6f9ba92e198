"""What is read off a prompt while it is computed: log-probabilities of its tokens, its hidden states."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from penstock.engine import sampler
from penstock.engine.load import HEAD_ROWS
from penstock.engine.output import SequenceOutput
from penstock.engine.sequence import Sequence
from penstock.engine.step import Step
from penstock.models.model import Model


class Watch:
    """Keeps the hidden states that the runs of a step ask for. False where they ask for none."""

    def __init__(self, step: Step) -> None:
        asked = [run.sequence.states.layers for run in step.runs if run.sequence.states and run.sequence.reads_prompt]
        self._layers = frozenset(layer for layers in asked for layer in layers)
        self._kept: dict[int, Tensor] = {}

    def __call__(self, layer: int, x: Tensor) -> None:
        if layer in self._layers:
            self._kept[layer] = x.clone()  # the decoder may add to it in place

    def __bool__(self) -> bool:
        return bool(self._layers)

    def rows(self, layer: int, rows: slice) -> Tensor:
        """The states of one layer, [n, hidden]."""
        return self._kept[layer][rows]


def read_prompts(step: Step, hidden: Tensor, model: Model, watch: Watch) -> list[SequenceOutput]:
    """Take from one step's hidden states what the requests of its runs ask of their prompts.

    hidden: [T, hidden], a row for each token of the step, where any run reads its prompt; of an encoder's states, only
    `watch` knows. Each position is read once, also when a preempted sequence computes it again. Returns the states of
    prompts that go on, where they are wanted token by token.
    """
    outputs = []
    for run, row in zip(step.runs, step.first_rows, strict=True):
        sequence = run.sequence
        if not sequence.reads_prompt:
            continue
        first = row - sequence.computed  # the row of the prompt's position 0
        stop = min(sequence.computed + run.length, sequence.prompt_length)
        if sequence.request.prompt_logprobs and not sequence.encoded:
            _score(sequence, hidden, first, stop, model)
        states = sequence.states
        if states is None:
            continue
        for a in range(max(sequence.computed, states.count), stop, HEAD_ROWS):
            rows = slice(first + a, first + min(a + HEAD_ROWS, stop))
            states.add(torch.stack([watch.rows(layer, rows) for layer in states.layers]))
        if states.pooling == "none" and stop < sequence.prompt_length:
            outputs.append(SequenceOutput(sequence.id, embedding=states.take()))
    return outputs


def report(sequence: Sequence, output: SequenceOutput) -> None:
    """Put the prompt's share into the first output of a sequence."""
    output.prompt_logprobs = sequence.prompt_logprobs or None
    output.prompt_top = sequence.prompt_top or None
    if sequence.states is not None:
        output.embedding = sequence.states.take()


def is_broken(output: SequenceOutput) -> bool:
    """Whether a prompt's share holds something that is not a number."""
    if output.embedding and bool(np.isnan(np.frombuffer(output.embedding, np.float32)).any()):
        return True
    return any(math.isnan(number) for number in output.prompt_logprobs or [] if number is not None)


def _score(sequence: Sequence, hidden: Tensor, first: int, stop: int, model: Model) -> None:
    """Log-probabilities of the tokens that follow the positions up to `stop`."""
    known, top, top_n = sequence.prompt_logprobs, sequence.prompt_top, sequence.request.prompt_top_n
    if not known:
        known.append(None)  # nothing precedes the first token
        if top_n:
            top.append([])
    stop = min(stop, sequence.prompt_length - 1)  # position i scores token i + 1
    for a in range(max(sequence.computed, len(known) - 1), stop, HEAD_ROWS):
        b = min(a + HEAD_ROWS, stop)
        logits = model.logits(hidden[first + a : first + b])
        targets = torch.tensor(sequence.ids[a + 1 : b + 1], device=logits.device)
        logprobs, best = sampler.prompt_logprobs(logits, targets, top_n)
        known += logprobs
        top += best
