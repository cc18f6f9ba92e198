"""Where a request's images are: data URLs, and addresses of hosts that the server allows."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Collection, Iterator

from penstock.errors import InvalidRequest
from penstock.vision.fetch import fetch
from penstock.vision.wire import RawImage

_FORMATS = {"png": "PNG", "jpeg": "JPEG", "jpg": "JPEG", "webp": "WEBP", "gif": "GIF"}
_DATA = re.compile(r"data:image/([a-z+.-]{1,20});base64,", re.IGNORECASE)
# TGI's syntax of an image in a prompt: ![](where it is). With a data URL it may also be told what it is.
_MARKDOWN = re.compile(r"!\[(?:[^\]\n]{0,1000}\]\((?=data:)|\]\((?=https?://))([^)\s]+)\)")


def split_markdown(text: str, only_data: bool = False) -> tuple[list[str], list[str]]:
    """The text around the images of a prompt in TGI's Markdown, one piece more than there are images, and their
    addresses. only_data: addresses on the web are text."""
    pieces, addresses, at = [], [], 0
    for match in _images(text):
        if only_data and not match[1].startswith("data:"):
            continue
        pieces.append(text[at : match.start()])
        addresses.append(match[1])
        at = match.end()
    return [*pieces, text[at:]], addresses


def _images(text: str) -> Iterator[re.Match[str]]:
    return _MARKDOWN.finditer(text) if "![" in text else iter(())


def read_source(address: str, most: int, hosts: Collection[str]) -> RawImage:
    """The bytes of an image, `most` of them at most. hosts: from which it may be fetched. Raises InvalidRequest."""
    if address[:5].lower() == "data:":
        return _from_data(address, most)
    if address[:8].lower() == "https://":
        return RawImage(fetch(address, hosts, most))
    if address[:7].lower() == "http://":
        raise InvalidRequest("an image is fetched by https only; send it as a data URL")
    raise InvalidRequest(
        f"an image is a data URL (data:image/png;base64,...), not {address[:20]!r}"
        + ("; base64 alone does not say what it is" if len(address) > 200 else "")
    )


def _from_data(address: str, most: int) -> RawImage:
    head = _DATA.match(address)
    kind = head[1].lower() if head else ""
    if head is None or kind not in _FORMATS:
        raise InvalidRequest(
            f"an image's data URL begins with data:image/png;base64, (or jpeg, webp, gif), not {address[:40]!r}"
        )
    size = (len(address) - head.end()) * 3 // 4
    if size > most + 2:
        raise InvalidRequest(f"an image has {size} bytes, more than {most} (--max-image-bytes)")
    try:
        return RawImage(base64.b64decode(address[head.end() :], validate=True), _FORMATS[kind])
    except (binascii.Error, ValueError):
        raise InvalidRequest("an image's data URL is not base64") from None
