"""The process that reads images: `python -m penstock.vision.child`, started by vision/reader.py.

Image files come from strangers, and their decoders are C. Each request is read by a fork that has jailed itself (no
files, no sockets, little memory, a clock: hub/jail.py) before it looks at the first byte; what happens to it happens to
nobody else. The image processor is the model's own, of transformers, in its variant for Pillow. torch is not imported.
"""

from __future__ import annotations

import hashlib
import io
import os
import signal
import sys
import warnings
from pathlib import Path

import PIL.Image
import PIL.ImageOps

from penstock.engine.limits import MAX_IMAGE_BYTES
from penstock.engine.request import Image
from penstock.hub import jail
from penstock.vision.processors import Processor, load_processor
from penstock.vision.wire import Ask, Limits, RawImage, Setup, Started, Told, frame, receive

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
_DIED = "an image takes too much time or memory to read"


class Refused(Exception):
    """An image cannot be taken; the text is for its sender."""


def main() -> None:
    """Load the model's image processor, then read the images of each message until the other end closes."""
    sys.modules["torch"] = None  # type: ignore[assignment]  # transformers then does without, and starts in a moment
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    setup = receive(source, Setup)
    if setup is None:
        return
    try:
        processor = load_processor(Path(setup.folder), setup.token)
        _warm(processor, setup.limits)
        started = Started(inline=processor.inline)
    except Exception as error:  # whatever it stumbles over, the folder is at fault
        started = Started(error=f"{type(error).__name__}: {error}"[:300])
    sink.write(frame(started))
    sink.flush()
    while not started.error and (ask := receive(source, Ask)) is not None:
        sink.write(_forked(processor, setup.limits, ask))
        sink.flush()


def _forked(processor: Processor, limits: Limits, ask: Ask) -> bytes:
    """The framed answer of a child of our own."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(ours)
            jail.enter(limits.memory, limits.seconds)
            answer = memoryview(frame(answer_to(processor, limits, ask)))
            while answer:
                answer = answer[os.write(theirs, answer) :]
            status = 0
        finally:
            os._exit(status)
    os.close(theirs)
    with open(ours, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(pid, 0)
    return data if status == 0 else frame(Told(error=_DIED))


def answer_to(processor: Processor, limits: Limits, ask: Ask) -> Told:
    """Read the images of a request, and put their placeholders into its prompt."""
    try:
        seen = [_seen(processor, decode(raw, limits, n), n) for n, raw in enumerate(ask.images, 1)]
        size = sum(len(array.data) for image, _ in seen for array in image.arrays.values())
        if size > MAX_IMAGE_BYTES:
            raise Refused(f"the images take {size >> 20} MiB once prepared, more than {MAX_IMAGE_BYTES >> 20}")
        parts = ask.text.split(processor.token)
        if len(parts) != len(seen) + 1:
            raise Refused(
                f"the prompt has {len(parts) - 1} placeholders ({processor.token}) for {len(seen)} images: a chat "
                "template must print one for each, and a text must not hold that token itself"
            )
        text = "".join(part + words for part, (_, words) in zip(parts, seen, strict=False)) + parts[-1]
        text, special = processor.finished(text)
        return Told(text, special, [image for image, _ in seen])
    except Refused as error:
        return Told(error=str(error))
    except MemoryError:
        return Told(error=_DIED)


def decode(raw: RawImage, limits: Limits, number: int) -> PIL.Image.Image:
    """The first frame as RGB, upright. The header's size is checked before anything is decoded. Raises Refused."""
    what = f"a {raw.format} image" if raw.format else "an image"
    try:
        with warnings.catch_warnings(), PIL.Image.open(io.BytesIO(raw.data), formats=_formats(raw)) as image:
            warnings.simplefilter("ignore")
            width, height = image.size
            if width < 1 or height < 1 or width * height > limits.pixels:
                raise Refused(
                    f"image {number} has {width} x {height} pixels, more than {limits.pixels} (--max-image-pixels)"
                )
            if max(width, height) > limits.ratio * min(width, height):
                raise Refused(f"image {number} has {width} x {height} pixels: one side is too long for the other")
            image.load()
            return PIL.ImageOps.exif_transpose(image).convert("RGB")
    except PIL.UnidentifiedImageError:
        raise Refused(f"image {number} is not {what}; PNG, JPEG, WebP and GIF can be read") from None
    except PIL.Image.DecompressionBombError:
        raise Refused(f"image {number} has more than {limits.pixels} pixels (--max-image-pixels)") from None
    except (Refused, MemoryError):
        raise
    except Exception as error:  # decoders raise anything
        raise Refused(f"image {number} is damaged ({type(error).__name__})") from None


def _formats(raw: RawImage) -> tuple[str, ...]:
    return (raw.format,) if raw.format in FORMATS else FORMATS


def _seen(processor: Processor, image: PIL.Image.Image, number: int) -> tuple[Image, str]:
    """An image for the engine, and the text that takes its placeholder's place."""
    try:
        arrays, words = processor.prepare(image)
    except MemoryError:
        raise
    except Exception as error:  # its own limits, such as Qwen's on the ratio of the sides
        raise Refused(f"image {number} cannot be prepared: {str(error)[:200] or type(error).__name__}") from None
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape} {array.copies} {array.stretch} ".encode())
        digest.update(array.data)
    return Image(words.count(processor.token), digest.digest(), arrays), words


def _warm(processor: Processor, limits: Limits) -> None:
    """Read an image of each format, so that nothing is left to import in the jail. Raises what stands in the way."""
    PIL.Image.MAX_IMAGE_PIXELS = limits.pixels  # for frames whose size the header does not tell
    PIL.Image.init()
    picture = PIL.Image.new("RGB", (64, 48), (200, 30, 90))
    for name in FORMATS:
        file = io.BytesIO()
        picture.save(file, name)
        told = answer_to(processor, limits, Ask(processor.token, [RawImage(file.getvalue(), name)]))
        if told.error:
            raise ValueError(told.error)


if __name__ == "__main__":
    main()
