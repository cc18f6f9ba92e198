"""The lines of TGI's launcher, in its order and words, for scripts that wait for one of them. On stdout, as there."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime

from penstock.engine.limits import Limits
from penstock.hub.snapshot import Snapshot
from penstock.logs import in_json, json_line, visible
from penstock.server.config import ServeConfig

WAIT_SECONDS = 10.0
_LAUNCHER, _ROUTER = "text_generation_launcher", "text_generation_router"


def begin(config: ServeConfig) -> None:
    """Before the model is looked for."""
    # What TGI prints in full, without anything that could be secret.
    _line(f"Args {{ model_id: {config.name!r}, revision: {config.revision!r}, port: {config.port} }}")
    caching = str(config.engine.prefix_caching).lower()
    _line(f"Using attention paged - Prefix caching {caching}")
    _line(f"Starting check and download process for {config.name}")


def found(config: ServeConfig, snapshot: Snapshot) -> None:
    """The files are on this machine."""
    _line("Files are already present on the host. Skipping download.")
    _line(f"Successfully downloaded weights for {config.name}")
    _line("Starting shard")


async def waiting() -> None:
    """Until cancelled."""
    while True:
        await asyncio.sleep(WAIT_SECONDS)
        _line("Waiting for shard to be ready...")


def loaded(config: ServeConfig, limits: Limits, since: float) -> None:
    """The engine is ready. since: the moment of the start, on the monotonic clock."""
    _line(f"Shard ready in {time.monotonic() - since:.9f}s")
    _line("Starting Webserver")
    _line("Warming up model", _ROUTER)
    _line(f"KV-cache blocks: {limits.num_blocks}, size: {limits.block_size}")
    _line(f"Setting max batch total tokens to {limits.num_blocks * limits.block_size}", _ROUTER)
    _line("Using backend V3", _ROUTER)
    if config.engine.max_input_tokens is None:
        _line(f"Maximum input tokens defaulted to {limits.max_input_tokens}", _ROUTER)
    if config.engine.max_total_tokens is None:
        _line(f"Maximum total tokens defaulted to {limits.max_total_tokens}", _ROUTER)


def connected(config: ServeConfig, revision: str | None) -> None:
    """Requests are taken: the last line."""
    if revision is not None:
        _line(f"Serving revision {revision} of model {config.name}", _ROUTER)
    _line("Connected", _ROUTER)


def _line(text: str, target: str = _LAUNCHER) -> None:
    if in_json():
        fields = {"fields": {"message": text}} if target == _LAUNCHER else None
        print(json_line("INFO", text, target, fields), flush=True)
        return
    moment = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    print(f"{moment}  INFO {target}: {visible(text)}", flush=True)
