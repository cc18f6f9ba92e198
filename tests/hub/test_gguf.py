"""The GGUF reader: damaged and hostile files are refused with their name and the reason, and at no cost."""

from __future__ import annotations

import json
import os
import random
import resource
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from penstock.errors import PenstockError
from penstock.hub.catalogue import entries as catalogue_entries
from penstock.hub.config import read_config
from penstock.hub.fingerprint import fingerprint
from penstock.hub.gguf.file import read_gguf
from penstock.hub.gguf.link import LINK, linked_files
from penstock.hub.snapshot import resolve
from penstock.hub.weights import read_weights
from penstock.text.tokenizer import load_tokenizer
from tests.checkpoints import CHAT_TEMPLATE
from tests.hub.gguf_files import tokenizer_keys, write_gguf


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PENSTOCK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


@pytest.fixture
def file(tiny_llama: Path, tmp_path: Path) -> Path:
    return write_gguf(tiny_llama, tmp_path / "tiny.gguf")


def refusal(file: Path) -> str:
    with pytest.raises(PenstockError) as caught:
        resolve(str(file))
    assert str(file.parent) in caught.value.what
    assert caught.value.why
    assert len(str(caught.value).splitlines()) <= 6
    return str(caught.value)


def number(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(value: str) -> bytes:
    raw = value.encode()
    return number(len(raw)) + raw


def header(keys: bytes = b"", key_count: int = 0, tensors: bytes = b"", tensor_count: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<I", 3) + number(tensor_count) + number(key_count) + keys + tensors


def tensor(dims: list[int], kind: int = 0, offset: int = 0, name: str = "token_embd.weight") -> bytes:
    return text(name) + struct.pack("<I", len(dims)) + b"".join(map(number, dims)) + struct.pack("<IQ", kind, offset)


ALIGNMENT = text("general.alignment") + struct.pack("<I", 4)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "fewer than any"),
        (b"GGU", "fewer than any"),
        (b"GGML" + bytes(40), "does not begin"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(40), "version 1"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(40), "big-endian"),
        (header(key_count=2**63), "more than it can hold"),
        (header(tensor_count=2**40), "more than it can hold"),
        (header(number(2**62) + bytes(20), 1), "claims"),
        (header(text("a") + struct.pack("<IQ", 8, 2**40), 1), "claims"),
        (header(text("a") + struct.pack("<IIQ", 9, 8, 2**40) + bytes(80), 1), "more than it can hold"),
        (header(text("a") + struct.pack("<IIQ", 9, 0, 2**62) + bytes(80), 1), "more than it can hold"),
        (header(text("a") + struct.pack("<IIQ", 9, 9, 1) + bytes(80), 1), "array of type 9"),
        (header(text("a") + struct.pack("<I", 77) + bytes(80), 1), "unknown type 77"),
        (header(2 * (text("a") + struct.pack("<II", 4, 7)), 2), "stands twice"),
        (header(number(4) + b"\xff\xff\xff\xff" + bytes(20), 1), "UTF-8"),
        (header(ALIGNMENT + struct.pack("<I", 7), 1) + bytes(64), "power of two"),
        (header(ALIGNMENT + struct.pack("<I", 0), 1) + bytes(64), "power of two"),
        (header(tensors=tensor([4, 2**61]), tensor_count=1) + bytes(64), "impossible shape"),
        (header(tensors=tensor([2**32, 2**32]), tensor_count=1) + bytes(64), "impossible shape"),
        (header(tensors=tensor([0, 4]), tensor_count=1) + bytes(64), "impossible shape"),
        (header(tensors=tensor([33, 1], kind=2), tensor_count=1) + bytes(640), "impossible shape"),
        (header(tensors=tensor([1] * 5), tensor_count=1) + bytes(64), "dimensions"),
        (header(tensors=tensor([1024, 1024]), tensor_count=1) + bytes(64), "cut short"),
        (header(tensors=tensor([4], offset=2**63), tensor_count=1) + bytes(64), "cut short"),
        (header(tensors=tensor([4], offset=7), tensor_count=1) + bytes(64), "impossible offset"),
        (header(tensors=tensor([4]) + tensor([4], name="b"), tensor_count=2) + bytes(640), "impossible offset"),
        (header(tensors=tensor([4]) + tensor([4], offset=32), tensor_count=2) + bytes(640), "stands twice"),
        (header(tensors=tensor([256], kind=10), tensor_count=1) + bytes(640), "Q2_K"),
        (header(tensors=tensor([256], kind=999), tensor_count=1) + bytes(640), "999"),
    ],
)
def test_a_file_that_lies(tmp_path: Path, raw: bytes, reason: str) -> None:
    (tmp_path / "bad.gguf").write_bytes(raw)
    with pytest.raises(PenstockError) as caught:
        read_gguf(tmp_path / "bad.gguf")
    assert reason in str(caught.value)
    refusal(tmp_path / "bad.gguf")


