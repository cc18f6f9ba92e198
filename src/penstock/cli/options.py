"""Options that several commands share, and what they become: a snapshot, an EngineConfig."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from penstock.errors import UsageError

if TYPE_CHECKING:
    from penstock.engine.config import EngineConfig
    from penstock.hub.snapshot import Snapshot

F = TypeVar("F", bound=Callable[..., Any])
KV_DTYPES = ("int8", "fp8_e4m3fn", "fp8_e5m2")
DTYPES = ("auto", "float32", "bfloat16", "float16")
_FORMATS = ("none", "bf16", "fp8", "int8", "int4", "auto")
_NEAREST = {"eetq": "int8", "bitsandbytes": "int8", "bitsandbytes-nf4": "int4", "bitsandbytes-fp4": "int4"}
_STORED = ("awq", "compressed-tensors", "exl2", "gptq", "marlin")


class FiniteFloat(click.ParamType):
    """A float between two bounds; unlike click's range it refuses NaN and infinity."""

    name = "number"

    def __init__(self, low: float = -math.inf, high: float = math.inf, *, above_low: bool = False) -> None:
        self.low, self.high, self.above_low = low, high, above_low

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number, or click's usage error naming the bounds."""
        try:
            number = float(value)
        except (TypeError, ValueError):
            self.fail(f"{value!r} is not a number.", param, ctx)
        bounded = self.low < number if self.above_low else self.low <= number
        if not math.isfinite(number) or not bounded or number > self.high:
            self.fail(f"{value} is out of bounds ({self._bounds()}).", param, ctx)
        return number

    def _bounds(self) -> str:
        low = f"{'above' if self.above_low else 'at least'} {self.low:g}" if self.low > -math.inf else ""
        high = f"at most {self.high:g}" if self.high < math.inf else ""
        return ", ".join(bound for bound in (low, high) if bound) or "finite"


class Whole(click.ParamType):
    """A whole number between two bounds; unlike click's range it keeps the bounds out of --help."""

    name = "number"

    def __init__(self, low: int, high: int = 2**31 - 1) -> None:
        self.low, self.high = low, high

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number, or click's usage error naming the bounds."""
        if isinstance(value, bool | float):  # from a TOML file
            self.fail(f"{value!r} is not a whole number.", param, ctx)
        try:
            number = int(value)
        except (TypeError, ValueError):
            self.fail(f"{value!r} is not a whole number.", param, ctx)
        if not self.low <= number <= self.high:
            self.fail(f"{number} is out of bounds (at least {self.low}, at most {self.high}).", param, ctx)
        return number


class PortRange(click.ParamType):
    """LOW-HIGH, two port numbers; 0-0 stands for whatever the system gives."""

    name = "ports"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """The first and the last port, or click's usage error."""
        low, _, high = str(value).partition("-")
        if not (low.isdecimal() and high.isdecimal() and int(low) <= int(high) <= 65535):
            self.fail(f"{value!r} is not a range of ports such as 20000-20100.", param, ctx)
        return int(low), int(high)


class DecodeSizes(click.ParamType):
    """Batch sizes with commas between them; 0 is none at all."""

    name = "sizes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """The sizes in order, or click's usage error."""
        if isinstance(value, list | tuple):  # from a TOML file
            value = ",".join(map(str, value))
        parts = [part.strip() for part in str(value).split(",")]
        if not all(part.isdecimal() and int(part) <= 4096 for part in parts):
            self.fail(f"{value!r} is not a list of batch sizes such as 1,2,4,8.", param, ctx)
        return tuple(sorted({int(part) for part in parts} - {0}))


def stack(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator, shown by --help in the order given."""

    def apply(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


class WeightFormat(click.ParamType):
    """none, fp8, int8 or int4; TGI's names of formats that quantize while loading mean the nearest of ours.

    Its names of formats that a checkpoint comes in ask for what config.json says anyway: see `weight_format`.
    """

    name = "format"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name as it was given."""
        if value in (*_FORMATS, *_NEAREST, *_STORED):
            return str(value)
        self.fail(f"{value!r} is not one of {', '.join(_FORMATS)}", param, ctx)


COUNT = Whole(1)
SEED = Whole(0, 2**64 - 1)

model_argument = click.argument("model")

source_options = stack(
    click.option("--revision", metavar="REV", help="Branch, tag or commit of a hub model.  [default: main]"),
    click.option("--offline", is_flag=True, help="Never ask the hub; use what is on this machine."),
)

code_option = click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Run the model's own Python code where it needs it: of a folder, or of a commit given by --revision.",
)

