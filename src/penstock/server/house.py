"""What the routes share: the engine, the tokenizer, the limits, the counters."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

from penstock.engine.client import EngineClient
from penstock.engine.limits import Limits, validate
from penstock.engine.request import EngineRequest
from penstock.errors import InvalidRequest
from penstock.server.config import ServeConfig
from penstock.server.grammars import Grammars
from penstock.server.images import Images
from penstock.server.limits import Permits, Presence
from penstock.server.metrics import Metrics
from penstock.server.refusal import invalid, template_error
from penstock.text.chat_template import ChatTemplate, TemplateFailure
from penstock.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from penstock.server.tracing import Tracer

INLINE_CHARACTERS = 4096  # longer texts are tokenized on a thread, so that the event loop stays free


class House:
    """Everything that answering a request needs. One per server."""

    def __init__(
        self,
        config: ServeConfig,
        engine: EngineClient,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        images: Images,
        revision: str | None = None,
    ) -> None:
        self.config, self.engine, self.tokenizer, self.template = config, engine, tokenizer, template
        self.images, self.revision = images, revision
        self.draining = False
        self.priority = 0  # of the requests made here; lower runs first
        self.tracer: Tracer | None = None
        self.permits = Permits(config.max_concurrent_requests)
        self.presence = Presence()
        self.metrics = Metrics(engine.limits, engine)
        self.grammars = Grammars.of(config.engine.model_path, engine.limits.vocab_size, engine.limits.eos_ids)
        self._workers = ThreadPoolExecutor(config.validation_workers, thread_name_prefix="text")
        self._renderers = ThreadPoolExecutor(config.validation_workers, thread_name_prefix="template")

    def aside(self, priority: int, permits: int) -> House:
        """The same house for requests of another priority, which take none of the permits of those that are waited
        for."""
        other = copy.copy(self)
        other.priority, other.permits = priority, Permits(permits)
        return other

    @property
    def limits(self) -> Limits:
        """What the loaded model allows."""
        return self.engine.limits

    @property
    def ready(self) -> bool:
        """Whether new requests are taken."""
        return self.engine.healthy and not self.draining

    def model_name(self, adapter: str | None) -> str:
        """What an answer says that it comes from."""
        return adapter or self.config.name

    async def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """The prompt's token ids."""
        if len(text) <= INLINE_CHARACTERS:
            return self.tokenizer.encode(text, add_special_tokens)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._workers, self.tokenizer.encode, text, add_special_tokens)

    async def encode_offsets(self, text: str, add_special_tokens: bool = True) -> list[tuple[int, str, int, int]]:
        """(id, text, start, stop) of each token; see Tokenizer."""
        if len(text) <= INLINE_CHARACTERS:
            return self.tokenizer.encode_offsets(text, add_special_tokens)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._workers, self.tokenizer.encode_offsets, text, add_special_tokens)

    async def render(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The conversation as the model's prompt; options: of ChatTemplate.render. Raises Refusal 422."""
        if self.template is None:
            raise template_error("template not found")
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._renderers, partial(self.template.render, messages, **options))
        except TemplateFailure as failure:
            raise template_error(failure.what) from None

    def room(self, prompt_tokens: int, max_new_tokens: int | None) -> int:
        """How many tokens to generate: as asked, or what fits. Raises Refusal 422 when they do not fit."""
        total, largest = self.limits.max_total_tokens, self.limits.max_input_tokens
        wanted = max(total - prompt_tokens, 0) if max_new_tokens is None else max_new_tokens
        if prompt_tokens + wanted > total:
            raise invalid(
                f"`inputs` tokens + `max_new_tokens` must be <= {total}. "
                f"Given: {prompt_tokens} `inputs` tokens and {wanted} `max_new_tokens`"
            )
        if prompt_tokens > largest or wanted == 0:
            raise invalid(f"`inputs` must have less than {largest} tokens. Given: {prompt_tokens}")
        return wanted

    def check(self, request: EngineRequest) -> None:
        """The engine's own checks, made here too so that their failure is a real status.

        Raises Refusal 422.
        """
        try:
            validate(request, self.limits)
        except InvalidRequest as error:
            raise invalid(error.what) from None

    def close(self) -> None:
        """Let the threads and the forge go."""
        self.grammars.close()
        self.images.close()
        self._workers.shutdown(wait=False, cancel_futures=True)
        self._renderers.shutdown(wait=False, cancel_futures=True)
        if self.template is not None:
            self.template.close()
