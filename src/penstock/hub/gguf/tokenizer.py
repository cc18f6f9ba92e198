"""The tokenizer of a GGUF file as tokenizer.json and tokenizer_config.json.

Two kinds: byte-level BPE ("gpt2"), whose file names the way texts are cut before merging, and SentencePiece's BPE
("llama"), whose file has a score for each piece instead of merges.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from penstock.errors import ModelError
from penstock.hub.folder import damaged
from penstock.hub.gguf.file import GgufModel

MAX_PIECE = 512  # characters; the longest in use are runs of 128 spaces
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 2, 3, 4, 5, 6  # token types
_SPACE = "\u2581"  # SentencePiece's mark for a space

# How the tokenizers of these models cut a text (their own tokenizer.json). None: GPT-2's way, in the library.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA_3 = _WORDS + r"\p{N}{1,3}" + _REST
_QWEN_2 = _WORDS + r"\p{N}" + _REST
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_TEKKEN = rf"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*|\p{{N}}{_CASED_REST}"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT_4O = rf"{_BEFORE}{_UPPER}*{_LOWER}+{_SHORT}|{_BEFORE}{_UPPER}+{_LOWER}*{_SHORT}|\p{{N}}{{1,3}}{_CASED_REST}"
_BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"


@dataclass(frozen=True)
class _Cut:
    """pattern: what a word is; digits: each digit is cut off first. whole_words: a word that is a token needs no
    merges. bos: texts begin with the beginning-of-sequence token where the file does not say. nfc: texts are composed
    first."""

    pattern: str | None = None
    digits: bool = False
    whole_words: bool = False
    bos: bool = False
    nfc: bool = False


_CUTS = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion"), _Cut()),
    **dict.fromkeys(
        ("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b"), _Cut(digits=True)
    ),
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "midm-2.0", "lfm2"),
        _Cut(_LLAMA_3, whole_words=True, bos=True),
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _Cut(_LLAMA_3)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _Cut(_QWEN_2, nfc=True)),
    **dict.fromkeys(("stablelm2", "hunyuan", "megrez"), _Cut(_QWEN_2)),
    "tekken": _Cut(_TEKKEN, whole_words=True, bos=True),
    **dict.fromkeys(("gpt-4o", "llama4"), _Cut(_GPT_4O)),
    **dict.fromkeys(("bloom", "poro-chat", "gpt3-finnish"), _Cut(_BLOOM)),
}
_UNNAMED = {"qwen2": "qwen2", "qwen3": "qwen2", "llama": "llama-bpe"}  # files older than the key that names the cut


def tokenizer_of(model: GgufModel) -> Tokenizer | None:
    """The tokenizer, None where the file has none. Raises ModelError for one that is damaged or not known."""
    kind = model.metadata.get("tokenizer.ggml.model")
    if kind is None or kind == "none":
        return None
    pieces = _Pieces(model)
    try:
        if kind == "gpt2":
            return _byte_level(pieces)
        if kind == "llama":
            return _sentencepiece(pieces)
    except ModelError:
        raise
    except Exception as error:  # the library raises plain Exception
        words = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise damaged(model.file, f"Its tokenizer does not fit together: {words}.") from None
    raise ModelError(
        f"The GGUF file {model.file} has a tokenizer of kind {str(kind)[:40]!r}.",
        "Known kinds are gpt2 (byte-level BPE) and llama (SentencePiece).",
        "Take the model's safetensors repository.",
    )


def settings_of(model: GgufModel, context: int) -> dict[str, Any]:
    """tokenizer_config.json: special tokens by name, and the chat templates. context: in tokens."""
    pieces = _Pieces(model)
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"), ("sep", "seperator")):
        found = pieces.special(key)
        if found is not None:
            settings[f"{name}_token"] = pieces.names[found]
    template = model.metadata.get("tokenizer.chat_template")
    templates = [{"name": "default", "template": template}] if isinstance(template, str) else []
    for key, value in model.metadata.items():
        name = key.removeprefix("tokenizer.chat_template.")
        if name != key and isinstance(value, str):
            templates.append({"name": name, "template": value})
    if templates:
        settings["chat_template"] = template if len(templates) == 1 and isinstance(template, str) else templates
    return settings


class _Pieces:
    """The vocabulary as the file lists it."""

    def __init__(self, model: GgufModel) -> None:
        self.model = model
        names = model.metadata.get("tokenizer.ggml.tokens", [])
        if not isinstance(names, list):
            raise damaged(model.file, "Its tokenizer.ggml.tokens is not a list of texts.")
        self.names = names
        self.ids = {name: i for i, name in enumerate(names)}
        if len(self.ids) != len(names):
            raise damaged(model.file, "Its vocabulary has a token twice.")
        if any(len(name) > MAX_PIECE for name in names):
            raise damaged(model.file, f"Its vocabulary has a token of more than {MAX_PIECE} characters.")
        kinds = model.metadata.get("tokenizer.ggml.token_type")
        if kinds is None:
            kinds = np.ones(len(names), np.int32)
        if not isinstance(kinds, np.ndarray) or len(kinds) != len(names):
            raise damaged(model.file, "Its tokenizer.ggml.token_type does not fit its tokens.")
        self.kinds = kinds

    def special(self, name: str) -> int | None:
        """The id of a special token, None where the file names none, or one outside the vocabulary."""
        value = self.model.metadata.get(f"tokenizer.ggml.{name}_token_id")
        return value if type(value) is int and 0 <= value < len(self.names) else None

    def flag(self, name: str, default: bool) -> bool:
        value = self.model.metadata.get(f"tokenizer.ggml.{name}", default)
        return value if isinstance(value, bool) else default

    def added(self) -> list[AddedToken]:
        """The tokens that are found in a text before it is cut: control tokens, the unknown one, users' own."""
        return [
            AddedToken(self.names[i], special=bool(self.kinds[i] != _USER_DEFINED), normalized=False)
            for i in np.flatnonzero(np.isin(self.kinds, (_UNKNOWN, _CONTROL, _USER_DEFINED)))
            if self.names[i]
        ]


