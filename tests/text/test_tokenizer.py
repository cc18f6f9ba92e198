"""Reading a folder's tokenizer, and its errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from penstock.errors import ModelError
from penstock.text.tokenizer import load_tokenizer

from .made import BYTE_LEVEL


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    BYTE_LEVEL.backend.save(str(tmp_path / "tokenizer.json"))
    config = {
        "bos_token": {"content": "<s>"},
        "eos_token": "</s>",
        "model_max_length": 4096,
        "chat_template": [{"name": "rag", "template": "r"}, {"name": "default", "template": "from config"}],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def test_settings_of_a_folder(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.model_max_length) == ("<s>", "</s>", 4096)
    assert tokenizer.special_ids == {0, 1}
    assert tokenizer.chat_template == "from config"
    (folder / "chat_template.jinja").write_text("from jinja")
    assert (load_tokenizer(folder) or tokenizer).chat_template == "from jinja"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "from json"}))
    assert (load_tokenizer(folder) or tokenizer).chat_template == "from json"


def test_offsets_are_bytes_of_the_text(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    text = "the café 🦝 ran"
    found = tokenizer.encode_offsets(text)
    assert [i for i, *_ in found] == tokenizer.encode(text)
    raw = text.encode()
    for _, piece, start, stop in found:
        assert raw[start:stop].decode() == piece
    assert found[-1][3] == len(raw)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"version": "9"}', "\udcff"])
def test_a_damaged_tokenizer_is_the_models_fault(folder: Path, damage: str) -> None:
    (folder / "tokenizer.json").write_bytes(damage.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelError) as caught:
        load_tokenizer(folder)
    assert len(str(caught.value).splitlines()) <= 6


@pytest.mark.parametrize("damage", ["{", "[]", "[" * 100_000])
def test_damaged_settings(folder: Path, damage: str) -> None:
    (folder / "tokenizer_config.json").write_text(damage)
    with pytest.raises(ModelError):
        load_tokenizer(folder)


def test_an_older_folder_is_converted(folder: Path) -> None:
    """vocab.json and merges.txt only, as GPT-2's folders were."""
    BYTE_LEVEL.backend.model.save(str(folder))
    (folder / "tokenizer.json").unlink()
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer.encode("the cat 🦝")) == "the cat 🦝"
