"""The process that reads images: what a file can do to it, and what happens then."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import PIL.Image
import pytest

from penstock.vision.reader import ImageReader, ImagesRefused, ImagesUnavailable
from penstock.vision.wire import Limits, RawImage

from .models import encoded, picture, save_vision

GOOD = RawImage(encoded(picture(40, 30)), "PNG")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vision(tmp_path_factory.mktemp("llava"), "llava")


@pytest.fixture(scope="module")
def reader(folder: Path) -> Iterator[ImageReader]:
    """One that lets any number of pixels pass, so that what lies behind the first check is seen."""
    found = ImageReader(folder, "<image>", Limits(2**40, memory=2**28))
    yield found
    found.close()


def test_a_file_that_takes_too_much_memory_ends_its_request_alone(reader: ImageReader) -> None:
    file = io.BytesIO()
    PIL.Image.new("1", (20000, 20000)).save(file, "PNG")  # some 50 KiB
    with pytest.raises(ImagesRefused, match="too much time or memory"):
        reader.read("<image>", [RawImage(file.getvalue(), "PNG")])
    assert reader.read("<image>", [GOOD]).images[0].tokens == 16


def test_a_reader_that_is_killed_is_replaced(reader: ImageReader) -> None:
    for child in reader._idle:
        os.kill(child._process.pid, signal.SIGKILL)
        child._process.wait()
    assert reader.read("<image>", [GOOD]).images[0].tokens == 16


def test_many_ask_at_once(reader: ImageReader) -> None:
    files = [GOOD, RawImage(b"x"), RawImage(encoded(picture(31, 55), "GIF"), "GIF")] * 2

    def ask(raw: RawImage) -> bool:
        try:
            return len(reader.read("a <image>", [raw]).images) == 1
        except ImagesRefused:
            return False

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(ask, files)) == [True, False, True] * 2


def test_equal_files_are_equal_images(reader: ImageReader) -> None:
    told = reader.read("<image><image><image>", [GOOD, RawImage(encoded(picture(40, 31)), "PNG"), GOOD])
    first, other, again = (image.digest for image in told.images)
    assert first == again != other


def test_upright_and_without_colours_or_with_a_transparent_part(reader: ImageReader) -> None:
    image = picture(40, 30)
    turned = io.BytesIO()
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # shown turned by a right angle
    image.transpose(PIL.Image.Transpose.ROTATE_90).save(turned, "PNG", exif=exif)
    upright = reader.read("<image>", [GOOD]).images[0].digest
    assert reader.read("<image>", [RawImage(turned.getvalue(), "PNG")]).images[0].digest == upright
    for mode in ("L", "LA", "RGBA", "P", "I;16", "1"):
        raw = RawImage(encoded(image.convert("L").convert(mode) if mode == "I;16" else image.convert(mode)), "PNG")
        assert reader.read("<image>", [raw]).images[0].tokens == 16, mode


def test_a_folder_that_cannot_be_used_says_why(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "NoSuchProcessor"}')
    with pytest.raises(ImagesUnavailable, match="image processor"):
        ImageReader(tmp_path, "<image>", Limits(2**20))
