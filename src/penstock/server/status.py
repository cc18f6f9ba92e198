"""What the server says about itself: /health, /info, /metrics."""

from __future__ import annotations

from msgspec import UNSET

from penstock import __version__
from penstock.server.exchange import Exchange
from penstock.server.house import House
from penstock.server.metrics import CONTENT_TYPE
from penstock.server.native.wire import Info
from penstock.server.refusal import unhealthy


class Status:
    """The routes."""

    def __init__(self, house: House) -> None:
        self._house = house

    async def health(self, exchange: Exchange) -> None:
        """200 while requests are taken, else 503."""
        if not self._house.ready:
            raise unhealthy()
        await exchange.answer(200, b"")

    async def info(self, exchange: Exchange) -> None:
        """The limits, in TGI's shape."""
        house = self._house
        config, limits = house.config, house.limits
        await exchange.answer_json(
            Info(
                model_id=config.name,
                model_sha=house.revision,
                model_pipeline_tag=None,
                max_concurrent_requests=config.max_concurrent_requests,
                max_best_of=config.max_best_of,
                max_stop_sequences=config.max_stop_sequences,
                max_input_tokens=limits.max_input_tokens,
                max_total_tokens=limits.max_total_tokens,
                validation_workers=config.validation_workers,
                max_client_batch_size=config.max_client_batch_size,
                router="text-generation-router",
                version=__version__,
                sha=None,
                docker_label=None,
                adapters=house.engine.adapters or UNSET,
            )
        )

    async def metrics(self, exchange: Exchange) -> None:
        """Prometheus's text."""
        await exchange.answer(200, self._house.metrics.exposition(), CONTENT_TYPE)