engine_options = stack(
    code_option,
    click.option("--offload-folder", metavar="DIR", help="For weights that fit no memory.  [default: in the cache]"),
    click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True, help="Of weights and KV."),
    click.option(
        "--quantize",
        type=WeightFormat(),
        metavar=f"[{'|'.join(_FORMATS)}]",
        default="none",
        show_default=True,
        help="Keep the weights in 8 or 4 bits: a half or a third of the memory, and faster. auto: what fits.",
    ),
    click.option("--dummy-weights", is_flag=True, help="Random weights: config.json is all that MODEL needs."),
    click.option("--max-batch-size", type=COUNT, help="Sequences that run together.  [default: from memory]"),
    click.option("--max-batch-total-tokens", type=COUNT, help="Tokens of KV memory.  [default: from memory]"),
    click.option("--max-batch-prefill-tokens", type=COUNT, help="Tokens of one step.  [default: by processor]"),
    click.option("--max-total-tokens", type=COUNT, help="Prompt and answer together.  [default: the model's]"),
    click.option("--threads", type=COUNT, help="Processor threads.  [default: the cores that are ours]"),
    click.option(
        "--packed-copy",
        default="auto",
        show_default=True,
        metavar="[auto|off|DIR]",
        help="Where packed weights are kept for the next start; auto: in the cache, if that is a local disk.",
    ),
    click.option(
        "--memory-fraction",
        type=FiniteFloat(0, 1, above_low=True),
        default=0.9,
        show_default=True,
        help="Share of the free memory that weights and KV may take.",
    ),
    click.option(
        "--kv-cache-gib", type=FiniteFloat(0, 1e6, above_low=True), help="GiB of KV memory.  [default: what is left]"
    ),
    click.option(
        "--device", default="auto", show_default=True, metavar="[auto|cpu|cuda[:I]]", help="Where the model computes."
    ),
    click.option(
        "--cuda-memory-fraction",
        type=FiniteFloat(0, 1, above_low=True),
        default=0.9,
        show_default=True,
        help="Share of the whole GPU that this process may take.",
    ),
    click.option(
        "--kv-cache-dtype",
        type=click.Choice(KV_DTYPES),
        help="Of the KV cache: int8 on a processor, fp8 on a GPU.  [default: what is computed in]",
    ),
    click.option(
        "--cuda-graphs",
        type=DecodeSizes(),
        metavar="N,N,...",
        help="Batch sizes whose decoding is captured; 0: none.  [default: 1,2,4 ... 512]",
    ),
)


def _keep_to(_context: click.Context, _param: click.Parameter, value: str | None) -> None:
    if value is not None:
        from penstock.devices.places import keep_to

        keep_to(value)


cpus_option = click.option(
    "--cpus",
    metavar="LIST",
    callback=_keep_to,
    expose_value=False,
    help="Keep to processors: 0-15, or node0 for those of a NUMA node and its memory.  [default: all that are ours]",
)

adapter_options = stack(
    click.option("--max-adapters", type=COUNT, default=64, show_default=True, help="LoRA adapters at a time."),
    click.option("--max-adapter-rank", type=COUNT, default=256, show_default=True, help="Largest rank of an adapter."),
    click.option(
        "--max-adapter-bytes",
        type=Whole(0, 2**63 - 1),
        help="Memory for adapters.  [default: those given, and half of what is free]",
    ),
)

sampling_options = stack(
    click.option(
        "--temperature",
        type=FiniteFloat(0, 1e6),
        help="Spread of the choice; 0 is greedy.  [default: greedy; 1 with --top-k, --top-p or --typical-p]",
    ),
    click.option("--top-k", type=Whole(0), help="Choose among the K likeliest; 0 is all."),
    click.option("--top-p", type=FiniteFloat(0, 1, above_low=True), help="Choose among the likeliest that sum to P."),
    click.option("--typical-p", type=FiniteFloat(0, 1, above_low=True), help="Locally typical sampling."),
    click.option("--repetition-penalty", type=FiniteFloat(0, 1e6, above_low=True), help="1 is none."),
    click.option("--frequency-penalty", type=FiniteFloat(-2, 2), help="0 is none."),
    click.option("--seed", type=SEED, help="Of the random draws.  [default: 0]"),
)


def find_model(model: str, revision: str | None, offline: bool, code: bool = False) -> Snapshot:
    """The snapshot that the MODEL argument and the source options name. code: with its own Python code."""
    from penstock.hub.snapshot import resolve

    return resolve(model, revision, offline=True if offline else None, code=code)


def weight_format(name: str) -> str:
    """Our format for a name that WeightFormat let pass; says so on stderr where the name is TGI's."""
    if name in _NEAREST:
        print(f"note: --quantize {name} means {_NEAREST[name]} here", file=sys.stderr)
        return _NEAREST[name]
    if name in _STORED:
        print(f"note: --quantize {name} has no effect: the checkpoint's config.json says it", file=sys.stderr)
        return "none"
    return name


def engine_config(snapshot: Snapshot, options: dict[str, Any]) -> EngineConfig:
    """The EngineConfig of the engine options; `options` may hold others, which are left alone."""
    from penstock.engine.config import EngineConfig

    fields = {name: options[name] for name in EngineConfig.__struct_fields__ if options.get(name) is not None}
    fields["quantize"] = weight_format(options.get("quantize", "none"))
    fields |= {"model_path": str(snapshot.path), "model_name": snapshot.name, "trust_remote_code": snapshot.trusted}
    return EngineConfig(**fields)


def adapters_of(given: Iterable[str], offline: bool) -> dict[str, str]:
    """LoRA adapters as `NAME=SOURCE` or `SOURCE`, each perhaps several with commas between them, to {name: folder}."""
    from penstock.hub.adapters import parse_adapters, resolve_adapter

    sources = parse_adapters(",".join(given))
    return {name: str(resolve_adapter(source, offline=True if offline else None)) for name, source in sources.items()}


def check_apart(source: Path | None, output: Path | None) -> None:
    """Raise UsageError when the output is the very file that is read, under whatever name: it would be lost."""
    same = False
    if source is not None and output is not None:
        with contextlib.suppress(OSError):  # one of them is not there, or not to be seen: whoever opens it says so
            same = source.is_file() and source.samefile(output)
    if same:
        raise UsageError(f"The output {output} is the input.", "Writing it would destroy the prompts.", "Give another.")


def input_path(value: str) -> Path | None:
    """The path of an input or output argument; `-` (stdin or stdout) is None."""
    return None if value == "-" else Path(value).expanduser()
