"""GET /v1/models and /v1/models/NAME, and which names of models requests may use."""

from __future__ import annotations

from urllib.parse import unquote

import msgspec

from penstock.server.exchange import Exchange
from penstock.server.house import House
from penstock.server.refusal import Refusal

ALIASES = ("tgi", "dummy", "default")  # what clients send when they cannot leave the model out
PREFIX = "/v1/models/"


class Model(msgspec.Struct, kw_only=True):
    """A served model. max_model_len: tokens of prompt and answer together."""

    id: str
    object: str = "model"
    created: int = 0
    owned_by: str
    max_model_len: int


class Models:
    """The routes. One server has one model."""

    def __init__(self, house: House) -> None:
        self._house = house

    async def list(self, exchange: Exchange) -> None:
        """The served model."""
        await exchange.answer_json({"object": "list", "data": [self._model()]})

    async def one(self, exchange: Exchange) -> None:
        """The model that the path names; its name may have slashes."""
        check_model(unquote(exchange.path.removeprefix(PREFIX)), self._house)
        await exchange.answer_json(self._model())

    def _model(self) -> Model:
        name = self._house.config.name
        return Model(id=name, owned_by=name, max_model_len=self._house.limits.max_total_tokens)


def check_model(asked: str | None, house: House) -> None:
    """Raises Refusal 404, with the names there are, for a model that is not served here."""
    if asked is None or asked == house.config.name or asked in ALIASES:
        return
    names = ", ".join((house.config.name, *ALIASES))
    raise Refusal(
        404, f"The model `{asked[:200]}` is not served here. Names: {names}", "model_not_found", param="model"
    )
