"""A model of transformers that keeps a cache of its own kind: each sequence is computed by itself.

What a model remembers of a text is one object of its own, so a sequence has one block, as long as the longest text, and
that block's number is where its object lies.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from penstock.models.fallback.config import TransformersConfig, accepted
from penstock.models.inputs import KVCache, StepInputs


@dataclass
class _Text:
    """One sequence: the tokens that are known, how many of them the model has seen, and what it keeps of those."""

    ids: list[int] = field(default_factory=list)
    seen: int = 0
    memory: dict[str, Any] = field(default_factory=dict)


class SingleTransformer:
    """A causal language model of transformers, one sequence at a time, behind the interface of our decoder.

    A prompt is computed in one go, when the first of its scores is wanted: not every kind of memory can go on with more
    than one token.
    """

    def __init__(self, model: Any) -> None:
        from transformers import GenerationConfig

        self._model = model
        self._parameters = frozenset(inspect.signature(model.forward).parameters)
        self._generation = GenerationConfig(use_cache=True)
        self._texts: dict[int, _Text] = {}  # by block
        self.config: TransformersConfig

    def new_cache(self, num_blocks: int, block_size: int) -> KVCache:
        """There is nothing to share: the cache has no layers."""
        return []

    def forward(self, step: StepInputs, cache: KVCache, watch: Callable[[int, Tensor], None] | None = None) -> Tensor:
        """One step, run by run. Returns the scores of the rows that are wanted, in their order. [R, vocab]"""
        wanted = None if step.wanted is None else step.wanted.rows.tolist()
        taken = None if wanted is None else set(wanted)
        rows: dict[int, Tensor] = {}
        states: list[list[Tensor]] = []
        for block, start, end in _runs(step):
            text = self._text(block, int(step.positions[start]))
            text.ids += step.ids[start:end].tolist()
            first = next((row for row in range(start, end) if taken is None or row in taken), None)
            if first is None:
                continue  # the middle of a prompt waits for its end
            out = self._advance(text, end - first, watch is not None)
            rows.update(zip(range(first, end), out.logits[0, first - end :].to("cpu"), strict=True))
            if watch is not None:
                states.append([layer[0, first - end :].to("cpu") for layer in out.hidden_states])
        if watch is not None:
            for i, layers in enumerate(zip(*states, strict=True)):
                watch(i, torch.cat(layers))
        order = sorted(rows) if wanted is None else wanted
        return torch.stack([rows[row] for row in order]) if order else torch.empty(0, self.config.vocab_size)

    def logits(self, hidden: Tensor) -> Tensor:
        """The rows of `forward` are scores already."""
        return hidden

    def _text(self, block: int, position: int) -> _Text:
        """The sequence of a block; one that begins replaces whichever had the block before."""
        if position == 0:
            self._texts[block] = _Text()
        text = self._texts[block]
        if len(text.ids) != position:
            raise RuntimeError(f"a sequence of {len(text.ids)} tokens cannot go on at {position}")
        return text

    def _advance(self, text: _Text, scores: int, with_states: bool) -> Any:
        """Have the model see the rest of a text, as its own generation does; the last `scores` tokens are scored."""
        ids = torch.tensor([text.ids])
        if not text.memory or len(text.ids) != text.seen + 1:
            text.memory, new = self._fresh(ids), None
        else:
            new = 1
        memory = dict(text.memory)
        if "logits_to_keep" in self._parameters:
            memory["logits_to_keep"] = scores
        inputs = self._model.prepare_inputs_for_generation(
            ids, next_sequence_length=new, is_first_iteration=new is None, **memory
        )
        options = {"return_dict": True, **({"output_hidden_states": True} if with_states else {})}
        out = self._model(**{**inputs, **accepted(self._model, **options)})
        text.memory = self._model._update_model_kwargs_for_generation(out, text.memory)
        text.seen = len(text.ids)
        return out

    def _fresh(self, ids: Tensor) -> dict[str, Any]:
        """What generation starts with: an empty cache of the model's kind, and positions where it takes them."""
        from transformers.generation import GenerationMode

        memory: dict[str, Any] = {"use_cache": True}
        if "position_ids" in self._parameters:
            memory["position_ids"] = torch.arange(ids.shape[1]).unsqueeze(0)
        self._model._prepare_cache_for_generation(
            copy.copy(self._generation), memory, GenerationMode.GREEDY_SEARCH, 1, ids.shape[1]
        )
        return memory

    @torch.inference_mode()
    def memory_bytes(self, length: int) -> int:
        """What the model keeps of a text of so many tokens, measured."""
        text = _Text(ids=[0] * (length - 1))
        self._advance(text, 1, False)
        text.ids.append(0)
        self._advance(text, 1, False)
        return sum(tensor.nbytes for tensor in _tensors(text.memory))


def _runs(step: StepInputs) -> Iterator[tuple[int, int, int]]:
    """(block, first row, end) of each run, in the order of the rows."""
    for group in step.groups:
        for i, block in enumerate(group.blocks[:, 0].tolist()):
            start = group.start + i * group.length
            yield block, start, start + group.length


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor that an object holds, each once."""
    todo, known = [value], set()
    while todo:
        value = todo.pop()
        if id(value) in known or isinstance(value, torch.nn.Module):
            continue
        known.add(id(value))
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            todo.extend(value.values())
        elif isinstance(value, list | tuple):
            todo.extend(value)
        elif hasattr(value, "__dict__") and type(value).__module__.split(".")[0] != "torch":
            todo.extend(vars(value).values())
