"""What a front end and the engine process say to each other beside requests and steps: msgpack over a socket pair."""

from __future__ import annotations

import msgspec

from penstock.engine.limits import Limits
from penstock.engine.output import StepOutput
from penstock.engine.request import EngineRequest


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """Forget a request: its blocks return at the next step, nothing more is sent for it."""

    id: int


class LoadAdapter(msgspec.Struct, frozen=True, omit_defaults=True, tag="load_adapter"):
    """Load a LoRA adapter under a name, from a folder. replace: in the place of one that has the name."""

    id: int
    name: str
    folder: str
    replace: bool = False


class UnloadAdapter(msgspec.Struct, frozen=True, tag="unload_adapter"):
    """Forget an adapter. Requests that run on it finish with it; its memory returns with the last of them."""

    id: int
    name: str


class AdapterReply(msgspec.Struct, frozen=True, omit_defaults=True, tag="adapter"):
    """How a LoadAdapter or an UnloadAdapter went; failure: None where it went well."""

    id: int
    failure: Failed | None = None


class Stage(msgspec.Struct, frozen=True, tag="stage"):
    """One finished stage of start-up, for people: what it did and the seconds it took."""

    name: str
    text: str
    seconds: float


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The engine can take requests."""

    limits: Limits


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The engine could not start, or gives up; the parts of a PenstockError."""

    exit_code: int
    what: str
    why: str = ""
    hint: str = ""


class Beat(msgspec.Struct, frozen=True, tag="beat"):
    """The engine process is alive, though it may be busy with a long step."""


ToEngine = EngineRequest | Abort | LoadAdapter | UnloadAdapter
FromEngine = StepOutput | Stage | Ready | Failed | Beat | AdapterReply
