"""Images over HTTP: data URLs in every API, and whatever a client may send in their place."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch

from tests.vision.models import data_url, encoded, picture, reference, save_vision, their_processor

from .running import Server, start

NEW = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vision(tmp_path_factory.mktemp("models") / "tiny-llava", "llava")


@pytest.fixture(scope="module")
def seer(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of a model that takes images."""
    flags = ("--dtype", "float32", "--max-images", "3", "--max-image-pixels", "1000000", "--max-image-bytes", "300000")
    found = start(tmp_path_factory.mktemp("home"), folder, *flags)
    yield found
    found.kill()


@torch.inference_mode()
def expected(folder: Path, text: str, images: list[PIL.Image.Image], **options: Any) -> str:
    """What transformers generates."""
    processor = their_processor(folder, "llava")
    inputs = processor(images=images, text=[text], return_tensors="pt", **options)
    model = reference(folder)
    model.generation_config.eos_token_id = 1
    ids = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    found: str = processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return found


def chat(parts: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": parts}], "max_tokens": NEW, "temperature": 0, **fields}


def image(address: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": address}}


def words(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def test_every_api_sees_the_same_image(seer: Server, folder: Path) -> None:
    picture_ = picture(50, 40)
    raw = encoded(picture_)
    address = data_url(raw)
    text = expected(folder, "<s><|user|><image>what is it<|assistant|>", [picture_], add_special_tokens=False)
    body = chat([image(address), words("what is it")])
    answer = seer.post("/v1/chat/completions", body)
    assert answer.status == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"] == text
    prompt_tokens = answer.json()["usage"]["prompt_tokens"]
    streamed = seer.post("/v1/chat/completions", {**body, "stream": True}).events()
    assert "".join(e["choices"][0]["delta"].get("content") or "" for e in streamed if e != "[DONE]") == text
    plain = chat([{"type": "image_url", "image_url": address}, words("what is it")])
    assert seer.post("/v1/chat/completions", plain).json()["choices"][0]["message"]["content"] == text
    markdown = {**body, "messages": [{"role": "user", "content": f"![]({address})what is it"}]}
    assert seer.post("/v1/chat/completions", markdown).json()["choices"][0]["message"]["content"] == text
    markdown["messages"] = [{"role": "user", "content": [words(f"![]({address})what is it")]}]
    assert seer.post("/v1/chat/completions", markdown).json()["choices"][0]["message"]["content"] == text
    anthropic = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(raw).decode()}
    message = {
        "max_tokens": NEW,
        "temperature": 0,
        "messages": [{"role": "user", "content": [{"type": "image", "source": anthropic}, words("what is it")]}],
    }
    answer = seer.post("/v1/messages", message)
    assert answer.json()["content"][0]["text"] == text, answer.text
    assert seer.post("/v1/messages/count_tokens", message).json()["input_tokens"] == prompt_tokens
    item = {"role": "user", "content": [{"type": "input_image", "image_url": address}, words("what is it")]}
    answer = seer.post("/v1/responses", {"input": [item], "max_output_tokens": NEW, "temperature": 0})
    assert answer.json()["output"][0]["content"][0]["text"] == text, answer.text


def test_markdown_in_a_native_prompt(seer: Server, folder: Path) -> None:
    one, two = picture(50, 40), picture(31, 77, seed=1)
    inputs = f"![]({data_url(encoded(one))})a fox ![a dog]({data_url(encoded(two, 'JPEG'), 'jpeg')}) and"
    two = PIL.Image.open(io.BytesIO(encoded(two, "JPEG")))
    text = expected(folder, "<image>a fox <image> and", [one, two])
    answer = seer.post("/generate", {"inputs": inputs, "parameters": {"max_new_tokens": NEW, "details": True}})
    assert answer.status == 200, answer.text
    assert answer.json()["generated_text"] == text
    refused = seer.post("/generate", {"inputs": inputs, "parameters": {"truncate": 20}})
    assert refused.status == 422
    assert "truncate" in refused.json()["error"]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_every_format_is_read(kind: str, seer: Server, folder: Path) -> None:
    raw = encoded(picture(40, 40), kind)
    text = expected(
        folder,
        "<s><|user|><image><|assistant|>",
        [PIL.Image.open(io.BytesIO(raw)).convert("RGB")],
        add_special_tokens=False,
    )
    answer = seer.post("/v1/chat/completions", chat([image(data_url(raw, kind.lower()))]))
    assert answer.json()["choices"][0]["message"]["content"] == text


def test_text_alone_is_a_prompt_as_ever(seer: Server, folder: Path) -> None:
    answer = seer.post("/generate", {"inputs": "the quick brown", "parameters": {"max_new_tokens": NEW}})
    processor, model = their_processor(folder, "llava"), reference(folder)
    model.generation_config.eos_token_id = 1
    inputs = processor.tokenizer(["the quick brown"], return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer.json()["generated_text"] == processor.tokenizer.decode(ids, skip_special_tokens=True)


def _bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is so large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


PNG = encoded(picture(60, 50))
HOSTILE: dict[str, tuple[list[Any], str]] = {
    "truncated": ([data_url(PNG[: len(PNG) // 2])], "image 1 is damaged"),
    "only its head": ([data_url(PNG[:20])], "image 1 is"),
    "empty": ([data_url(b"")], "image 1 is not a PNG image"),
    "noise": ([data_url(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))], "image 1 is"),
    "a bomb": ([data_url(_bomb(60000, 60000))], "more than 1000000 pixels"),
    "a bigger bomb": ([data_url(_bomb(2**31 - 1, 2**31 - 1))], "image 1"),
    "a little too large": ([data_url(_bomb(1001, 1000))], "1001 x 1000 pixels, more than 1000000"),
    "a line": ([data_url(_bomb(1, 100000))], "one side is too long"),
    "no pixels": ([data_url(_bomb(0, 10))], "image 1"),
    "another kind": ([data_url(PNG, "jpeg")], "image 1 is not a JPEG image"),
    "a script": (["data:text/html;base64,PGI+"], "begins with data:image/png;base64,"),
    "svg": ([data_url(b"<svg/>", "svg+xml")], "begins with data:image/png;base64,"),
    "not base64": (["data:image/png;base64,%%%%"], "is not base64"),
    "plain base64": ([base64.b64encode(PNG).decode()], "base64 alone does not say what it is"),
    "too many bytes": ([data_url(b"\0" * 300001)], "more than 300000 (--max-image-bytes)"),
    "too many": ([data_url(PNG)] * 4, "at most 3 images"),
    "the web": (["https://example.com/a.png"], "does not fetch images from 'example.com'"),
    "without encryption": (["http://example.com/a.png"], "by https only"),
    "this machine": (["https://127.0.0.1/a.png"], "does not fetch images"),
    "its metadata": (["http://169.254.169.254/latest/meta-data"], "by https only"),
    "a file": (["file:///etc/passwd"], "an image is a data URL"),
    "nothing": ([""], "an image is a data URL"),
    "no address": ([None], "must have a `url`"),
    "a number": ([7], "must have a `url`"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_images_are_refused_and_harm_nobody(name: str, seer: Server) -> None:
    addresses, text = HOSTILE[name]
    answer = seer.post("/v1/chat/completions", chat([*map(image, addresses), words("what")]))
    assert answer.status == 422, answer.text
    assert text in answer.json()["error"]["message"], answer.text
    good = seer.post("/v1/chat/completions", chat([image(data_url(PNG)), words("what")]))
    assert good.status == 200


def test_a_placeholder_in_a_text_is_no_image(seer: Server) -> None:
    answer = seer.post("/v1/chat/completions", chat([image(data_url(PNG)), words("what is <image> for")]))
    assert answer.status == 422
    assert "2 placeholders (<image>) for 1 images" in answer.json()["error"]["message"]
    assert seer.post("/v1/chat/completions", chat([words("what is <image> for")])).status == 200


def test_images_belong_to_users(seer: Server) -> None:
    body = chat([image(data_url(PNG))])
    body["messages"][0]["role"] = "assistant"
    answer = seer.post("/v1/chat/completions", body)
    assert answer.status == 422
    assert "only a user's message" in answer.json()["error"]["message"]


def test_a_text_model_says_that_it_takes_text(server: Server) -> None:
    answer = server.post("/v1/chat/completions", chat([image(data_url(PNG)), words("what")]))
    assert answer.status == 422
    assert answer.json()["error"]["code"] == "not_supported"
    assert "this model takes no images" in answer.json()["error"]["message"]
    answer = server.post("/generate", {"inputs": f"![]({data_url(PNG)})what", "parameters": {"max_new_tokens": 3}})
    assert answer.status == 422
    assert "this model takes no images" in answer.json()["error"]
    markdown = {"inputs": "![](https://example.com/fox.png) and", "parameters": {"max_new_tokens": 3}}
    assert server.post("/generate", markdown).status == 200  # text like any other


def test_a_model_without_its_image_processor_serves_text(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    copy.mkdir()
    for file in folder.iterdir():
        if file.name != "preprocessor_config.json":
            (copy / file.name).write_bytes(file.read_bytes())
    found = start(tmp_path, copy)
    try:
        assert "WARNING: this server cannot read images" in found.errors
        assert found.post("/generate", {"inputs": "a", "parameters": {"max_new_tokens": 2}}).status == 200
        answer = found.post("/v1/chat/completions", chat([image(data_url(PNG))]))
        assert answer.status == 422
        assert "this server cannot read images" in answer.json()["error"]["message"]
    finally:
        found.kill()
