"""A model of transformers whose attention is ours, over our paged cache: batched continuously like our own decoder."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.kernels.attention import RunGroup, paged_attention, store
from penstock.models.fallback.agreement import difference, tolerance
from penstock.models.fallback.config import Found, TransformersConfig
from penstock.models.fallback.trace import Call, CannotReplace, Tracer
from penstock.models.inputs import KVCache, StepInputs, cache_on, empty_cache
from penstock.models.tensors import CPU

_numbers = itertools.count()
_LENGTH, _BLOCK = 16, 4  # of the two texts that are tried, and of their blocks


class PagedAttention:
    """An attention function for transformers: keys and values go into our cache, scores come from there.

    A forward pass makes the same calls in the same order each time; call i has layer i of the cache.
    """

    def __init__(self, calls: tuple[Call, ...], dtype: torch.dtype) -> None:
        self._calls, self._dtype = calls, dtype
        self._step: StepInputs | None = None
        self._layers: Iterator[tuple[Call, tuple[Tensor, Tensor]]] = iter(())

    @contextmanager
    def over(self, step: StepInputs, cache: KVCache) -> Iterator[None]:
        """The calls within are of this step."""
        self._step, self._layers = step, iter(list(zip(self._calls, cache, strict=True)))
        try:
            yield
        finally:
            self._step, self._layers = None, iter(())

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        *,
        scaling: float | None = None,
        softcap: float | None = None,
        **_rest: Any,
    ) -> tuple[Tensor, None]:
        """query: [1, heads, T, dim]; key, value: [1, kv_heads, T, dim] -> [1, T, heads, value_dim]."""
        step, (call, (k_cache, v_cache)) = self._step, next(self._layers)
        assert step is not None  # noqa: S101 (a call outside of a step)
        q, k, v = (_rows(x, call.width, self._dtype) for x in (query, key, value))
        store(k, v, step.slots, k_cache, v_cache)
        scale = call.key_dim**-0.5 if scaling is None else float(scaling)
        seen = call.visible
        mixed = paged_attention(q, k_cache, v_cache, step.groups, scale, seen.window, softcap=softcap, chunk=seen.chunk)
        mixed = mixed.view(1, len(q), -1, call.width)[..., : call.value_dim]
        return mixed.to(query.device, query.dtype), None


def _rows(x: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """[1, heads, T, dim] -> [T, heads, width], dense, filled up with zeros, where the cache is."""
    x = x[0].transpose(0, 1).to("cpu", dtype)
    return F.pad(x, (0, width - x.shape[2])) if x.shape[2] < width else x.contiguous()


class PagedTransformer:
    """A causal language model of transformers behind the interface of our decoder."""

    span_rope = None

    def __init__(
        self,
        model: Any,
        attention: PagedAttention,
        calls: tuple[Call, ...],
        dtype: torch.dtype,
        device: torch.device = CPU,
    ) -> None:
        """device: where the model is given its tokens, and the cache lies."""
        self._model, self._attention, self._calls, self._dtype, self.device = model, attention, calls, dtype, device
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.config: TransformersConfig

    @property
    def kv_elements(self) -> int:
        """Numbers that one token takes in the cache."""
        return sum(2 * call.kv_heads * call.width for call in self._calls)

    @property
    def kv_vectors(self) -> int:
        """How many vectors they are."""
        return sum(2 * call.kv_heads for call in self._calls)

    def new_cache(self, num_blocks: int, block_size: int, dtype: torch.dtype | None = None) -> KVCache:
        """An empty cache: for each call of attention keys and values, of the weights' type or of `dtype`."""
        shapes = [(num_blocks, call.kv_heads, block_size, call.width) for call in self._calls]
        dtype = dtype or self._dtype
        if self.device.type != "cpu":
            return [cache_on(self.device, 1, shape, dtype)[0] for shape in shapes]
        return [layer for shape in shapes for layer in empty_cache(1, shape, dtype)]

    def forward(self, step: StepInputs, cache: KVCache, watch: Callable[[int, Tensor], None] | None = None) -> Tensor:
        """One step over a flat batch of runs; writes the cache. Returns the scores of the rows that are wanted: how a
        model makes them from its last hidden state is its own affair. [R, vocab]"""
        rows = None if step.wanted is None else step.wanted.rows
        options = {"logits_to_keep": rows} if self._keeps and rows is not None and len(rows) else {}
        with self._attention.over(step, cache):
            out = self._model(
                input_ids=step.ids.unsqueeze(0),
                position_ids=step.positions.unsqueeze(0),
                use_cache=False,
                return_dict=True,
                output_hidden_states=watch is not None,
                **options,
            )
        if watch is not None:
            for i, states in enumerate(out.hidden_states):
                watch(i, states[0].to("cpu"))
        scores: Tensor = out.logits[0].to("cpu")
        return scores if rows is None or options else scores[rows]

    def logits(self, hidden: Tensor) -> Tensor:
        """The rows of `forward` are scores already."""
        return hidden


