"""A model of transformers that keeps a memory of its own for each text: computed in static batches.

What a model remembers of a text is one object, so a sequence has one block, as long as the longest text, and that
block's number is where its object lies. Texts whose memories are of one kind are computed together.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from penstock.kernels.attention import RunGroup
from penstock.models.fallback import memory
from penstock.models.fallback.agreement import EXACT, difference
from penstock.models.fallback.config import TransformersConfig, accepted
from penstock.models.fallback.memory import Memory
from penstock.models.inputs import KVCache, StepInputs
from penstock.models.tensors import CPU

log = logging.getLogger("penstock.engine")

_TRIED = (5, 7, 7)  # tokens of the texts that are tried together


@dataclass(eq=False)
class _Text:
    """One sequence: the tokens that are known, how many of them the model has seen, and where it is remembered."""

    ids: list[int] = field(default_factory=list)
    seen: int = 0
    batch: _Batch | None = None

    @property
    def decodes(self) -> bool:
        """Whether the model remembers all but the last token."""
        return self.batch is not None and len(self.ids) == self.seen + 1

    @property
    def memory(self) -> Memory:
        """What the model keeps of this text alone."""
        assert self.batch is not None  # noqa: S101 (a text that was never seen)
        texts, kept = self.batch.texts, self.batch.memory
        return kept if len(texts) == 1 else memory.part(kept, texts.index(self))


@dataclass(eq=False)
class _Batch:
    """Texts that were computed together last, and what the model keeps of them."""

    texts: list[_Text]
    memory: Memory

    @cached_property
    def kind(self) -> Any:
        """Texts of batches of one kind can be computed together."""
        return memory.kind(self.memory)


@dataclass(frozen=True)
class _Job:
    """Rows `first` to `end` of a step are to be scored: the last tokens of a text."""

    text: _Text
    first: int
    end: int


class OwnMemory:
    """A causal language model of transformers with its own cache behind the interface of our decoder.

    A prompt is computed in one go, when the first of its scores is wanted: not every kind of memory can go on with more
    than one token. `together`: which texts are computed as one batch: `any` whose memories are of one kind, as of
    recurrent models; those of `equal` length; `none`, one after another in each step; `never`: a text must come to its
    end before the next, because the model keeps some of its memory in itself.
    """

    span_rope = None
    device = CPU  # of a step's tensors: only tokens go on to the model

    def __init__(self, model: Any, device: torch.device = CPU) -> None:
        """device: where the model is given its tokens."""
        from transformers import GenerationConfig

        self._model, self._there = model, device
        self._parameters = frozenset(inspect.signature(model.forward).parameters)
        self._generation = GenerationConfig(use_cache=True)
        self._texts: dict[int, _Text] = {}  # by block
        self.config: TransformersConfig
        self.together = "never"

    def new_cache(self, num_blocks: int, block_size: int, dtype: torch.dtype | None = None) -> KVCache:
        """There is nothing to share: the cache has no layers."""
        return []

    def forward(self, step: StepInputs, cache: KVCache, watch: Callable[[int, Tensor], None] | None = None) -> Tensor:
        """One step. Returns the scores of the rows that are wanted, in their order. [R, vocab]"""
        wanted = None if step.wanted is None else step.wanted.rows.tolist()
        rows: dict[int, Tensor] = {}
        states: dict[int, Tensor] = {}
        for jobs in self._batches(list(self._jobs(step, wanted))):
            out = self._advance([job.text for job in jobs], jobs[0].end - jobs[0].first, watch is not None)
            for i, job in enumerate(jobs):
                places = range(job.first, job.end)
                rows.update(zip(places, out.logits[i, -len(places) :].to("cpu"), strict=True))
                if watch is not None:
                    layers = torch.stack([x[i, -len(places) :].to("cpu") for x in out.hidden_states], dim=1)
                    states.update(zip(places, layers, strict=True))
        if watch is not None:
            for i, layer in enumerate(torch.stack([states[row] for row in sorted(states)], dim=1)):
                watch(i, layer)
        order = sorted(rows) if wanted is None else wanted
        return torch.stack([rows[row] for row in order]) if order else torch.empty(0, self.config.vocab_size)

    def logits(self, hidden: Tensor) -> Tensor:
        """The rows of `forward` are scores already."""
        return hidden

    def _jobs(self, step: StepInputs, wanted: list[int] | None) -> Iterator[_Job]:
        """What there is to score; the tokens of every run are noted. wanted: rows, None for all."""
        taken = None if wanted is None else set(wanted)
        for group in cast(list[RunGroup], step.groups):
            for i, block in enumerate(group.blocks[:, 0].tolist()):
                start = group.start + i * group.length
                end = start + group.length
                text = self._text(block, int(step.positions[start]))
                text.ids += step.ids[start:end].tolist()
                first = next((row for row in range(start, end) if taken is None or row in taken), None)
                if first is not None:  # else the middle of a prompt, which waits for its end
                    yield _Job(text, first, end)

    def _text(self, block: int, position: int) -> _Text:
        """The sequence of a block; one that begins replaces whichever had the block before."""
        if position == 0:
            self._texts[block] = _Text()
        text = self._texts[block]
        if len(text.ids) != position:
            raise RuntimeError(f"a sequence of {len(text.ids)} tokens cannot go on at {position}")
        return text

    def _batches(self, jobs: list[_Job]) -> Iterator[list[_Job]]:
        """The jobs that are computed together."""
        batches: dict[Any, list[_Job]] = {}
        for job in jobs:
            text, scores = job.text, job.end - job.first
            length = len(text.ids)
            if self.together in ("none", "never"):
                key: Any = id(text)
            elif text.decodes and text.batch is not None:
                key = (scores, length if self.together == "equal" else None, text.batch.kind)
            else:
                key = (scores, length)
            batches.setdefault(key, []).append(job)
        yield from batches.values()

    def _advance(self, texts: list[_Text], scores: int, with_states: bool) -> Any:
        """Have the model see the rest of some texts, as its own generation does; the last `scores` tokens of each are
        scored."""
        longest = max(len(text.ids) for text in texts)
        ids = torch.tensor([[0] * (longest - len(text.ids)) + text.ids for text in texts])
        ids = ids.to(self._there)  # only decoding ones differ in length
        fresh = not texts[0].decodes
        kept = self._fresh(len(texts), longest) if fresh else self._remembered(texts)
        options = {"logits_to_keep": scores} if "logits_to_keep" in self._parameters else {}
        inputs = self._model.prepare_inputs_for_generation(
            ids, next_sequence_length=None if fresh else 1, is_first_iteration=fresh, **kept, **options
        )
        more = {"return_dict": True, **({"output_hidden_states": True} if with_states else {})}
        out = self._model(**{**inputs, **accepted(self._model, **more)})
        batch = _Batch(texts, self._model._update_model_kwargs_for_generation(out, kept))
        for text in texts:
            text.batch, text.seen = batch, len(text.ids)
        return out

    def _remembered(self, texts: list[_Text]) -> Memory:
        """What the model keeps of these texts, as one."""
        batch = texts[0].batch
        if batch is not None and batch.texts == texts:
            return batch.memory
        return texts[0].memory if len(texts) == 1 else memory.joined([text.memory for text in texts])

    def _fresh(self, count: int, length: int) -> Memory:
        """What generation starts with: an empty cache of the model's kind, and positions where it takes them."""
        from transformers.generation import GenerationMode

        kept: Memory = {"use_cache": True}
        if "position_ids" in self._parameters:
            kept["position_ids"] = torch.arange(length, device=self._there).expand(count, -1)
        self._model._prepare_cache_for_generation(
            copy.copy(self._generation), kept, GenerationMode.GREEDY_SEARCH, count, length
        )
        return kept

    @torch.inference_mode()
    def try_batches(self, vocab_size: int, tolerance: float) -> tuple[int, int]:
        """Settle `together` by computing some texts alone and in batches: their scores must agree, see `difference`.
        Returns the bytes that the model keeps of any text, and of each of its tokens."""
        generator = torch.Generator().manual_seed(0)
        prompts = [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in _TRIED]

        def scores(prompts: list[list[int]]) -> tuple[list[_Text], Tensor]:
            texts = [_Text(list(prompt)) for prompt in prompts]
            for _ in range(2):
                rows: dict[_Text, Tensor] = {}
                for jobs in self._batches([_Job(text, 0, 1) for text in texts]):
                    out = self._advance([job.text for job in jobs], 1, False)
                    rows |= {job.text: out.logits[i, -1].float().to("cpu") for i, job in enumerate(jobs)}
                for text in texts:
                    text.ids.append(7 % vocab_size)
            return texts, torch.stack([rows[text] for text in texts])

        alone = [scores([prompt]) for prompt in prompts]  # each to its end
        expected = torch.cat([rows for _text, rows in alone])
        short, long = (memory.size(alone[i][0][0].memory) for i in (0, 1))
        token = max(0, long - short) // (_TRIED[1] - _TRIED[0])
        allowed = {"none": EXACT, "equal": tolerance, "any": tolerance}  # one after another, nothing rounds otherwise
        settled = "never"
        for self.together, bound in allowed.items():
            try:
                _texts, found = scores(prompts)
            except Exception as error:  # somebody else's code, asked for what it may not do
                log.debug("texts are not computed together as %r: %s", self.together, error)
                break
            if not difference(found, expected) <= bound:
                break
            settled = self.together
        self.together = settled
        return max(0, short - token * (_TRIED[0] + 1)), token
