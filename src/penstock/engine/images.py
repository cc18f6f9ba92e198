"""The images of a prompt: where their rows are, what the tower made of them, which places they turn by."""

from __future__ import annotations

import logging
from bisect import bisect_left
from itertools import accumulate
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from penstock.engine.request import Array, EngineRequest, Image
from penstock.errors import InvalidRequest
from penstock.models.config import VisionConfig
from penstock.models.vision import VisionTower

log = logging.getLogger("penstock.engine")


class PromptImages:
    """The images of one sequence. Their pixels are kept until the tower has seen them, then what it made is.

    places: of all placeholder tokens, ascending. axes: [3, prompt] the places that each token turns by in a model with
    M-RoPE, else None; after the prompt all three go on from its length by `shift`.
    """

    def __init__(self, request: EngineRequest, vision: VisionConfig) -> None:
        """Raises InvalidRequest for an image whose grid does not have as many squares as it has rows."""
        ids = request.prompt_ids
        self.digests = [image.digest for image in request.images]
        self.places = [place for place, i in enumerate(ids) if i == vision.image_token]
        self._starts = [0, *accumulate(image.tokens for image in request.images)]  # among `places`
        self._pixels: list[Image | None] = list(request.images)
        self._features: list[Tensor | None] = [None] * len(request.images)
        self.axes: Tensor | None = None
        self.shift = 0
        if vision.merge is not None:
            self.axes = self._turned(request, vision.merge)
            self.shift = int(self.axes.max()) + 1 - len(ids)

    def see(self, start: int, stop: int, eyes: Eyes, salt: bytes) -> None:
        """Make the features of the images with rows among the tokens start..stop that have none yet. Raises whatever
        the tower does, and ValueError where it makes another number of rows."""
        for i in self._between(start, stop):
            image = self._pixels[i]
            if image is not None:
                self._features[i] = eyes.look(image, salt)
                self._pixels[i] = None

    def rows(self, start: int, stop: int) -> tuple[list[int], list[Tensor]]:
        """Which of the tokens start..stop are rows of images, counted from start, and their features."""
        a, b = bisect_left(self.places, start), bisect_left(self.places, stop)
        parts = []
        for i in self._between(start, stop):
            features, first = self._features[i], self._starts[i]
            if features is None:
                raise RuntimeError("an image is computed before the tower has seen it")
            parts.append(features[max(a - first, 0) : b - first])
        return [place - start for place in self.places[a:b]], parts

    def mark(self, start: int, stop: int) -> bytes:
        """Which part of which image stands among the tokens start..stop, b"" for none: part of the block's key."""
        a = bisect_left(self.places, start)
        return b"".join(
            self.digests[i] + max(a - self._starts[i], 0).to_bytes(8, "little") for i in self._between(start, stop)
        )

    def _between(self, start: int, stop: int) -> range:
        """The images with rows among the tokens start..stop."""
        a, b = bisect_left(self.places, start), bisect_left(self.places, stop)
        if a == b:
            return range(0)
        return range(bisect_left(self._starts, a + 1) - 1, bisect_left(self._starts, b))

    def _turned(self, request: EngineRequest, merge: int) -> Tensor:
        """Text counts on in all three places; an image's rows count its height and width from where it starts, and the
        text behind it goes on from the larger of the two (Qwen2-VL 2024)."""
        axes = np.empty((3, len(request.prompt_ids)), np.int64)
        at = place = 0  # the next token, the next place
        for i, image in enumerate(request.images):
            grid = image.arrays.get("image_grid_thw")
            if grid is None or len(grid.data) != 24 or grid.dtype != "int64":
                raise InvalidRequest("an image is not as the model's image processor makes it")
            time, height, width = (int(n) for n in np.frombuffer(grid.data, np.int64))
            height, width = height // merge, width // merge
            first, last = self.places[self._starts[i]], self.places[self._starts[i + 1] - 1]
            if min(time, height, width) < 1 or (time * height * width, last - first + 1) != (image.tokens,) * 2:
                raise InvalidRequest("an image is not as the model's image processor makes it")
            axes[:, at:first] = np.arange(place, place + first - at)
            place += first - at
            axes[:, first : last + 1] = np.indices((time, height, width)).reshape(3, -1) + place
            place, at = place + max(height, width), last + 1
        axes[:, at:] = np.arange(place, place + axes.shape[1] - at)
        return torch.from_numpy(axes)


class Eyes:
    """Runs the tower, once for an image that several live sequences of one salt have."""

    def __init__(self, tower: VisionTower) -> None:
        self._tower = tower
        self._seen: WeakValueDictionary[bytes, Tensor] = WeakValueDictionary()

    def look(self, image: Image, salt: bytes) -> Tensor:
        """What the decoder is given of an image, [tokens, hidden]. Raises ValueError where it has other rows."""
        key = salt + image.digest
        found = self._seen.get(key)
        if found is None:
            found = self._seen[key] = self._tower({name: tensor_of(array) for name, array in image.arrays.items()})
        if len(found) != image.tokens:
            raise ValueError(f"the tower made {len(found)} rows of an image that was said to have {image.tokens}")
        return found


def tensor_of(array: Array) -> Tensor:
    """The numbers of an image in their shape."""
    once = np.frombuffer(array.data, array.dtype).reshape(-1, 1, array.stretch)
    return torch.from_numpy(np.repeat(once, array.copies, axis=1).reshape(array.shape))
