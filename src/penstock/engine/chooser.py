"""The choice of tokens where the scores lie: biases, penalties, masks and draws, without the host knowing any score.

What changes a row's scores is applied in the order of `sampler`. Of a row with penalties the device itself counts the
token that it chose, so the next step may be on its way before anybody else knows it.
"""

from __future__ import annotations

from collections.abc import Sequence as Row
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.engine.rows import DeviceRows
from penstock.engine.sampler import draw_rule, draws_simply, repetition_of
from penstock.engine.sequence import Sequence
from penstock.kernels.counts import PenaltyRules, count_text, count_tokens, penalize_counted
from penstock.kernels.sampling import draw, largest, restrict

_COUNT_BYTES = 2**27  # that counts of tokens may take


def counted_rows(rows: int, vocab: int) -> int:
    """Sequences that have penalties at the same time: of more, the host chooses the tokens."""
    return min(rows, _COUNT_BYTES // count_bytes(vocab))


def count_bytes(vocab: int) -> int:
    """What the counts of one sequence take."""
    return 2 * vocab * torch.int32.itemsize


@dataclass
class _Slot:
    """Where the tokens of a sequence are counted, and how many are."""

    index: int
    counted: int = 0


class Chooser:
    """Chooses the tokens of sequences that have rows on the device. vocab: tokens of the model."""

    def __init__(self, rows: DeviceRows, vocab: int) -> None:
        self.rows, self.device = rows, rows.device
        slots = counted_rows(rows.count, vocab)
        self._counts = torch.zeros((slots, 2, vocab), dtype=torch.int32, device=self.device)
        self._slots: dict[Sequence, _Slot] = {}
        self._free = list(range(slots - 1, -1, -1))

    def forget(self, sequence: Sequence) -> None:
        """Give what is kept of a sequence to others; nothing kept is fine."""
        slot = self._slots.pop(sequence, None)
        if slot is not None:
            self._free.append(slot.index)

    def takes(self, sequence: Sequence, seconds: float) -> bool:
        """Whether the next token of a sequence can be chosen here, waiting so long for its grammar. Where that depends
        on how often each token came, they are counted then."""
        request, sampling, cursor = sequence.request, sequence.request.sampling, sequence.cursor
        if request.top_n_tokens or sampling.watermark:
            return False
        if not (draws_simply(request) if sampling.draws else sampling.min_p == 0):
            return False
        if cursor is not None and (not cursor.ready(0.0 if cursor.slow else seconds) or cursor.forced):
            return False
        return not sampling.penalizes or self._counts_of(sequence)

    def choose(
        self, logits: Tensor, values: Tensor, ids: Tensor, near: Row[tuple[Sequence, int]]
    ) -> tuple[Tensor, Tensor]:
        """Replace the likeliest tokens where something else is asked for, and their scores by log-probabilities where
        these are.

        logits: [n, vocab]; values, ids: [n], the likeliest; near: sequences and their places -> values, ids. The rows
        get what was chosen as their last tokens.
        """
        told = [place for s, place in near if s.request.logprobs and not _differs(s)]
        if told:
            at = self.rows.send(told)
            values = values.index_copy(0, at, chosen_logprobs(logits[at], ids[at]))
        others = [(s, place) for s, place in near if _differs(s)]
        if others:
            sequences, at = [s for s, _place in others], self.rows.send([place for _s, place in others])
            tokens, logprobs = self._choose(logits[at], sequences)
            values, ids = values.index_copy(0, at, logprobs), ids.index_copy(0, at, tokens)
            self.rows.tokens.index_copy_(0, self.rows.send([self.rows.index_of(s) for s in sequences]), tokens)
        return values, ids

    def _choose(self, scores: Tensor, sequences: list[Sequence]) -> tuple[Tensor, Tensor]:
        """A token of each row, and its log-probability or score. scores: [n, vocab], used up -> two [n]"""
        if any(_changes(s) for s in sequences):
            scores = scores.float()
            self._change(scores, sequences)
        drawn = [i for i, s in enumerate(sequences) if s.request.sampling.draws]
        if len(drawn) == len(sequences):
            tokens, values = draw(scores if scores.is_cuda else scores.float(), [draw_rule(s) for s in sequences])
        else:
            best, tokens = largest(scores)
            values = best.float()
            told = [i for i, s in enumerate(sequences) if s.request.logprobs and not s.request.sampling.draws]
            if told:
                at = self.rows.send(told)
                values = values.index_copy(0, at, chosen_logprobs(scores[at], tokens[at]))
            if drawn:
                at = self.rows.send(drawn)
                found, logprobs = draw(scores[at].float(), [draw_rule(sequences[i]) for i in drawn])
                tokens, values = tokens.index_copy(0, at, found), values.index_copy(0, at, logprobs)
        slots = [self._slots.get(s) for s in sequences]
        if any(slots):
            numbers = [-1 if slot is None else slot.index for slot in slots]
            count_tokens(self._counts, self.rows.send(numbers, torch.int32), tokens)
            for slot in slots:
                if slot is not None:
                    slot.counted += 1
        return tokens, values

    def _change(self, scores: Tensor, sequences: list[Sequence]) -> None:
        """Bias, penalties, grammar and least length, in place. scores: [n, vocab] float32"""
        biases = [(i, s.request.sampling.logit_bias) for i, s in enumerate(sequences)]
        places = [(i, token) for i, bias in biases for token in bias]
        if places:
            row, token = self.rows.send([n for place in places for n in place]).view(-1, 2).unbind(1)
            added = [number for _i, bias in biases for number in bias.values()]
            scores[row, token] += self.rows.send(added, torch.float32)
        if any(s.request.sampling.penalizes for s in sequences):
            penalize_counted(scores, self._rules(sequences), self._counts)
        restrict(
            scores, [None if s.cursor is None else s.cursor.mask() for s in sequences], [s.withheld for s in sequences]
        )

    def _rules(self, sequences: list[Sequence]) -> PenaltyRules:
        columns: list[list[float]] = [
            [float(self._slots[s].index if s in self._slots else -1) for s in sequences],
            [float(len(s.ids) + s.ahead) for s in sequences],
            [repetition_of(s.request.sampling) for s in sequences],
            [s.request.sampling.frequency_penalty for s in sequences],
            [s.request.sampling.count_penalty for s in sequences],
            [s.request.sampling.presence_penalty for s in sequences],
        ]
        sent = self.rows.send([number for column in columns for number in column], torch.float32).view(len(columns), -1)
        slot, length, repetition, frequency, count, presence = sent.unbind()
        return PenaltyRules(slot.int(), repetition, frequency, count, presence, length.int())

    def _counts_of(self, sequence: Sequence) -> bool:
        """See that the tokens of a sequence are counted. False where as many sequences are as can be."""
        slot = self._slots.get(sequence)
        if slot is None:
            if not self._free:
                return False
            slot = self._slots[sequence] = _Slot(self._free.pop())
        length = len(sequence.ids) + sequence.ahead
        if slot.counted != length:  # it is new, or the host chose some, or took what a grammar forced
            count_text(self._counts, slot.index, self.rows.send(sequence.ids), sequence.given)
            slot.counted = length
        return True


def _changes(sequence: Sequence) -> bool:
    """Whether the scores of a sequence are changed before its token is chosen."""
    sampling = sequence.request.sampling
    return sampling.penalizes or bool(sampling.logit_bias) or sequence.cursor is not None or bool(sequence.withheld)


def _differs(sequence: Sequence) -> bool:
    """Whether the token of a sequence may be another than the likeliest."""
    return sequence.request.sampling.draws or _changes(sequence)


def chosen_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities of one token of each row. logits: [n, vocab]; ids: [n] -> [n] float32."""
    if logits.is_cuda:
        from penstock.kernels.triton import penalties

        return penalties.chosen_logprobs(logits, ids)
    scores = logits.float()
    logprobs = scores - torch.logsumexp(scores, dim=-1, keepdim=True)
    return logprobs.gather(1, ids.unsqueeze(1)).squeeze(1)
