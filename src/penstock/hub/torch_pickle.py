"""The description of tensors in a file of torch.save, read without unpickling.

A pickle is a program for a small stack machine that may import and call anything. This is another machine for the same
programs: it knows the instructions that the description of a dictionary of tensors needs, builds plain data from them,
and calls nothing. The few names that such a file may use only stand for data here; every other one ends the reading.
"""

from __future__ import annotations

import pickletools  # names and arguments of the instructions; it executes none
from dataclasses import dataclass
from typing import Any, BinaryIO

MAX_STEPS = 20_000_000
# bytes of an element and safetensors' name, by the storage classes of torch
STORAGES = {
    "DoubleStorage": (8, "F64"), "FloatStorage": (4, "F32"), "HalfStorage": (2, "F16"), "BFloat16Storage": (2, "BF16"),
    "LongStorage": (8, "I64"), "IntStorage": (4, "I32"), "ShortStorage": (2, "I16"), "CharStorage": (1, "I8"),
    "ByteStorage": (1, "U8"), "BoolStorage": (1, "BOOL"),
}  # fmt: skip
_DICT = "collections OrderedDict"
_TENSORS = ("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor")
_PARAMETER = "torch._utils _rebuild_parameter"
_NAMES = {_DICT, *_TENSORS, _PARAMETER, "torch Size", *(f"torch {name}" for name in STORAGES)}
_PUSH_ARGUMENT = {
    "BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "BINFLOAT", "FLOAT", "UNICODE", "BINUNICODE",
    "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINSTRING", "SHORT_BINSTRING", "STRING",
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


class NotTensors(ValueError):
    """The file is not a dictionary of tensors; the text says what it is instead."""


@dataclass(frozen=True)
class Name:
    """What the file would have imported."""

    text: str


@dataclass(frozen=True)
class Storage:
    """A run of elements in the file. kind: a key of STORAGES."""

    kind: str
    key: str
    elements: int


@dataclass(frozen=True)
class TensorView:
    """A tensor as a window on a storage; offset and stride count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def read(stream: BinaryIO) -> Any:
    """The value of one pickle, from where `stream` stands to its end. Raises NotTensors, and for a damaged pickle
    ValueError, IndexError, KeyError or TypeError."""
    machine = _Machine()
    for step, (instruction, argument, _) in enumerate(pickletools.genops(stream)):
        if step > MAX_STEPS:
            raise NotTensors("it is longer than any list of tensors")
        if instruction.name == "STOP":
            return machine.stack.pop()
        machine.run(instruction.name, argument)
    raise NotTensors("it has no end")


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, name: str, argument: Any) -> None:
        """One instruction."""
        stack, memo = self.stack, self.memo
        if name in ("PROTO", "FRAME"):
            return
        if name in _PUSH_ARGUMENT:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[int(argument)] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[int(argument)])
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
            stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[name]())
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif name == "TUPLE":
            stack.append(tuple(self._marked()))
        elif name == "LIST":
            stack.append(self._marked())
        elif name == "APPEND":
            _list(stack[-2]).append(stack.pop())
        elif name == "APPENDS":
            items = self._marked()
            _list(stack[-1]).extend(items)
        elif name in ("SETITEM", "SETITEMS", "DICT"):
            self._set_items(name)
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            self._name(argument if name == "GLOBAL" else None)
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop()))
        elif name == "REDUCE":
            arguments = stack.pop()
            stack.append(_made(stack.pop(), arguments))
        elif name == "BUILD":  # attributes of the dictionary itself: versions of modules
            stack.pop()
            if not isinstance(stack[-1], dict):
                raise NotTensors("it sets the attributes of an object")
        else:
            raise NotTensors(f"it has the instruction {name}, which no list of tensors needs")

    def _marked(self) -> list[Any]:
        at = self.marks.pop()
        items = self.stack[at:]
        del self.stack[at:]
        return items

    def _set_items(self, name: str) -> None:
        if name == "SETITEM":
            value, key = self.stack.pop(), self.stack.pop()
            items = [key, value]
        else:
            items = self._marked()
        if name == "DICT":
            self.stack.append({})
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise NotTensors("it sets items of something that is no dictionary")
        target.update(zip(items[::2], items[1::2], strict=True))

    def _name(self, argument: str | None) -> None:
        if argument is None:
            attribute, module = self.stack.pop(), self.stack.pop()
            argument = f"{module} {attribute}"
        if argument not in _NAMES:
            raise NotTensors(
                f"it would call {argument.replace(' ', '.')[:80]!r}, which is no part of a list of tensors"
            )
        self.stack.append(Name(argument))


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise NotTensors("it appends to something that is no list")
    return value


def _storage(pid: Any) -> Storage:
    """The storage that a persistent id describes: ("storage", class, key, device, elements[, no view])."""
    if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or any(part is not None for part in pid[5:]):
        raise NotTensors("it refers to something that is no storage")
    kind = pid[1].text.removeprefix("torch ") if isinstance(pid[1], Name) else ""
    if kind not in STORAGES or not isinstance(pid[2], str) or type(pid[4]) is not int or pid[4] < 0:
        raise NotTensors("it refers to a storage of no known type")
    return Storage(kind, pid[2], pid[4])


def _made(name: Any, arguments: Any) -> Any:
    """The data that a call stands for."""
    if not isinstance(name, Name) or not isinstance(arguments, tuple):
        raise NotTensors("it calls something that is no name")
    if name.text == _DICT:
        return dict(*arguments[:1])
    if name.text == _PARAMETER and isinstance(arguments[0], TensorView):
        return arguments[0]
    if name.text == "torch Size":
        return tuple(*arguments[:1])
    if name.text in _TENSORS:
        storage, offset, shape, stride = arguments[:4]
        numbers = (offset, *shape, *stride)
        if (
            isinstance(storage, Storage)
            and len(shape) == len(stride) <= 32
            and all(type(n) is int and 0 <= n < 2**62 for n in numbers)
        ):
            return TensorView(storage, offset, tuple(shape), tuple(stride))
    raise NotTensors(f"it has a call of {name.text.replace(' ', '.')} that makes no sense")
