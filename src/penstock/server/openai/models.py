"""GET /v1/models and /v1/models/NAME, and which names of models requests may use: the model's, and its adapters'."""

from __future__ import annotations

from urllib.parse import unquote

import msgspec
from msgspec import UNSET, UnsetType

from penstock.server.exchange import Exchange
from penstock.server.house import House
from penstock.server.refusal import Refusal

ALIASES = ("tgi", "dummy", "default")  # what clients send when they cannot leave the model out
PREFIX = "/v1/models/"


class Model(msgspec.Struct, kw_only=True):
    """A served model. max_model_len: tokens of prompt and answer together. parent: of a LoRA adapter, its base."""

    id: str
    object: str = "model"
    created: int = 0
    owned_by: str
    max_model_len: int
    parent: str | UnsetType = UNSET


class Models:
    """The routes. One server has one model, and adapters of it."""

    def __init__(self, house: House) -> None:
        self._house = house

    async def list(self, exchange: Exchange) -> None:
        """The served model, then its adapters."""
        names = [None, *self._house.engine.adapters]
        await exchange.answer_json({"object": "list", "data": [self._model(name) for name in names]})

    async def one(self, exchange: Exchange) -> None:
        """The model that the path names; its name may have slashes."""
        adapter = check_model(unquote(exchange.path.removeprefix(PREFIX)), self._house)
        await exchange.answer_json(self._model(adapter))

    def _model(self, adapter: str | None) -> Model:
        name = self._house.config.name
        model = Model(id=name, owned_by=name, max_model_len=self._house.limits.max_total_tokens)
        return model if adapter is None else msgspec.structs.replace(model, id=adapter, parent=name)


def check_model(asked: str | None, house: House) -> str | None:
    """The adapter that a request's `model` names, None where it is the model itself.

    Raises Refusal 404, with the names there are, for what is not served here.
    """
    if asked is None or asked == house.config.name or asked in ALIASES:
        return None
    if asked in house.engine.adapters:
        return asked
    names = ", ".join((house.config.name, *house.engine.adapters, *ALIASES))
    raise Refusal(
        404, f"The model `{asked[:200]}` is not served here. Names: {names}", "model_not_found", param="model"
    )
