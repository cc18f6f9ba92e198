"""The process that turns one .bin file into safetensors: `python -m penstock.hub.convert_child IN OUT`, two open files.

Its input is a stranger's. It starts in a jail (hub/jail.py) before it reads a byte of it, reads without unpickling
(hub/torch_pickle.py), and tells what it made, or why not, as one line of JSON on stdout.
"""

from __future__ import annotations

import codecs
import json
import os
import sys

import numpy as np

from penstock.hub import jail
from penstock.hub.torch_file import BinTensor, read_tensors
from penstock.hub.torch_pickle import NotTensors

MEMORY = 3 * 1024**3  # bytes of address space
SECONDS_PER_GB, LEAST_SECONDS = 120, 120
_COPY = 16 * 1024 * 1024


class CannotWrite(Exception):
    """The result could not be written, in the system's words."""


def main() -> None:
    """Convert and report."""
    source, sink = int(sys.argv[1]), int(sys.argv[2])
    size = os.fstat(source).st_size
    with open(source, "rb") as file, open(sink, "wb", buffering=0) as out:
        for codec in ("utf-8", "ascii", "latin-1", "cp437", "raw-unicode-escape"):
            codecs.lookup(codec)  # Python reads a codec's file when it is first used
        jail.enter(MEMORY + 2 * _COPY, LEAST_SECONDS + SECONDS_PER_GB * size // 10**9)
        try:
            tensors = read_tensors(file, size)
            if sum(tensor.nbytes for tensor in tensors) > 2 * size:
                raise NotTensors("its tensors overlap until they are many times the file")
            report: dict[str, object] = {"tensors": {t.name: t.nbytes for t in tensors}}
            _write(tensors, file.fileno(), out.fileno())
        except NotTensors as error:
            report = {"refused": str(error)}
        except CannotWrite as error:
            report = {"failed": str(error)}
        except Exception as error:  # the file's content can make the reading fail in any way
            report = {"refused": f"it is damaged ({type(error).__name__})"}
        sys.stdout.write(json.dumps(report) + "\n")
        sys.stdout.flush()


def _write(tensors: list[BinTensor], source: int, sink: int) -> None:
    """The safetensors file: header, then every tensor in the order of the header."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(header, ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    _put(sink, len(text).to_bytes(8, "little") + text)
    for tensor in tensors:
        if tensor.contiguous:
            for start in range(tensor.start, tensor.start + tensor.nbytes, _COPY):
                _put(sink, _get(source, start, min(_COPY, tensor.start + tensor.nbytes - start)))
        else:  # an element is a string of bytes here: nothing looks into it
            span = np.frombuffer(_get(source, tensor.start, tensor.span * tensor.itemsize), f"V{tensor.itemsize}")
            strides = [step * tensor.itemsize for step in tensor.stride]
            _put(sink, np.lib.stride_tricks.as_strided(span, tensor.shape, strides, writeable=False).tobytes())
    _put(sink, b"", last=True)


def _get(source: int, start: int, count: int) -> bytes:
    parts, got = [], 0
    while got < count:
        part = os.pread(source, count - got, start + got)
        if not part:
            raise NotTensors("it was cut short")
        parts.append(part)
        got += len(part)
    return b"".join(parts)


def _put(sink: int, data: bytes, last: bool = False) -> None:
    rest = memoryview(data)
    try:
        while rest:
            rest = rest[os.write(sink, rest) :]
        if last:
            os.fsync(sink)
    except OSError as error:
        raise CannotWrite(os.strerror(error.errno or 0)) from None


if __name__ == "__main__":
    main()