def use(folder: Path) -> None:
    """All that is read of a model before its weights."""
    read_config(folder)
    read_weights(folder)
    tokenizer = load_tokenizer(folder)
    if tokenizer is not None:
        tokenizer.decode(tokenizer.encode("the quick fox 123"))


def test_mutants_are_refused_or_harmless(file: Path) -> None:
    """1,000 files with flipped bits, changed numbers, cuts and moved bytes: nothing but our own errors, no memory."""
    raw = file.read_bytes()
    head = raw.index(b"token_embd.weight") + 2000
    rng = random.Random(11)
    mutant = file.with_name("mutant.gguf")
    refused = 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(1000):
        data = bytearray(raw)
        for _ in range(rng.choice((1, 1, 3))):
            # the counts, types and offsets are among long texts: half of the flips aim at non-letters
            end = min(head, len(data) - 64)
            if end < 100:
                break
            at = rng.randrange(4, end)
            while i % 2 and chr(data[at]).isalnum():
                at = rng.randrange(4, end)
            how = rng.randrange(4)
            if how == 0:
                data[at] ^= 1 << rng.randrange(8)
            elif how == 1:
                data[at : at + 8] = rng.choice((2**64 - 1, 2**63, 2**32, 2**31, 0, 1)).to_bytes(8, "little")
            elif how == 2:
                del data[at : at + rng.randrange(1, 64)]
            else:
                del data[rng.randrange(at, len(data)) :]
        mutant.write_bytes(data)
        since = time.monotonic()
        try:
            use(resolve(str(mutant)).path)
        except PenstockError:
            refused += 1
        assert time.monotonic() - since < 3
    assert refused > 600
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


def test_every_truncation_is_refused(file: Path) -> None:
    raw = file.read_bytes()
    for cut in range(0, len(raw) - 64, len(raw) // 200):
        file.write_bytes(raw[:cut])
        refusal(file)


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    assert "not a regular file" in refusal(tmp_path / "pipe.gguf")
    (tmp_path / "two").mkdir()
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "two" / name).write_bytes(b"GGUF")
    assert "2 GGUF models" in refusal(tmp_path / "two")


def test_parts_that_are_missing_or_mixed_up(tiny_llama: Path, tmp_path: Path) -> None:
    write_gguf(tiny_llama, tmp_path / "m.gguf", shards=10)
    files = sorted(tmp_path.glob("m-*.gguf"))
    second = files[1].read_bytes()
    files[1].unlink()
    assert "missing" in refusal(files[0])
    files[1].write_bytes(files[0].read_bytes())
    assert "part 2" in refusal(files[0])
    files[1].write_bytes(second)
    lone = tmp_path / "renamed.gguf"
    lone.write_bytes(files[0].read_bytes())
    assert "its name does not say which" in refusal(lone)


