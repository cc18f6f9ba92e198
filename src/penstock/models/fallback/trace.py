"""What a transformers model asks of attention, seen by running a few tokens through it with our function in its place.

Nothing is read off its configuration: which keys a token sees is asked of the very function that would make the mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_FAR = 2**20  # a window beyond so many tokens is none
# what models hand on to every attention function without changing what it computes
_HARMLESS = {"position_ids", "cache_position", "position_embeddings", "dropout", "sliding_window", "input_ids"}


class CannotReplace(Exception):
    """Why a model's attention cannot be ours, in a few words."""


@dataclass(frozen=True)
class Visible:
    """Which keys a query sees, as `paged_attention` takes it; given to a model in place of a mask."""

    window: int | None = None
    chunk: int | None = None


@dataclass(frozen=True)
class Call:
    """One call of attention in a forward pass: of k and v, and what is seen. Every pass makes the same calls."""

    kv_heads: int
    key_dim: int
    value_dim: int
    visible: Visible

    @property
    def width(self) -> int:
        """What a head takes in the cache: keys and values have one size there, and an even one."""
        widest = max(self.key_dim, self.value_dim)
        return widest + widest % 2


class Tracer:
    """An attention function and a mask function for transformers that write down what they are asked for."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def mask(self, *, mask_function: Callable[..., Tensor], **_rest: Any) -> Visible:
        """In place of a mask: which keys it would let through. Raises CannotReplace for a pattern that is not ours."""
        return visible(mask_function)

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        """query, key, value: [1, heads, T, dim] -> zeros [1, T, heads, value_dim]."""
        if not (mask is None or isinstance(mask, Visible)):
            raise CannotReplace("its attention makes masks of its own")
        if key.shape[2] != query.shape[2] or query.shape[1] % key.shape[1]:
            raise CannotReplace("its attention looks at something other than the text")
        if options.get("is_causal") is False or getattr(module, "is_causal", True) is False:
            raise CannotReplace("its attention looks ahead")
        for name, option in options.items():
            if isinstance(option, Tensor) and name not in _HARMLESS:
                raise CannotReplace(f"its attention takes `{name}`")
        self.calls.append(Call(key.shape[1], key.shape[3], value.shape[3], mask or Visible()))
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None


def visible(mask_function: Callable[..., Tensor]) -> Visible:
    """What a mask function of transformers lets through, (batch, head, query, key) -> bool. Raises CannotReplace."""
    zero = torch.tensor(0)

    def seen(query: Tensor, key: Tensor) -> Tensor:
        found = mask_function(zero, zero, query, key)
        return found.expand(torch.broadcast_shapes(query.shape, key.shape))

    queries = torch.arange(_FAR)
    first = seen(queries, zero)  # the first key, from every query
    if not bool(first[0]):
        raise CannotReplace("its attention hides the first token")
    hidden = (~first).nonzero()
    reach = int(hidden[0]) if len(hidden) else None  # the first query that does not see it
    found = Visible()
    if reach is not None:
        slides = reach == 1 or bool(seen(torch.tensor(reach), torch.tensor(1)))
        found = Visible(window=reach) if slides else Visible(chunk=reach)
    span = reach or 100
    for query in (0, 1, span - 1, span, span + 1, 2 * span, 2 * span + 1, 3 * span - 1):
        keys = torch.arange(max(0, query - 4 * span), query + span + 1)
        expected = keys <= query
        if found.window is not None:
            expected &= keys > query - found.window
        if found.chunk is not None:
            expected &= keys >= query // found.chunk * found.chunk
        if not torch.equal(seen(torch.tensor(query), keys), expected):
            raise CannotReplace("its attention sees a pattern of keys that is neither a window nor a chunk")
    return found
