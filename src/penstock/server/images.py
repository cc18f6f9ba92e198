"""The images of requests: found, fetched where that is allowed, and prepared beside the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from weakref import finalize

from penstock.engine.request import Image
from penstock.errors import InvalidRequest
from penstock.hub.config import read_config
from penstock.server.config import ServeConfig
from penstock.server.refusal import Refusal, invalid, overloaded
from penstock.text.tokenizer import Tokenizer
from penstock.vision.reader import ImageReader, ImagesUnavailable
from penstock.vision.sources import read_source
from penstock.vision.wire import Limits, Told

MAX_HELD = 2**29  # bytes of prepared images that requests may hold together
_TEXT = "this model takes no images"
TOKENS = {
    "llava": 32000,
    "llava_next": 32000,
    "idefics3": 128257,
    "smolvlm": 128257,
    "paligemma": 256000,
    "qwen2_vl": 151655,
    "qwen2_5_vl": 151655,
}  # placeholders where config.json does not name them


@dataclass(frozen=True)
class Illustrated:
    """A prompt with its images. special: whether the tokenizer adds its special tokens; None for as the route does."""

    text: str
    special: bool | None = None
    images: list[Image] = field(default_factory=list)


class Images:
    """What this server does with images. reader: None where it takes none, and `why`."""

    def __init__(self, config: ServeConfig, reader: ImageReader | None, why: str) -> None:
        self._config, self._reader, self._why = config, reader, why
        self._workers = ThreadPoolExecutor(config.validation_workers, thread_name_prefix="images")
        self._held = 0

    @property
    def missing(self) -> str:
        """Why a model that could take images takes none; "" where there is nothing to tell."""
        return "" if self._why == _TEXT else self._why

    @property
    def taken(self) -> bool:
        """Whether the model takes images."""
        return self._reader is not None

    @property
    def token(self) -> str:
        """The placeholder, as a template prints it for each image."""
        return "" if self._reader is None else self._reader.token

    @property
    def inline(self) -> str:
        """What stands for an image where no template prints it."""
        return "" if self._reader is None else self._reader.inline

    async def prepare(self, text: str, addresses: Sequence[str]) -> Illustrated:
        """The prompt with the images at these addresses, which its placeholders stand for.

        Raises Refusal: 422, and 429 while other requests hold too many.
        """
        if not addresses:
            return Illustrated(text)
        reader = self.check(len(addresses))
        loop = asyncio.get_running_loop()
        try:
            told = await loop.run_in_executor(self._workers, self._read, reader, text, addresses)
        except InvalidRequest as error:
            raise invalid(error.what, "messages") from None
        self._hold(told.images)
        return Illustrated(told.text, told.special, told.images)

    def check(self, count: int, param: str = "messages") -> ImageReader:
        """Raises Refusal 422, naming `param`, where the model takes no images, or not so many."""
        if self._reader is None:
            raise Refusal(422, f"`image_url` is not supported: {self._why}", "not_supported", param=param)
        if count > self._config.max_images:
            most = self._config.max_images
            raise invalid(f"a request may have at most {most} images (--max-images). Given: {count}", param)
        return self._reader

    def close(self) -> None:
        """End the processes that read."""
        self._workers.shutdown(wait=False, cancel_futures=True)
        if self._reader is not None:
            self._reader.close()

    def _hold(self, images: list[Image]) -> None:
        """Count the bytes of images until nobody has them any more. Raises Refusal 429."""
        sizes = [sum(len(array.data) for array in image.arrays.values()) for image in images]
        if self._held + sum(sizes) > MAX_HELD:
            raise overloaded()
        for image, size in zip(images, sizes, strict=True):
            self._held += size
            finalize(image, self._let_go, size)

    def _let_go(self, size: int) -> None:
        self._held -= size

    def _read(self, reader: ImageReader, text: str, addresses: Sequence[str]) -> Told:
        most, hosts = self._config.max_image_bytes, self._config.allow_image_hosts
        return reader.read(text, [read_source(address, most, hosts) for address in addresses])


def open_images(folder: Path, config: ServeConfig, tokenizer: Tokenizer) -> Images:
    """What the server of a model does with images. Where it could see but something is missing, that is why."""
    raw = read_config(folder)
    kind = str(raw.get("model_type"))
    if kind not in TOKENS:
        return Images(config, None, _TEXT)
    number = raw.get("image_token_index", raw.get("image_token_id"))
    token = tokenizer.backend.id_to_token(number if isinstance(number, int) else TOKENS[kind])
    try:
        if find_spec("PIL") is None:
            raise ImagesUnavailable("Pillow is not installed (pip install pillow)")
        if token is None:
            raise ImagesUnavailable("the tokenizer has no placeholder for images")
        return Images(config, ImageReader(folder, token, Limits(config.max_image_pixels)), "")
    except ImagesUnavailable as error:
        return Images(config, None, f"this server cannot read images: {error}")