def _byte_level(pieces: _Pieces) -> Tokenizer:
    merges = pieces.model.metadata.get("tokenizer.ggml.merges", [])
    if not isinstance(merges, list):
        raise damaged(pieces.model.file, "Its tokenizer.ggml.merges is not a list of texts.")
    if any(merge.count(" ") != 1 for merge in merges):
        raise damaged(pieces.model.file, "Its tokenizer.ggml.merges has an entry that is not of two tokens.")
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    family = str(pieces.model.metadata.get("general.architecture"))
    name = pieces.model.metadata.get("tokenizer.ggml.pre", "default")
    cut = _CUTS.get(_UNNAMED.get(family, "") if name == "default" else str(name))
    if cut is None:
        raise ModelError(
            f"The GGUF file {pieces.model.file} cuts texts in the way {str(name)[:40]!r}, which is not known.",
            "Another way would give other tokens than the model was trained with.",
            "Take the model's safetensors repository.",
        )
    tokenizer = Tokenizer(models.BPE(vocab=pieces.ids, merges=pairs, ignore_merges=cut.whole_words))
    if cut.nfc:
        tokenizer.normalizer = normalizers.NFC()
    space = pieces.flag("add_space_prefix", False)
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if cut.digits else []
    if cut.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(cut.pattern), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=cut.pattern is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(pieces.added())
    ends = _ends(pieces, bos=cut.bos, eos=False)
    byte_level = processors.ByteLevel(trim_offsets=False)
    tokenizer.post_processor = byte_level if ends is None else processors.Sequence([byte_level, ends])
    return tokenizer


def _sentencepiece(pieces: _Pieces) -> Tokenizer:
    scores = pieces.model.metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, np.ndarray) or len(scores) != len(pieces.names) or not np.isfinite(scores).all():
        raise damaged(pieces.model.file, "Its tokenizer.ggml.scores do not fit its tokens.")
    unknown = pieces.special("unknown")
    if unknown is None:
        marked = np.flatnonzero(pieces.kinds == _UNKNOWN)
        unknown = int(marked[0]) if len(marked) else None
    tokenizer = Tokenizer(
        models.BPE(
            vocab=pieces.ids,
            merges=_merges(pieces, scores),
            unk_token=None if unknown is None else pieces.names[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = pieces.flag("add_space_prefix", True)
    marks = [normalizers.Replace(" ", _SPACE)]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), *marks] if prefix else marks)
    unmark = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*unmark, decoders.Strip(" ", 1, 0)] if prefix else unmark)
    tokenizer.add_tokens(pieces.added())
    ends = _ends(pieces, bos=True, eos=False)
    if ends is not None:
        tokenizer.post_processor = ends
    return tokenizer


def _merges(pieces: _Pieces, scores: np.ndarray) -> list[tuple[str, str]]:
    """Merges that do what the scores do: the pair that makes the piece of the highest score is joined first.

    Every way to make a piece of two others is a merge; those of one piece have neighbouring ranks.
    """
    ordinary = ~np.isin(pieces.kinds, (_UNKNOWN, _CONTROL, _BYTE))
    found = []
    for i in np.flatnonzero(ordinary):
        piece = pieces.names[i]
        for cut in range(1, len(piece)):
            left, right = pieces.ids.get(piece[:cut]), pieces.ids.get(piece[cut:])
            if left is not None and right is not None and ordinary[left] and ordinary[right]:
                found.append((-float(scores[i]), int(i), left, right))
    found.sort()
    return [(pieces.names[left], pieces.names[right]) for _, _, left, right in found]


def _ends(pieces: _Pieces, bos: bool, eos: bool) -> processors.TemplateProcessing | None:
    """What is put around a text, as the file says, else as given."""
    first = pieces.special("bos") if pieces.flag("add_bos_token", bos) else None
    last = pieces.special("eos") if pieces.flag("add_eos_token", eos) else None
    if first is None and last is None:
        return None
    special = [(pieces.names[i], i) for i in dict.fromkeys((first, last)) if i is not None]

    def around(*texts: str) -> list[str]:
        before = [] if first is None else [pieces.names[first]]
        after = [] if last is None else [pieces.names[last]]
        return [part for text in texts for part in (*before, text, *after)]

    return processors.TemplateProcessing(single=around("$A"), pair=around("$A", "$B:1"), special_tokens=special)
