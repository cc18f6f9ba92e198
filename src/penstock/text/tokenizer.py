"""The tokenizer of a model folder: text to ids and back, special tokens, the chat template's source."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from penstock.errors import ModelError
from penstock.text import detokenizer
from penstock.text.pieces import pieces_of
from penstock.text.template_files import DEFAULT, templates_of

# Files that a tokenizer without tokenizer.json consists of; transformers converts these.
SLOW_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt", "tekken.json")
NO_LIMIT = 10**12  # transformers writes 10^30 where a tokenizer knows no length
SPECIAL_KEYS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """Text to ids and back. Thread safe; `encode` releases the interpreter lock.

    chat_templates: the sources of the model's chat templates by name, {} where it has none; chat_template: the
    default one. bos_token and eos_token are strings or None; template_tokens: all named ones, as chat templates get
    them; model_max_length is in tokens, None where the folder has none.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, settings: dict[str, Any], chat_templates: dict[str, str] | None
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.chat_templates = chat_templates or {}
        self.chat_template = self.chat_templates.get(DEFAULT)
        self.pieces = pieces_of(backend)
        self.bos_token = _content(settings.get("bos_token"))
        self.eos_token = _content(settings.get("eos_token"))
        self.bos_id = self._id_of(self.bos_token)
        self.eos_id = self._id_of(self.eos_token)
        length = settings.get("model_max_length")
        self.model_max_length = int(length) if isinstance(length, int | float) and 0 < length < NO_LIMIT else None
        added = backend.get_added_tokens_decoder()
        special = {i for i, token in added.items() if token.special}
        extra = settings.get("additional_special_tokens") or settings.get("extra_special_tokens") or []
        named = [settings.get(key) for key in SPECIAL_KEYS]
        named += list(extra.values()) if isinstance(extra, dict) else list(extra)
        special |= {i for i in map(self._id_of, map(_content, named)) if i is not None}
        self.special_ids = frozenset(special)
        self.template_tokens = _template_tokens(settings, extra)

    def _id_of(self, token: str | None) -> int | None:
        return None if token is None else self.backend.token_to_id(token)

    def __len__(self) -> int:
        """Ids that the tokenizer knows; a model's output may be wider."""
        return self.backend.get_vocab_size()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text."""
        return list(self.backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def encode_all(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """The ids of many texts, on all cores."""
        return [list(e.ids) for e in self.backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)]

    def encode_offsets(self, text: str, add_special_tokens: bool = True) -> list[tuple[int, str, int, int]]:
        """(id, text, start, stop) per token; offsets are bytes of the UTF-8 text, 0 and 0 for added tokens."""
        encoding = self.backend.encode(text, add_special_tokens=add_special_tokens)
        positions: Sequence[int] = range(len(text) + 1)
        if not text.isascii():
            positions = [0, *_running_sum(len(c.encode("utf-8", "surrogatepass")) for c in text)]
        return [
            (i, text[start:stop], positions[start], positions[stop])
            for i, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True)
        ]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True, continues: bool = False) -> str:
        """The text of ids. `continues`: text precedes them, so that a leading space stays."""
        kept = [i for i in ids if not (skip_special_tokens and i in self.special_ids)]
        return detokenizer.decode(self.pieces, kept, continues)

    def token_text(self, token_id: int) -> str:
        """One token's text by itself, special tokens shown."""
        return detokenizer.decode(self.pieces, [token_id], continues=True)


def start_threads() -> None:
    """Start the threads that encode many texts, which otherwise start with the first of them. They may use the cores
    that the calling thread may use now."""
    tokenizers.Tokenizer(tokenizers.models.BPE()).encode_batch_fast(["", ""])


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a model folder, None when it has none. Raises ModelError when it is damaged."""
    settings = _settings(folder)
    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise ModelError(
                f"The tokenizer in {folder} cannot be read.",
                f"tokenizer.json is damaged or of a newer format ({_first_line(error)}).",
                "Fetch the file again; its size must match the hub's.",
            ) from error
    elif any((folder / name).is_file() for name in SLOW_FILES):
        backend = _converted(folder)
    else:
        return None
    return Tokenizer(backend, settings, templates_of(folder, settings))


def _converted(folder: Path) -> tokenizers.Tokenizer:
    """A fast tokenizer made from the older files; needs transformers."""
    try:
        from transformers import AutoTokenizer

        slow = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        return tokenizers.Tokenizer.from_str(slow.backend_tokenizer.to_str())
    except Exception as error:  # whatever the conversion stumbles over, the folder is at fault
        raise ModelError(
            f"The tokenizer in {folder} cannot be converted.",
            f"It has no tokenizer.json, and the older files do not load ({_first_line(error)}).",
            "Save it once with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)",
        ) from error


def _settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json over special_tokens_map.json; {} where neither is there."""
    merged = _read_json(folder / "special_tokens_map.json")
    merged.update({k: v for k, v in _read_json(folder / "tokenizer_config.json").items() if v is not None})
    return merged


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} cannot be read.", _first_line(error)) from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON.", _first_line(error), "Fetch the file again.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds no JSON object.", hint="Fetch the file again.")
    return value


def _template_tokens(settings: Mapping[str, Any], extra: Any) -> dict[str, str | list[str]]:
    """The special tokens by the names that transformers gives them in a template: `pad_token`, a model's own, ..."""
    named = {key: value for key, value in settings.items() if key.endswith("_token")}
    named |= extra if isinstance(extra, dict) else {}
    found: dict[str, str | list[str]] = {key: token for key, value in named.items() if (token := _content(value))}
    listed = [token for token in map(_content, extra) if token] if isinstance(extra, list) else []
    if listed:
        found |= {"additional_special_tokens": listed, "extra_special_tokens": listed}
    return found


def _content(token: object) -> str | None:
    """A token setting is a string, or an object that holds it as `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _running_sum(values: Iterable[int]) -> Iterable[int]:
    total = 0
    for value in values:
        total += value
        yield total


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]
