"""What a farm is: its model, prompts and parameters, how they are cut into shards, and what each partition runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

import msgspec

from penstock.batch.parameters import Parameters
from penstock.batch.record import RunRecord
from penstock.errors import UsageError

VERSION = 1
_Count = Annotated[int, msgspec.Meta(ge=1)]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantize = Literal["none", "bf16", "fp8", "int8", "int4", "auto"]


class Profile(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True, kw_only=True):
    """How one partition runs the farm. None is the farm's own value, or what Penstock or the site derives.

    The first part is the engine's, the second the job's. model: a variant of the farm's model for this hardware, such
    as a quantized checkpoint. gpus: a number of cards, or `TYPE:N`.
    """

    model: str | None = None
    dtype: Dtype | None = None
    quantize: Quantize | None = None
    max_batch_size: _Count | None = None
    max_batch_total_tokens: _Count | None = None
    max_batch_prefill_tokens: _Count | None = None
    max_total_tokens: _Count | None = None
    memory_fraction: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    threads: _Count | None = None

    cpus: _Count | None = None
    gpus: int | Annotated[str, msgspec.Meta(pattern="^([^:=,]+:)?[0-9]+$")] | None = None
    mem: str | None = None
    time: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None

    def engine_options(self) -> dict[str, Any]:
        """The part that the engine is told, without what is unset."""
        return {name: getattr(self, name) for name in ENGINE_FIELDS if getattr(self, name) is not None}

    def over(self, base: Profile) -> Profile:
        """The same, with the values of `base` where it has none."""
        return Profile(**{name: _or(getattr(self, name), getattr(base, name)) for name in self.__struct_fields__})

    def settings(self) -> str:
        """What workers of one farm may do differently at any time, as `parse_settings` reads it; perhaps nothing."""
        free = {name: value for name, value in self.engine_options().items() if name not in _DECIDES_TEXT}
        return ",".join(f"{name.replace('_', '-')}={value}" for name, value in free.items())


ENGINE_FIELDS = (
    "dtype",
    "quantize",
    "max_batch_size",
    "max_batch_total_tokens",
    "max_batch_prefill_tokens",
    "max_total_tokens",
    "memory_fraction",
    "threads",
)
_DECIDES_TEXT = ("dtype", "quantize")


class ModelCopy(msgspec.Struct, frozen=True, kw_only=True):
    """A model folder that every node can read. name: as it was asked for. trusted: its own Python code may run."""

    name: str
    path: str
    sha256: str
    trusted: bool = False


class InputStamp(msgspec.Struct, frozen=True, kw_only=True):
    """The file of prompts when it was read, so that a change is noticed. shape: how it was read."""

    path: str
    size: int
    mtime_ns: int
    form: str
    shape: dict[str, str]


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds. beat: between two signs of life; lease: without one, and the shard is free; commit: between two times
    that results are forced to disk; idle: without a shard to claim, and a worker leaves; grace: for what is running
    when a worker is asked to leave; patience: for a full disk."""

    lease: float = 60.0
    beat: float = 5.0
    commit: float = 5.0
    idle: float = 300.0
    grace: float = 2.0
    patience: float = 300.0


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """farm.json: written once. rows, shards: the names of the two files beside it; see spool.py."""

    version: int = VERSION
    record: RunRecord
    parameters: Parameters
    rows: str
    shards: str
    shards_sha256: str
    models: dict[str, ModelCopy]  # by partition; "" is the farm's own
    profiles: dict[str, Profile]
    shard_rows: int
    timing: Timing
    source: InputStamp | None = None  # None: the prompts came from no file
    stats: bool = False  # write a report when all is merged

    def profile(self, partition: str) -> Profile:
        """The profile of a partition, with the values that hold for all where it has none."""
        return self.profiles.get(partition, Profile()).over(self.profiles.get("", Profile()))

    def adjusted(self, profiles: Mapping[str, Profile]) -> Manifest:
        """The same farm, with what these profiles say instead of what its own do. The file stays as it is."""
        names = {*self.profiles, *profiles}
        merged = {name: profiles.get(name, Profile()).over(self.profiles.get(name, Profile())) for name in names}
        return msgspec.structs.replace(self, profiles=merged)

    def model(self, partition: str) -> ModelCopy:
        """The model that a partition runs."""
        return self.models.get(partition, self.models[""])


def parse_profiles(texts: list[str]) -> dict[str, Profile]:
    """Profiles from the command line, each `PARTITION:name=value,...`. Raises UsageError."""
    found: dict[str, Profile] = {}
    for text in texts:
        partition, colon, settings = text.partition(":")
        pairs = [pair.partition("=") for pair in settings.split(",") if pair.strip()]
        if not colon or not partition or not pairs or not all(equals for _, equals, _ in pairs):
            raise UsageError(
                f"--profile {text!r} is not PARTITION:name=value,...",
                f"Names are {_NAMES}.",
                "For example: --profile gpu:quantize=int8,max-batch-size=64,gpus=1,time=2:00:00",
            )
        own = {name.strip().replace("-", "_"): value.strip() for name, _, value in pairs}
        found[partition] = as_profile(own, f"--profile {text!r}").over(found.get(partition, Profile()))
    return found


def parse_settings(text: str) -> Profile:
    """`name=value,...` without a partition. Raises UsageError."""
    return parse_profiles([f"own:{text}"])["own"] if text else Profile()


def as_profile(values: Mapping[str, object], said: str) -> Profile:
    """Names and values as a profile; texts may stand for numbers. said: what to call it. Raises UsageError."""
    try:
        return msgspec.convert(dict(values), Profile, strict=False)
    except msgspec.ValidationError as error:
        why, _, where = str(error).replace("`", repr("")[0]).partition(" - at '$.")
        name = where.strip("'")
        if choices := _CHOICES.get(name):
            why = f"{values[name]!r} is not one of {', '.join(choices)}"
        said = f"{said}: {name.replace('_', '-')}" if name else said
        raise UsageError(f"{said}: {why}.", f"Names are {_NAMES}.") from None


_CHOICES = {"dtype": get_args(Dtype), "quantize": get_args(Quantize)}
_NAMES = ", ".join(name.replace("_", "-") for name in Profile.__struct_fields__)


def text_deciding(models: dict[str, ModelCopy], profiles: dict[str, Profile]) -> dict[str, Any]:
    """The part of the profiles that changes what is generated, for the record of the run."""
    found: dict[str, Any] = {}
    for partition in sorted({*models, *profiles} - {""}):
        profile = profiles.get(partition, Profile())
        own = {name: getattr(profile, name) for name in _DECIDES_TEXT if getattr(profile, name) is not None}
        if partition in models:
            own["model_sha256"] = models[partition].sha256
        if own:
            found[partition] = own
    return found


@dataclasses.dataclass(frozen=True)
class Shard:
    """Consecutive rows. offset, size: bytes in the file of rows; first: the number of its first row."""

    number: int
    first: int
    rows: int
    offset: int
    size: int
    sha256: str


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
