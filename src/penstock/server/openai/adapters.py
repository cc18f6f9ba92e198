"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter, with vLLM's names, bodies and answers."""

from __future__ import annotations

import asyncio
import logging

import msgspec

from penstock.engine.client import EngineUnavailable
from penstock.engine.messages import LoadAdapter, UnloadAdapter
from penstock.errors import EnvironmentFault, PenstockError
from penstock.hub.adapters import resolve_adapter
from penstock.server.body import parse
from penstock.server.exchange import Exchange
from penstock.server.house import House
from penstock.server.openai.models import ALIASES
from penstock.server.operations import TEXT
from penstock.server.refusal import Refusal, unhealthy

log = logging.getLogger("penstock.server")

MAX_NAME = 200  # characters


class LoadAdapterRequest(msgspec.Struct, kw_only=True):
    """Body of /v1/load_lora_adapter. lora_path: a folder on the server's machine, or ORG/NAME[@REVISION] of its hub
    cache; nothing is downloaded for a request.

    load_inplace: in the place of one of that name, whose requests finish with it.
    """

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class UnloadAdapterRequest(msgspec.Struct, kw_only=True):
    """Body of /v1/unload_lora_adapter."""

    lora_name: str
    lora_int_id: int | None = None  # of vLLM's; the name is enough


class AdapterRoutes:
    """The routes."""

    def __init__(self, house: House) -> None:
        self._house = house

    async def load(self, exchange: Exchange, raw: bytes) -> None:
        """Load an adapter; from the answer on requests may name it."""
        engine, body = self._house.engine, parse(raw, LoadAdapterRequest)
        name = body.lora_name
        if not name or not body.lora_path:
            raise _wrong("Both 'lora_name' and 'lora_path' must be provided.", "lora_path" if name else "lora_name")
        if len(name) > MAX_NAME or not name.isprintable():
            raise _wrong(f"The name of an adapter has at most {MAX_NAME} printable characters.", "lora_name")
        if name == self._house.config.name or name in ALIASES:
            raise _wrong(f"The name '{name}' is that of the model itself.", "lora_name")
        if name in engine.adapters and not body.load_inplace:
            raise _wrong(f"The LoRA adapter '{name}' is loaded already; set load_inplace to replace it.", "lora_name")
        try:
            folder = await asyncio.to_thread(resolve_adapter, body.lora_path, offline=True)
        except EnvironmentFault:
            text = f"There is no adapter {body.lora_path[:200]!r} on the server's machine; download it there first."
            raise Refusal(404, text, "not_found", param="lora_path") from None
        except PenstockError as error:
            raise Refusal(404, _words(error), "not_found", param="lora_path") from None
        await self._call(LoadAdapter(engine.next_id(), name, str(folder), body.load_inplace))
        log.info("the adapter %s is loaded from %s", name, folder)
        await exchange.answer(200, f"Success: LoRA adapter '{name}' added successfully.".encode(), TEXT.encode())

    async def unload(self, exchange: Exchange, raw: bytes) -> None:
        """Forget an adapter. Requests that run on it finish with it."""
        engine, name = self._house.engine, parse(raw, UnloadAdapterRequest).lora_name
        if name not in engine.adapters:
            raise Refusal(404, f"The LoRA adapter '{name[:MAX_NAME]}' cannot be found.", "not_found", param="lora_name")
        await self._call(UnloadAdapter(engine.next_id(), name))
        log.info("the adapter %s is unloaded", name)
        await exchange.answer(200, f"Success: LoRA adapter '{name}' removed successfully.".encode(), TEXT.encode())

    async def _call(self, call: LoadAdapter | UnloadAdapter) -> None:
        """Raises Refusal."""
        try:
            await self._house.engine.adapt(call)
        except EngineUnavailable:
            raise unhealthy() from None
        except PenstockError as error:
            raise _wrong(_words(error), "lora_path") from None


def _wrong(text: str, param: str) -> Refusal:
    return Refusal(400, text, "invalid_value", param=param)


def _words(error: PenstockError) -> str:
    """The whole message in one line."""
    return " ".join(str(error).splitlines())
