"""Where each tensor of a safetensors checkpoint lies, every header checked before a byte is used.

All sums are done with Python's unbounded ints, so no declared size can wrap around.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.errors import ModelError
from penstock.hub.folder import AGAIN, damaged, is_plain_name, member, read_small, reason
from penstock.hub.pickles import only_pickles, pickle_names

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
MAX_DIMS = 32
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")

# bits of one element, under the names that safetensors uses
DTYPE_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8,
    "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """One tensor on disk. start and end are absolute byte offsets.

    dtype: as safetensors spells it (F32, BF16 ...) or, in a GGUF file, as ggml does (Q4_K ...). interleaved: the rows
    of so many heads are in GGUF's order, where the two of a rotary pair are neighbours; 0 is the usual order. shift: to
    be added to every value.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    interleaved: int = 0
    shift: float = 0.0


def read_checkpoint(folder: Path) -> dict[str, TensorEntry]:
    """Every tensor of the checkpoint in `folder`, by name; headers only, no weights are read.

    Takes `model.safetensors`, or the shards that `model.safetensors.index.json` names, or, without both, all
    `*.safetensors` of the folder. Raises ModelError naming the file and the reason.
    """
    names = _listing(folder)
    if SINGLE in names:
        return read_file(folder, SINGLE)
    if INDEX in names:
        return _read_indexed(folder)
    files = [n for n in names if n.endswith(".safetensors") and not n.startswith("adapter_")]
    if not files:
        raise _no_weights(folder, names)
    _check_complete(folder, files)
    return _read_all(folder, files)


def read_file(folder: Path, name: str) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file of `folder`, its header checked against the file's real length."""
    real, shown = member(folder, name), folder / name
    try:
        with real.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(8)
            length = _header_length(shown, head, size)
            raw = file.read(length)
    except OSError as error:
        raise damaged(shown, f"It cannot be read: {reason(error)}.") from None
    if len(raw) != length:
        raise damaged(shown, "It became shorter while it was read.")
    header = parse_object(shown, raw)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise damaged(shown, "Its __metadata__ is not an object.")
    entries = [_entry(real, shown, tensor, spec, 8 + length) for tensor, spec in header.items()]
    _check_layout(shown, entries, 8 + length, size)
    return {entry.name: entry for entry in entries}


