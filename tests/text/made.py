"""Small tokenizers of every kind, made on the spot."""

from __future__ import annotations

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from penstock.text.tokenizer import Tokenizer

CORPUS = [
    "the cat sat on the mat, the dog ran.",
    "naïve café 😀 🦝 日本語 привет",
    "x = [1, 2, 3]  # spaces   here",
] * 4


def byte_level() -> Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens(["€uro"])  # an added token outside the byte alphabet
    return Tokenizer(backend, {"eos_token": "</s>", "bos_token": {"content": "<s>"}}, None)


def vocabulary() -> dict[str, int]:
    words = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    words += ["▁", "▁the", "▁cat", "s", "at", "▁▁", "日", "é", ".", "▁a▁b", "<0xZZ>"]
    return {word: i for i, word in enumerate(words)}


def byte_fallback(decoder: decoders.Decoder, without: str = "") -> Tokenizer:
    words = {word: i for word, i in vocabulary().items() if word != without}
    backend = tokenizers.Tokenizer(models.BPE(words, [], unk_token="<unk>", byte_fallback=True))
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.decoder = decoder
    return Tokenizer(backend, {"eos_token": "</s>"}, None)


LLAMA = byte_fallback(
    decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
)
GEMMA = byte_fallback(decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]))
METASPACE = byte_fallback(decoders.Metaspace())
METASPACE_NEVER = byte_fallback(decoders.Metaspace(prepend_scheme="never"))
WORDPIECE = byte_fallback(decoders.WordPiece("s"))
BYTE_LEVEL = byte_level()

BYTE0 = vocabulary()["<0x00>"]
