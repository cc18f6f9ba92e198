"""What is read off a prompt while it is computed: log-probabilities of its tokens, the mean of its hidden states."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from penstock.engine import sampler
from penstock.engine.load import HEAD_ROWS
from penstock.engine.request import SequenceOutput
from penstock.engine.sequence import Sequence
from penstock.engine.step import Step
from penstock.models.decoder import Decoder


def read_prompts(step: Step, hidden: Tensor, decoder: Decoder) -> None:
    """Take from one step's hidden states what the requests of its runs ask of their prompts.

    hidden: [T, hidden], a row for each token of the step, where any run reads its prompt. Each position is read once,
    also when a preempted sequence computes it again.
    """
    for run, last in zip(step.runs, step.last_rows, strict=True):
        sequence = run.sequence
        if not sequence.reads_prompt:
            continue
        first = last - run.length + 1 - sequence.computed  # the row of the prompt's position 0
        stop = min(sequence.computed + run.length, sequence.prompt_length)
        if sequence.request.prompt_logprobs:
            _score(sequence, hidden, first, stop, decoder)
        if sequence.request.embed:
            _add_up(sequence, hidden, first, stop, decoder)


def report(sequence: Sequence, output: SequenceOutput) -> None:
    """Put the prompt's share into the first output of a sequence."""
    output.prompt_logprobs = sequence.prompt_logprobs or None
    output.prompt_top = sequence.prompt_top or None
    if sequence.hidden_sum is not None:
        output.embedding = (sequence.hidden_sum / sequence.prompt_length).tolist()


def is_broken(output: SequenceOutput) -> bool:
    """Whether a prompt's share holds something that is not a number."""
    numbers = [p for p in output.prompt_logprobs or [] if p is not None] + (output.embedding or [])
    return any(math.isnan(number) for number in numbers)


def _score(sequence: Sequence, hidden: Tensor, first: int, stop: int, decoder: Decoder) -> None:
    """Log-probabilities of the tokens that follow the positions up to `stop`."""
    known, top, top_n = sequence.prompt_logprobs, sequence.prompt_top, sequence.request.prompt_top_n
    if not known:
        known.append(None)  # nothing precedes the first token
        if top_n:
            top.append([])
    stop = min(stop, sequence.prompt_length - 1)  # position i scores token i + 1
    for a in range(max(sequence.computed, len(known) - 1), stop, HEAD_ROWS):
        b = min(a + HEAD_ROWS, stop)
        logits = decoder.logits(hidden[first + a : first + b])
        logprobs, best = sampler.prompt_logprobs(logits, torch.tensor(sequence.ids[a + 1 : b + 1]), top_n)
        known += logprobs
        top += best


def _add_up(sequence: Sequence, hidden: Tensor, first: int, stop: int, decoder: Decoder) -> None:
    """The sum over the positions up to `stop` of the hidden states behind the final norm."""
    for a in range(max(sequence.computed, sequence.hidden_count), stop, HEAD_ROWS):
        b = min(a + HEAD_ROWS, stop)
        normed = decoder.normed(hidden[first + a : first + b])
        total = normed.double().sum(dim=0)
        sequence.hidden_sum = total if sequence.hidden_sum is None else sequence.hidden_sum + total
        sequence.hidden_count = b
