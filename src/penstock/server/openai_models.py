"""GET /v1/models, and which names of models requests may use."""

from __future__ import annotations

from penstock.server.exchange import Exchange
from penstock.server.house import House
from penstock.server.refusal import Refusal

ALIASES = ("tgi", "dummy", "default")  # what clients send when they cannot leave the model out


class Models:
    """The route. One server has one model."""

    def __init__(self, house: House) -> None:
        self._house = house

    async def list(self, exchange: Exchange) -> None:
        """The served model."""
        name = self._house.config.name
        model = {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": name,
            "max_model_len": self._house.limits.max_total_tokens,
        }
        await exchange.answer_json({"object": "list", "data": [model]})


def check_model(asked: str | None, house: House) -> None:
    """Raises Refusal 404, with the names there are, for a model that is not served here."""
    if asked is None or asked == house.config.name or asked in ALIASES:
        return
    names = ", ".join((house.config.name, *ALIASES))
    raise Refusal(
        404, f"The model `{asked[:200]}` is not served here. Names: {names}", "model_not_found", param="model"
    )
