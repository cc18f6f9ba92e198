"""Does a model fit on some hardware, in which format, with how many sequences, how fast: one `Plan`."""

from __future__ import annotations

from dataclasses import dataclass

from penstock.plan.hardware import Device
from penstock.plan.roofline import prompt_seconds, tokens_per_second
from penstock.plan.shape import Shape
from penstock.plan.weights import HALVES, kv_bytes, kv_bytes_per_token, resident_bytes, weight_bytes

SHARE = 0.9  # of the free memory that weights and cache may take, as the engine's own default
STEP_TOKENS = 2048  # the engine's budget of a step
MAX_ROWS = 256  # more rows a step than this are not planned for
FALLBACKS = ("fp8", "int8", "int4")  # what to compress to when a checkpoint's own format does not fit
MAX_CARDS = 8


@dataclass(frozen=True)
class Plan:
    """One model in one format on `cards` devices. Bytes and seconds.

    weights: of a checkpoint of this format; need: all that must be resident for one sequence of `tokens`; have: what
    the devices offer; sequences: how many of `tokens` fit beside the weights (0: it does not fit); batch: the rows that
    `batch_tokens_per_second` is for; load: seconds to read the weights.
    """

    form: str
    device: Device
    cards: int
    tokens: int
    weights: int
    resident: int
    kv_token: int
    activations: int
    overhead: int
    have: int
    sequences: int
    batch: int
    tokens_per_second: float
    batch_tokens_per_second: float
    first_token_seconds: float
    load_seconds: float

    @property
    def fits(self) -> bool:
        """Whether at least one sequence of the asked length fits."""
        return self.sequences > 0

    @property
    def need(self) -> int:
        """Bytes for one sequence of `tokens`."""
        return self.resident + self.activations + self.overhead + self.kv_token * self.tokens


def plan_on(
    shape: Shape, form: str, device: Device, cards: int, tokens: int, disk: float, batch: int | None = None
) -> Plan:
    """Plan one format on a given number of devices. tokens: prompt and output of a sequence; disk: bytes a second;
    batch: the rows to predict for (None: as many as fit)."""
    resident = resident_bytes(shape, form, device.is_cpu)
    activations = activation_bytes(shape, form, tokens) * (1 if device.is_cpu else cards)
    usable = int(max(0, device.memory - device.runtime) * SHARE) * cards
    sequences = max(0, (usable - resident - activations) // max(1, kv_bytes(shape, form, tokens)))
    rows = batch or max(1, min(sequences, MAX_ROWS))
    context = tokens // 2  # on average over a generation
    return Plan(
        form=form,
        device=device,
        cards=cards,
        tokens=tokens,
        weights=weight_bytes(shape, form),
        resident=resident,
        kv_token=kv_bytes_per_token(shape, form),
        activations=activations,
        overhead=device.runtime * cards,
        have=usable + device.runtime * cards,
        sequences=sequences,
        batch=rows,
        tokens_per_second=tokens_per_second(shape, form, device, cards, 1, context),
        batch_tokens_per_second=tokens_per_second(shape, form, device, cards, rows, context),
        first_token_seconds=prompt_seconds(shape, form, device, cards, context),
        load_seconds=weight_bytes(shape, form) / disk,
    )


def best_plan(
    shape: Shape,
    stored: str,
    device: Device,
    tokens: int,
    disk: float,
    cards: int | None,
    batch: int | None = None,
    max_cards: int = MAX_CARDS,
) -> Plan:
    """The checkpoint's own format on the fewest devices that hold it (or on `cards`), else the widest smaller format
    that fits on as many; when nothing fits, the plan of the stored format, which says so."""
    counts = [cards] if cards else [1]
    while not cards and not device.is_cpu and 2 * counts[-1] <= max_cards:
        counts.append(2 * counts[-1])
    own = native(stored, device)
    for count in counts:
        plan = plan_on(shape, own, device, count, tokens, disk, batch)
        if plan.fits:
            return plan
    for form in FALLBACKS:
        if form == "fp8" and not device.runs("fp8"):
            continue
        for count in counts:
            smaller = plan_on(shape, form, device, count, tokens, disk, batch)
            if smaller.fits and smaller.weights < plan.weights:
                return smaller
    return plan


def native(stored: str, device: Device) -> str:
    """The format that a checkpoint is run in: halves of the kind that the device multiplies, else float32."""
    if stored in HALVES and not device.runs(stored):
        other = next((form for form in HALVES if device.runs(form)), None)
        return other or "float32"
    return stored


def activation_bytes(shape: Shape, form: str, tokens: int) -> int:
    """The most that the intermediate results of one step take, as the engine reserves it."""
    item = 4 if form == "float32" else 2
    width = shape.heads * shape.head_dim
    inner = shape.intermediate * max(1, shape.chosen)
    rows = min(STEP_TOKENS, max(1, tokens))
    gathered = shape.kv_width * tokens
    logits = 128 * shape.vocab * 16  # float32 scores of the rows of a step, and for draws a copy and probabilities
    return (rows * (4 * shape.hidden + 3 * inner + 2 * width) + gathered) * item + logits