def parse_object(file: Path, raw: bytes) -> dict[str, Any]:
    """A JSON object in UTF-8 with no key twice; anything else is a ModelError that names the file."""
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise damaged(file, f"Its JSON is not UTF-8 (byte {error.start}).") from None
    except json.JSONDecodeError as error:
        raise damaged(file, f"Its JSON is broken: {error.msg} at character {error.pos}.") from None
    except RecursionError:
        raise damaged(file, "Its JSON is nested too deep.") from None
    except ValueError as error:  # a key twice, NaN, a number of thousands of digits
        raise damaged(file, f"Its JSON is not acceptable: {str(error)[:120]}.") from None
    if not isinstance(value, dict):
        raise damaged(file, f"Its JSON is a {type(value).__name__}, not an object.")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Two readers may pick different ones of two equal keys, so that is refused."""
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} stands twice")
    return found


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is not a JSON number")


def _header_length(file: Path, head: bytes, size: int) -> int:
    if head.startswith(b"version "):  # the first words of a git-lfs pointer
        raise damaged(
            file,
            "It is a git-lfs pointer: the weights themselves were never fetched.",
            f"Run `git lfs pull` in {file.parent}, or give the hub name instead of the folder.",
        )
    if head[:4] == b"GGUF":
        raise damaged(file, "It is a GGUF file under another name.", "Name it *.gguf and give the file itself.")
    if len(head) < 8:
        raise damaged(file, f"It has {size} bytes; a safetensors file has at least 8. It was cut short.")
    length = int.from_bytes(head, "little")
    if length > MAX_HEADER:
        raise damaged(file, f"Its header claims {length:,} bytes, over the limit of {MAX_HEADER:,}.")
    if 8 + length > size:
        raise damaged(file, f"It was cut short: the header needs {8 + length:,} bytes, the file has {size:,}.")
    return length


def _entry(real: Path, file: Path, name: str, spec: object, base: int) -> TensorEntry:
    """Check what the header says of one tensor. Offsets in the header count from `base`, the end of the header."""
    shown = repr(name[:120])
    if not isinstance(spec, dict):
        raise damaged(file, f"Its header says nothing usable about tensor {shown}.")
    dtype, shape, offsets = spec.get("dtype"), spec.get("shape"), spec.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise damaged(file, f"Tensor {shown} has the unknown dtype {str(dtype)[:40]!r}.")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(_is_size(n) for n in shape):
        raise damaged(file, f"Tensor {shown} has the impossible shape {str(shape)[:80]}.")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(n) for n in offsets):
        raise damaged(file, f"Tensor {shown} has the impossible data_offsets {str(offsets)[:80]}.")
    bits = DTYPE_BITS[dtype]
    for n in shape:
        bits *= n
    begin, end = offsets
    if bits % 8 or end - begin != bits // 8:
        raise damaged(
            file,
            f"Tensor {shown} is {dtype} {str(shape)[:80]}, which takes {bits // 8:,} bytes, "
            f"but its data_offsets span {end - begin:,}.",
        )
    return TensorEntry(name, real, dtype, tuple(shape), base + begin, base + end)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63  # `type`: True is an int in Python


def _check_layout(file: Path, entries: Iterable[TensorEntry], base: int, size: int) -> None:
    """The tensors must follow each other without gap or overlap and end where the file ends."""
    at = base
    for entry in sorted(entries, key=lambda e: (e.start, e.end)):
        if entry.start != at:
            fault = "overlaps the one before it" if entry.start < at else "leaves a gap before it"
            raise damaged(file, f"Tensor {entry.name[:120]!r} {fault} (byte {entry.start:,}, expected {at:,}).")
        at = entry.end
        if at > size:
            raise damaged(
                file,
                f"It was cut short: tensor {entry.name[:120]!r} ends at byte {at:,}, the file at {size:,}.",
            )
    if at != size:
        raise damaged(file, f"The tensors end at byte {at:,}, but the file has {size:,}.")


def _read_indexed(folder: Path) -> dict[str, TensorEntry]:
    file = folder / INDEX
    index = parse_object(file, read_small(folder, INDEX, MAX_HEADER))
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise damaged(file, "It has no weight_map.")
    shards: dict[str, dict[str, TensorEntry]] = {}
    for shard in dict.fromkeys(weight_map.values()):
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or not is_plain_name(shard):
            raise damaged(
                file,
                f"Its weight_map names {str(shard)[:80]!r}, which is not the plain name of a .safetensors file.",
                "Do not use this copy; download the model again from its publisher.",
            )
        shards[shard] = read_file(folder, shard)
    found: dict[str, TensorEntry] = {}
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise damaged(
                folder / shard,
                f"It lacks the tensor {name[:120]!r} that {INDEX} places in it.",
                "The index and the shards are of different versions. " + AGAIN,
            )
        found[name] = shards[shard][name]
    return found


def _read_all(folder: Path, files: list[str]) -> dict[str, TensorEntry]:
    found: dict[str, TensorEntry] = {}
    for file in files:
        for name, entry in read_file(folder, file).items():
            if name in found:
                raise ModelError(
                    f"The files {found[name].file.name} and {file} in {folder} both hold the tensor {name[:120]!r}.",
                    f"Without {INDEX} nothing says which one counts.",
                    "Keep the files of one checkpoint only, or add its index.",
                )
            found[name] = entry
    return found


def _check_complete(folder: Path, files: list[str]) -> None:
    """Shards are named `x-00001-of-00003`: without an index their names still tell what is missing."""
    for file in files:
        match = _SHARD.fullmatch(file)
        if match:
            for number in range(1, int(match["count"]) + 1):
                wanted = f"{match['stem']}-{number:05d}-of-{match['count']}.safetensors"
                if wanted not in files:
                    raise damaged(folder / wanted, "It is missing.", "Download the model again.")


def _listing(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise ModelError(f"The model folder {folder} cannot be read.", f"{reason(error)}.") from None


def _no_weights(folder: Path, names: list[str]) -> ModelError:
    what = f"The folder {folder} has no *.safetensors weights."
    if pickle_names(names):
        return only_pickles(folder, str(folder))
    if any(n.endswith((".bin", ".pt", ".pth")) for n in names):
        return ModelError(
            what,
            "It has .bin or .pt files: those are pickles, which can run code when read, so they are never loaded.",
            "Take a safetensors revision of the model; `penstock convert` takes files named pytorch_model*.bin.",
        )
    if any(n.endswith(".gguf") for n in names):
        return ModelError(what, "It has a GGUF file.", "Give the GGUF file itself instead of the folder.")
    if any(n.startswith("adapter_") for n in names):
        return ModelError(
            what,
            "It is a LoRA adapter, not a model.",
            f"Give the base model's folder: penstock serve BASE --lora-adapters NAME={folder}",
        )
    return ModelError(what, "Only the configuration was copied or downloaded.", "Download the model again.")
