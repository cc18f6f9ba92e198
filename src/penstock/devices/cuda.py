"""GPUs that torch drives through torch.cuda: NVIDIA's with CUDA, AMD's with ROCm.

What is said of CUDA here holds for both; torch names AMD's cards `cuda` too. CUDA_VISIBLE_DEVICES (ROCm:
HIP_VISIBLE_DEVICES) decides which there are, and their numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from penstock.devices.cpu import DTYPES
from penstock.errors import EnvironmentFault, UsageError
from penstock.plan.memory import human

KV_DTYPES = {"fp8_e4m3fn": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


@dataclass(frozen=True)
class Card:
    """One GPU. memory: bytes of all of it; capability: CUDA's compute capability, or the name of AMD's architecture."""

    index: int
    name: str
    memory: int
    capability: str
    runtime: str

    def __str__(self) -> str:
        return f"{self.name} (cuda:{self.index}, {self.capability}, {self.runtime}), {human(self.memory)}"


def runtime() -> str:
    """What torch was built for: `CUDA 13.0`, `ROCm 7.1`, or nothing."""
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else ""


def cards() -> list[Card]:
    """The GPUs that this process may use; none where torch cannot use any."""
    with warnings.catch_warnings():  # a driver that is too old is said by `why_none`, in our words
        warnings.simplefilter("ignore")
        if not torch.cuda.is_available():
            return []
    found = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        capability = getattr(p, "gcnArchName", "") if torch.version.hip else f"{p.major}.{p.minor}"
        found.append(Card(i, p.name, p.total_memory, capability, runtime()))
    return found


def choose_device(asked: str) -> torch.device:
    """The device that `--device` names: auto (a GPU if there is one), cpu, cuda, cuda:I.

    Raises UsageError for another name, EnvironmentFault for a GPU that is not there.
    """
    kind, _, number = asked.partition(":")
    if asked not in ("auto", "cpu", "cuda") and not (kind == "cuda" and number.isdecimal()):
        raise UsageError(f"unknown device {asked!r}", hint="--device takes auto, cpu, cuda, or cuda:1 for the second")
    if asked == "cpu":
        return torch.device("cpu")
    found = cards()
    if asked == "auto" and not found:
        return torch.device("cpu")
    index = int(number) if number else 0
    if index >= len(found):
        why = f"there are {len(found)} GPUs, numbered from 0 (CUDA_VISIBLE_DEVICES)" if found else why_none()
        raise EnvironmentFault(f"no GPU for --device {asked}", why, "see `penstock doctor`; --device cpu does without")
    return torch.device("cuda", index)


def why_none() -> str:
    """Why torch finds no GPU."""
    if not runtime():
        return f"torch {torch.__version__} was built for the processor alone"
    return f"torch is built for {runtime()}, but its driver shows no GPU"


def free_and_total(device: torch.device) -> tuple[int, int]:
    """Bytes of the card that nobody holds, and all of it. What torch keeps for itself counts as held."""
    free, total = torch.cuda.mem_get_info(device)
    return free, total


def has_fp8(device: torch.device) -> bool:
    """Whether a card reads 8-bit floats: NVIDIA's since compute capability 8.9, AMD's that ROCm drives."""
    return device.type != "cuda" or bool(torch.version.hip) or torch.cuda.get_device_capability(device) >= (8, 9)


def require_formats(quantize: str, kv_cache_dtype: str | None, device: torch.device) -> None:
    """Raises UsageError where a card has not the numbers that are asked for."""
    if (quantize == "fp8" or kv_cache_dtype is not None) and not has_fp8(device):
        raise UsageError(
            f"{torch.cuda.get_device_name(device)} has no 8-bit floats",
            hint="take --quantize int8, and leave --kv-cache-dtype out",
        )


def usable_bytes(device: torch.device, fraction: float) -> int:
    """Bytes that this process may still take of a card: no more than is free, and of all of it no more than a share."""
    free, total = free_and_total(device)
    return min(free, int(total * fraction))


def describe(device: torch.device) -> str:
    """A card in words, and this process told to use it."""
    torch.cuda.set_device(device)
    return str(cards()[device.index or 0])


def peak_bytes(work: Callable[[], None]) -> int:
    """The most that `work` held at once beside what was there before."""
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - held


def give_back() -> None:
    """Let the card have what torch keeps for later and nobody uses."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def choose_dtype(asked: str, checkpoint: str | None) -> tuple[torch.dtype, str]:
    """The data type to compute in on a GPU, and why. asked: auto or a name; checkpoint: what config.json names.
    `auto` loses nothing that the checkpoint has."""
    if asked != "auto":
        if asked not in DTYPES:
            raise UsageError(f"unknown dtype {asked!r}", hint=f"choose one of auto, {', '.join(DTYPES)}")
        return DTYPES[asked], "asked for"
    if checkpoint not in ("bfloat16", "float16"):
        return torch.float32, f"the checkpoint is {checkpoint or 'of unstated type'}"
    if checkpoint == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16, "the card has no bf16"
    return DTYPES[checkpoint], "as the checkpoint is"
