"""The sums of memory: weights, KV cache, the largest step. Bytes throughout."""

from __future__ import annotations

from dataclasses import dataclass

from penstock.errors import ResourceError

GIB = 2**30
CARD_MARGIN = 2**28  # of a GPU's memory: what drivers and allocators round up
_SHORT = 16  # blocks of a text that is worth starting for


class WeightsTooLarge(ResourceError):
    """The weights leave no room for a short text beside them."""


@dataclass(frozen=True)
class Footprint:
    """What a model takes. kv_per_token: keys and values of one token over all layers; step: the largest step's
    intermediate results; adapters: those that are loaded with it."""

    weights: int
    kv_per_token: int
    step: int
    adapters: int = 0

    @property
    def fixed(self) -> int:
        """All but keys and values."""
        return self.weights + self.adapters + self.step


@dataclass(frozen=True)
class KVPlan:
    """How the cache is cut: blocks of block_size tokens. spare: bytes that nothing is planned for."""

    num_blocks: int
    block_size: int
    kv_bytes: int
    reason: str
    spare: int


def human(n: float) -> str:
    """A size for people: `3.1 GiB`, `512 MiB`."""
    for unit, size in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if n >= size:
            return f"{n / size:.3g} {unit}" if n < 1000 * size else f"{n / size:.0f} {unit}"
    return f"{n:.0f} B"


def plan_kv(
    footprint: Footprint,
    available: int,
    fraction: float,
    block_size: int,
    total_tokens: int,
    asked_tokens: int | None,
    rows: int,
) -> KVPlan:
    """Decide the number of KV blocks before anything is loaded.

    available: free bytes; fraction: the share that may be taken; total_tokens: the longest sequence that must fit;
    asked_tokens: KV slots that the user asked for, or None: then enough for `rows` longest sequences, but at most a
    quarter of the memory beyond what one longest sequence takes. Raises ResourceError when it does not fit.
    """
    usable = int(available * fraction)
    room = usable - footprint.fixed
    block = footprint.kv_per_token * block_size
    least = -(-total_tokens // block_size)
    if asked_tokens is not None:
        blocks, reason = asked_tokens // block_size, "asked for"
        if blocks < least:
            raise ResourceError(
                f"--max-batch-total-tokens {asked_tokens} holds less than one sequence of {total_tokens} tokens",
                hint=f"raise it, or lower --max-total-tokens to {asked_tokens // block_size * block_size}",
            )
    else:
        wanted, generous = least * rows, max(0, min(room, usable // 4)) // block
        blocks = max(least, min(wanted, generous))
        if blocks == wanted:
            reason = f"{rows} x {total_tokens} tokens"
        else:
            reason = "one longest sequence" if blocks == least else "a quarter of the free memory"
    need = footprint.fixed + blocks * block
    if need > usable:
        short = min(least, _SHORT) * block
        kind = WeightsTooLarge if footprint.weights + footprint.step + short > usable else ResourceError
        raise kind(
            f"too little memory: need {human(need)}, have {human(usable)} "
            f"({fraction:.0%} of the {human(available)} that are free)",
            f"weights {human(footprint.weights)} + KV of {blocks * block_size} tokens {human(blocks * block)} "
            f"+ step {human(footprint.step)}"
            + (f" + adapters {human(footprint.adapters)} (--max-adapter-bytes)" if footprint.adapters else ""),
            "try --max-total-tokens or --max-batch-total-tokens (smaller), --dtype bfloat16, "
            "or --max-batch-prefill-tokens (smaller)",
        )
    return KVPlan(blocks, block_size, blocks * block, reason, usable - need)


@dataclass(frozen=True)
class CardMemory:
    """What was measured on a GPU once the weights lie there and one largest step has run; bytes.

    total: of the card; free: that nobody holds now; held: by this process, weights and all, without the step's
    intermediate results; step: those, at their most; graphs: what captured steps will take beyond.
    """

    total: int
    free: int
    held: int
    step: int
    graphs: int


def plan_card(
    card: CardMemory, fraction: float, kv_per_token: int, block_size: int, kv_bytes: int | None, tokens: int | None
) -> KVPlan:
    """Decide the number of KV blocks on a GPU from what is really free.

    fraction: of the whole card that this process may hold. kv_bytes, tokens: what the user asked for, or None: then all
    that is left. Other processes keep what they have. Raises ResourceError when it does not fit.
    """
    reserve = card.step + card.step // 10 + card.graphs + CARD_MARGIN
    room = min(int(card.total * fraction) - card.held, card.free) - reserve
    block = kv_per_token * block_size
    if tokens is not None:
        blocks, reason = tokens // block_size, "--max-batch-total-tokens"
    elif kv_bytes is not None:
        blocks, reason = kv_bytes // block, "--kv-cache-gib"
    else:
        blocks, reason = max(0, room) // block, "all that is left"
    if blocks < 1 or blocks * block > room:
        raise ResourceError(
            f"too little memory on the GPU: KV of {human(max(blocks, 1) * block)}, room for {human(max(room, 0))}",
            f"of {human(card.total)} {human(card.free)} are free; this server holds {human(card.held)} and keeps "
            f"{human(reserve)} for its steps; it may take {fraction:.0%} (--cuda-memory-fraction)",
            "try --quantize fp8, --kv-cache-dtype fp8_e4m3fn, or a smaller --max-batch-size; end what else runs there",
        )
    return KVPlan(blocks, block_size, blocks * block, reason, room - blocks * block)


def longest_that_fits(footprint: Footprint, available: int, fraction: float, block_size: int) -> int:
    """Tokens of the longest single sequence that the memory holds; 0 when not even the weights fit."""
    room = int(available * fraction) - footprint.fixed
    return max(0, room // (footprint.kv_per_token * block_size)) * block_size