@torch.inference_mode()
def page(found: Found, model: Any, dtype: torch.dtype, device: torch.device = CPU) -> PagedTransformer:
    """Put our attention into a loaded model. Raises CannotReplace with the reason, the model left as it was.

    device: where it is given its tokens.

    The model is tried, not believed: texts in one flat batch and in chunks must score as they do by themselves.
    """
    if getattr(model, "_is_stateful", False):
        raise CannotReplace("it keeps a state beside keys and values")
    if not model._can_set_attn_implementation() or "position_ids" not in inspect.signature(model.forward).parameters:
        raise CannotReplace("its attention cannot be replaced")
    if _depends_on_length(found.text):
        raise CannotReplace("its angles depend on the length of a text")
    before = model.config._attn_implementation
    ids = torch.randint(found.shape.vocab_size, (2, _LENGTH), generator=torch.Generator().manual_seed(0))
    try:
        expected = model(input_ids=ids.to(device), use_cache=False).logits
        calls = _traced(model, ids[:1].to(device))
        attention = PagedAttention(calls, dtype)
        _install(model, attention, attention_mask=None)
        paged = PagedTransformer(model, attention, calls, dtype, device)
        ours = _in_chunks(paged, ids)
        share = difference(ours, expected.to("cpu"))
        if not share <= tolerance(dtype):
            raise CannotReplace(f"its scores differ by {share:.0%} with our cache")
    except Exception as error:
        model.set_attn_implementation(before)
        if isinstance(error, CannotReplace):
            raise
        raise CannotReplace(f"its attention cannot be replaced ({type(error).__name__})") from error
    return paged


def _traced(model: Any, ids: Tensor) -> tuple[Call, ...]:
    tracer = Tracer()
    _install(model, tracer.attend, tracer.mask)
    model(input_ids=ids, position_ids=torch.arange(ids.shape[1], device=ids.device).unsqueeze(0), use_cache=False)
    if not tracer.calls:
        raise CannotReplace("its attention cannot be replaced")
    return tuple(tracer.calls)


def _install(model: Any, attend: Callable[..., Any], attention_mask: Callable[..., Any] | None) -> None:
    """Register functions with transformers under a name of their own, and have the model call them. attention_mask:
    what makes its masks; None for no masks at all."""
    from transformers import AttentionInterface, AttentionMaskInterface

    name = f"penstock_{next(_numbers)}"
    AttentionInterface.register(name, attend)
    if attention_mask is not None:
        AttentionMaskInterface.register(name, attention_mask)
    model.set_attn_implementation(name)


def _depends_on_length(text: Any) -> bool:
    """Whether the angle of a token depends on more than its place: neighbours in a flat batch would then matter."""
    todo = [getattr(text, "rope_parameters", None), getattr(text, "rope_scaling", None)]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            if value.get("rope_type", value.get("type")) in ("dynamic", "longrope"):
                return True
            todo.extend(value.values())
    return False


def _in_chunks(paged: PagedTransformer, ids: Tensor) -> Tensor:
    """Scores of two texts of one length, [2, T, vocab]: half of the first, then the rest of it beside all of the
    second."""
    length, half = ids.shape[1], ids.shape[1] // 2
    blocks = torch.arange(2 * length // _BLOCK).view(2, -1)
    cache = paged.new_cache(blocks.numel(), _BLOCK)

    def step(*runs: tuple[int, int, int]) -> Tensor:  # of (text, first token, end)
        groups, start = [], 0
        for text, a, b in runs:
            groups.append(RunGroup(start, b - a, [b], blocks[text : text + 1]))
            start += b - a
        return paged.forward(
            StepInputs(
                ids=torch.cat([ids[text, a:b] for text, a, b in runs]),
                positions=torch.cat([torch.arange(a, b) for _text, a, b in runs]),
                spans=None,
                slots=torch.cat([text * length + torch.arange(a, b) for text, a, b in runs]),
                groups=groups,
            ).to(paged.device),
            cache,
        )

    first, rest = step((0, 0, half)), step((0, half, length), (1, 0, length))
    return torch.stack((torch.cat((first, rest[: length - half])), rest[length - half :]))
