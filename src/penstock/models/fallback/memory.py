"""What a model of transformers keeps of a text, whatever kind of object that is: measured, joined and parted.

A memory is a dictionary of the arguments that a forward pass hands to the next: a cache object, a list of states,
positions. Its tensors have the texts along their first axis.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

Memory = dict[str, Any]
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


def size(memory: Memory) -> int:
    """Bytes of its tensors."""
    return sum(tensor.nbytes for tensor in _tensors(memory))


def kind(memory: Memory) -> tuple[Any, ...]:
    """Memories of one kind can be joined: what differs are texts, and the numbers in their tensors."""
    return tuple(_kind(leaf) for leaf in _leaves(memory))


def joined(memories: Sequence[Memory]) -> Memory:
    """One memory of several texts, from memories of one kind."""
    rows = zip(*(_tensors(memory) for memory in memories), strict=True)
    return _with(memories[0], [torch.cat(same) for same in rows])


def part(memory: Memory, row: int) -> Memory:
    """The memory of one text of several. Its tensors are views."""
    return _with(memory, [tensor[row : row + 1] for tensor in _tensors(memory)])


def _with(memory: Memory, tensors: list[Tensor]) -> Memory:
    """A copy that has other tensors in place of its own, and shares what is neither tensor nor container."""
    known: dict[int, Any] = {id(leaf): leaf for leaf in _leaves(memory)}
    known |= {id(old): new for old, new in zip(_tensors(memory), tensors, strict=True)}
    return copy.deepcopy(memory, known)


def _kind(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.shape[1:], leaf.dtype, leaf.device
    return leaf if isinstance(leaf, _PLAIN) else type(leaf)


def _tensors(memory: Memory) -> list[Tensor]:
    return [leaf for leaf in _leaves(memory) if isinstance(leaf, Tensor)]


def _leaves(value: Any) -> Iterator[Any]:
    """What an object holds at last, in an order that objects of one make share: tensors (each once), plain values, and
    what is no container (configurations, modules, functions)."""
    todo, known = [value], set[int]()
    while todo:
        value = todo.pop()
        if isinstance(value, _PLAIN):
            yield value
            continue
        if id(value) in known:
            continue
        known.add(id(value))
        if isinstance(value, dict):
            todo.extend(value.values())
        elif isinstance(value, list | tuple):
            todo.extend(value)
        elif _is_cache(value):
            todo.extend(vars(value).values())
        else:
            yield value


def _is_cache(value: Any) -> bool:
    """Whether an object is a container of states: neither a tensor, a module, a configuration nor a class."""
    if isinstance(value, (Tensor, torch.nn.Module, type)) or callable(value):
        return False
    return hasattr(value, "__dict__") and not hasattr(value, "model_type")