def test_the_folder_is_made_once_and_again_when_the_file_changes(file: Path, cache: Path) -> None:
    first = resolve(str(file)).path
    made = (first / "tokenizer.json").stat().st_mtime_ns
    mark = fingerprint(first)
    assert resolve(str(file)).path == first
    assert (first / "tokenizer.json").stat().st_mtime_ns == made
    assert first.stat().st_mode & 0o077 == 0
    data = bytearray(file.read_bytes())
    data[-500] ^= 64  # a weight
    file.write_bytes(data)
    second = resolve(str(file)).path
    assert second != first
    assert fingerprint(second) != mark
    assert len(list(cache.iterdir())) == 2


def test_a_link_counts_only_in_our_cache(tiny_llama: Path, tmp_path: Path, file: Path) -> None:
    """A model folder from elsewhere cannot make us read files of its choice."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    (folder / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    (folder / LINK).write_text(json.dumps({"files": [str(file)]}))
    assert linked_files(folder) is None
    with pytest.raises(PenstockError, match=r"no \*.safetensors"):
        read_weights(folder)


def test_families_that_are_not_known(tiny_llama: Path, tmp_path: Path) -> None:
    file = write_gguf(tiny_llama, tmp_path / "moe.gguf", extra={"llama.expert_count": 8})
    assert "mixture of experts" in refusal(file)
    raw = file.read_bytes().replace(text("llama"), text("mamba"), 1)
    file.write_bytes(raw)
    assert "mamba" in refusal(file)


TEXTS = [
    "Hello world", " leading and trailing ", "a  b   c\n\n\td\r\n", "", "x", "it's I'LL we'Ve don't",
    "1234567 3.14 2024-01-02", "naïve café Ünïcödé ß", "日本語のテキスト。", "😀👍🏽 emoji \u200b",
    "<s>system</s> <|user|>hi", "def f(x):\n    return x**2 # ok", "e\u0301 vs \u00e9", "!!!???...", "\x00\x07 control",
    "MixedCASEWords andHTTPServer", "the quick brown fox jumps over the lazy dog " * 3,
]  # fmt: skip


def trained(folder: Path, pattern: str | None, **options: Any) -> tokenizers.Tokenizer:
    """A byte-level tokenizer that cuts texts by `pattern`, with control and user-defined tokens."""
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

    made = tokenizers.Tokenizer(models.BPE(ignore_merges=options.get("ignore_merges", False)))
    if options.get("nfc"):
        made.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if options.get("digits") else []
    if pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(pattern), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None))
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([t * 4 for t in TEXTS], trainer)
    made.add_special_tokens(["<s>", "</s>", "<|user|>"])
    made.add_tokens([AddedToken("<tool>", normalized=False)])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
    )
    made.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return made


_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@pytest.mark.parametrize(
    ("pre", "pattern", "options"),
    [
        ("gpt-2", None, {}),
        ("smollm", None, {"digits": True}),
        ("llama-bpe", _WORDS + r"\p{N}{1,3}" + _REST, {"ignore_merges": True}),
        ("qwen2", _WORDS + r"\p{N}" + _REST, {"nfc": True}),
    ],
)
def test_byte_level_tokens_are_the_originals(
    tiny_llama: Path, tmp_path: Path, pre: str, pattern: str | None, options: dict[str, Any]
) -> None:
    folder = tmp_path / "original"
    folder.mkdir()
    truth = trained(folder, pattern, **options)
    file = write_gguf(tiny_llama, tmp_path / "t.gguf", tokenizer=tokenizer_keys(folder, pre))
    ours = load_tokenizer(resolve(str(file)).path)
    assert ours is not None
    for sample in [*TEXTS, "call <tool> now<|user|>", "<|user|><s>"]:
        ids = truth.encode(sample).ids
        assert ours.encode(sample) == ids, sample
        assert ours.decode(ids, skip_special_tokens=False) == truth.decode(ids, skip_special_tokens=False)
        assert ours.decode(ids) == truth.decode(ids)
    assert (ours.bos_token, ours.eos_token, ours.chat_template) == ("<s>", "</s>", CHAT_TEMPLATE)


@pytest.mark.parametrize("space_prefix", [True, False])
def test_sentencepiece_tokens_are_the_originals(tiny_llama: Path, tmp_path: Path, space_prefix: bool) -> None:
    """Against the sentencepiece library itself."""
    import sentencepiece

    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(t.replace("\x00", "") for t in TEXTS * 5 if t), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "sp"), model_type="bpe", vocab_size=500, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=space_prefix,
        user_defined_symbols=["<tool>"], minloglevel=2, hard_vocab_limit=False, character_coverage=0.98,
    )  # fmt: skip
    truth = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "sp.model"))
    kinds = []
    for i in range(len(truth)):
        kind = 2 if truth.is_unknown(i) else 3 if truth.is_control(i) else 6 if truth.is_byte(i) else 1
        kinds.append(4 if truth.id_to_piece(i) == "<tool>" else kind)
    keys = {
        "model": "llama", "tokens": [truth.id_to_piece(i) for i in range(len(truth))], "types": kinds,
        "scores": [truth.get_score(i) for i in range(len(truth))], "bos": 1, "eos": 2, "unk": 0,
        "space_prefix": space_prefix,
    }  # fmt: skip
    file = write_gguf(tiny_llama, tmp_path / "sp.gguf", tokenizer=keys)
    ours = load_tokenizer(resolve(str(file)).path)
    assert ours is not None
    for sample in TEXTS:
        if "<s>" in sample or not sample:  # the library takes control tokens in a text for plain text
            continue
        ids = truth.encode(sample)
        assert ours.encode(sample) == [1, *ids], sample
        assert ours.decode([1, *ids]) == truth.decode(ids), sample
    assert ours.encode("<s>hi")[:2] == [1, 1]


def test_tokenizers_that_do_not_fit(tiny_llama: Path, tmp_path: Path) -> None:
    keys = tokenizer_keys(tiny_llama)
    n = len(keys["tokens"])
    for change, reason in (
        ({"pre": "unheard-of"}, "unheard-of"),
        ({"model": "rwkv"}, "rwkv"),
        ({"merges": ["a b c"]}, "two tokens"),
        ({"merges": ["nothere neither"]}, "does not fit together"),
        ({"tokens": ["a"] * n}, "twice"),
        ({"types": [1]}, "token_type"),
        ({"tokens": [f"{i}" + "x" * 600 for i in range(n)]}, "512 characters"),
    ):
        file = write_gguf(tiny_llama, tmp_path / "t.gguf", tokenizer={**keys, **change})
        assert reason in refusal(file)


def test_ends_of_an_answer(tiny_llama: Path, tmp_path: Path) -> None:
    keys = tokenizer_keys(tiny_llama)
    keys["tokens"][3], keys["types"][3] = "<|eot_id|>", 3
    path = resolve(str(write_gguf(tiny_llama, tmp_path / "t.gguf", tokenizer=keys))).path
    assert json.loads((path / "generation_config.json").read_text())["eos_token_id"] == [1, 3]


def test_catalogue_lists_what_the_guides_ran() -> None:
    """The models of the documents that the project started from."""
    hubs = {entry.model for entry in catalogue_entries()}
    assert {
        "meta-llama/Llama-2-7b-chat-hf", "meta-llama/Llama-2-13b-chat-hf", "meta-llama/Llama-2-70b-chat-hf",
        "tiiuae/falcon-7b-instruct", "tiiuae/falcon-40b-instruct", "google/flan-t5-xxl", "bigscience/bloomz",
        "meta-llama/Meta-Llama-3-8B", "meta-llama/Meta-Llama-3-70B-Instruct", "mistralai/Mistral-7B-v0.1",
        "bigcode/starcoder2-15b", "bigscience/bloom", "facebook/galactica-30b", "facebook/opt-30b",
        "EleutherAI/gpt-neox-20b",
    } <= hubs  # fmt: skip
