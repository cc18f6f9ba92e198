"""What this machine's memory and arithmetic reach, measured in a few seconds: the yardstick of every benchmark.

`python -m penstock.devices.probe` measures in a process of its own, with the threads of an engine; `measure` starts it.
Of a GPU it is the card's memory and matrix units that are measured.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from penstock.devices.threads import bind_threads
from penstock.errors import EnvironmentFault

READ_BYTES = 2**29  # far above any last-level cache
SIDE = 2048  # of the square matrices that are multiplied
_CARD_SIDE = 8192  # the same on a GPU
SECONDS = 0.4  # for each quantity
FORMATS = ("float32", "bfloat16", "int8")
_CALLS = 64  # timed together
_GRAIN = 32768  # elements of which torch gives a thread a share of its own


@dataclass(frozen=True)
class MachineLimits:
    """Measured limits. read_bytes_per_second: memory read by all threads, the median pass, for a memory bus has its
    moods (best_read: the fastest); flops: operations a second of the matrix product of each format (a multiply-add is
    two), the fastest, for only neighbours slow arithmetic down; call_seconds: one call from Python of something that
    all threads do, with next to nothing to do, the median."""

    threads: int
    read_bytes_per_second: float
    best_read: float
    flops: dict[str, float]
    call_seconds: float

    def beside(self, other: MachineLimits) -> MachineLimits:
        """The same machine with memory and calls of two measurements: what lies between them ran at neither's speed."""
        return replace(
            self,
            read_bytes_per_second=(self.read_bytes_per_second + other.read_bytes_per_second) / 2,
            best_read=max(self.best_read, other.best_read),
            call_seconds=(self.call_seconds + other.call_seconds) / 2,
        )

    def flops_of(self, weight_size: float) -> float:
        """The limit for weights of so many bytes each: those of 8 bits and fewer are multiplied in 8 bits."""
        name = "int8" if weight_size < 2 else "bfloat16" if weight_size < 4 else "float32"
        return self.flops.get(name, self.flops["float32"])


def measure(
    threads: int | None = None, seconds: float = SECONDS, *, products: bool = True, device: str = "cpu"
) -> MachineLimits:
    """Measure in a process of its own, so that neither a loaded model nor a missing torch is in the way.

    products: also measure matrix products, else memory and calls alone. device: cpu, or a GPU as torch names it. Raises
    EnvironmentFault when that process fails.
    """
    command = [sys.executable, "-m", "penstock.devices.probe", "--seconds", str(seconds)]
    command += ["--device", device, *([] if products else ["--memory"])]
    command += [] if threads is None else ["--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        why = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise EnvironmentFault("the machine's limits could not be measured", why)
    return MachineLimits(**json.loads(done.stdout))


def _probe(threads: int, seconds: float, products: bool) -> MachineLimits:
    import torch

    from penstock.devices.cpu import zeros_on_demand

    # filled, or every page would be the system's one page of zeros, which no memory has to deliver
    memory = zeros_on_demand((READ_BYTES // 8,), torch.int64, huge=True).fill_(1)
    reads = _times(memory.sum, seconds)
    flops = {}
    for name in FORMATS if products else ():
        try:
            flops[name] = 2.0 * SIDE**3 / min(_times(_product(name), seconds))
        except RuntimeError:  # this build of torch, or this processor, has no such product
            continue
    calls = call_seconds(threads, seconds)
    return MachineLimits(threads, READ_BYTES / _median(reads), READ_BYTES / min(reads), flops, calls)


def _probe_card(device: str, threads: int, seconds: float, products: bool) -> MachineLimits:
    """What a copy moves, read and written, and what products of large matrices reach."""
    import torch

    torch.cuda.set_device(device)
    size = min(2**32, torch.cuda.mem_get_info()[0] // 4)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    copied = torch.empty_like(source)

    def copy() -> None:
        copied.copy_(source)
        torch.cuda.synchronize()

    def multiply() -> None:
        torch.matmul(a, b, out=c)
        torch.cuda.synchronize()

    copies = _times(copy, seconds)
    flops = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)) if products else ():
        a, b, c = (torch.randn(_CARD_SIDE, _CARD_SIDE, device=device).to(dtype) for _ in range(3))
        flops[name] = 2.0 * _CARD_SIDE**3 / min(_times(multiply, seconds))
    if "bfloat16" in flops:  # 8-bit weights meet 16-bit rows in all but the largest steps
        flops["int8"] = flops["bfloat16"]
    calls = call_seconds(threads, seconds)
    return MachineLimits(threads, 2 * size / _median(copies), 2 * size / min(copies), flops, calls)


def call_seconds(threads: int, seconds: float) -> float:
    """What Python and the threads take for what a decoder does several times a layer: memory for a result, a call of
    compiled code by addresses, and all threads at work and done. threads: those that torch has. Measures for `seconds`.
    """
    import torch

    shared = torch.zeros(threads * _GRAIN, dtype=torch.uint8)  # lies in the caches, so that only the call counts
    compiled = ctypes.CDLL(None).memcmp
    compiled.argtypes, compiled.restype = [ctypes.c_void_p] * 2 + [ctypes.c_size_t], ctypes.c_int

    def call() -> None:
        for _ in range(_CALLS):
            out = shared.new_empty(1, 256)
            compiled(shared.data_ptr(), out.data_ptr(), out.shape[0])
            shared.fill_(1)

    return _median(_times(call, seconds)) / _CALLS


def _product(name: str) -> Callable[[], object]:
    """A square matrix product as the engine does it in that format, its weights packed beforehand."""
    import torch

    if name == "int8":  # 8-bit activations without sign, 8-bit weights, the sums in float32
        x = torch.randint(0, 255, (SIDE, SIDE), dtype=torch.uint8)
        w = torch.ops.onednn.qlinear_prepack(torch.randint(-127, 127, (SIDE, SIDE), dtype=torch.int8), [SIDE, SIDE])
        scales, zeros = torch.ones(SIDE), torch.zeros(SIDE, dtype=torch.int64)
        return lambda: torch.ops.onednn.qlinear_pointwise(
            x, 1.0, 128, w, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
    dtype = getattr(torch, name)
    a, b = torch.randn(SIDE, SIDE).to(dtype), torch.randn(SIDE, SIDE).to(dtype)
    if dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        packed = torch.ops.mkldnn._reorder_linear_weight(b, SIDE)
        return lambda: torch.ops.mkldnn._linear_pointwise(a, packed, None, "none", [], "")
    return lambda: torch.nn.functional.linear(a, b)


def _times(call: Callable[[], object], seconds: float) -> list[float]:
    """Seconds of each call, for that long and three times at least; the first call is not counted."""
    call()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        since = time.perf_counter()
        call()
        times.append(time.perf_counter() - since)
    return times


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for each quantity")
    parser.add_argument("--memory", action="store_true", help="no matrix products")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    threads = bind_threads(args.threads)  # before torch is imported
    if args.device == "cpu":
        limits = _probe(threads, args.seconds, not args.memory)
    else:
        limits = _probe_card(args.device, threads, args.seconds, not args.memory)
    print(json.dumps(asdict(limits)))


if __name__ == "__main__":
    main()
