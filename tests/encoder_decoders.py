"""Tiny random encoder-decoders made by transformers, with a tokenizer like T5's."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForSeq2SeqLM

Options = dict[str, Any]

USUAL: Options = {
    "vocab_size": 512,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "n_positions": 128,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
OWN_HEAD = "own_head"  # of the options: the checkpoint stores an output matrix beside the embedding
SHAPES: dict[str, Options] = {
    "t5": {"model_type": "t5", **USUAL},
    "flan-t5": {
        "model_type": "t5",
        **USUAL,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        OWN_HEAD: True,
    },
    "mt5": {"model_type": "mt5", **USUAL, OWN_HEAD: True},
    "umt5": {"model_type": "umt5", **USUAL},
}


def random_options(model_type: str, rng: random.Random) -> Options:
    """A configuration that transformers accepts, every switch turned at random."""
    layers = rng.choice([1, 2, 3])
    buckets = rng.choice([8, 20, 32, 33])
    return {
        "model_type": model_type,
        **USUAL,
        "vocab_size": rng.choice([300, 333, 512]),
        "d_model": rng.choice([24, 50, 64]),
        "d_kv": rng.choice([5, 8, 10, 16, 64]),
        "d_ff": rng.choice([40, 100, 128]),
        "num_layers": layers,
        "num_decoder_layers": rng.randint(1, layers),  # transformers' own cache has no room for more
        "num_heads": rng.choice([1, 3, 4]),
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": rng.choice([buckets, 40, 128]),
        "layer_norm_epsilon": rng.choice([1e-6, 1e-4]),
        "feed_forward_proj": rng.choice(["relu", "gelu", "gated-gelu", "gated-silu", "gated-relu"]),
        "tie_word_embeddings": rng.choice([True, False]),
        "decoder_start_token_id": rng.choice([0, 5]),
        OWN_HEAD: rng.choice([True, False]),
    }


def save_encoder_decoder(folder: Path, options: Options, seed: int = 0) -> Path:
    """Write a random model of a configuration into `folder`."""
    torch.manual_seed(seed)
    options = copy.deepcopy(options)
    own_head = options.pop(OWN_HEAD, False)
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(**options), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.normal_(0, 0.15 if "shared" in name else 1.0 if "relative" in name else 0.3)
    model.save_pretrained(folder)
    if own_head:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        tensors["lm_head.weight"] = torch.randn_like(tensors["shared.weight"]) * 0.2
        save_file(tensors, file, {"format": "pt"})
    written = json.loads((folder / "config.json").read_text())
    if "tie_word_embeddings" in options:  # as the checkpoints of the hub say it
        written.pop("scale_decoder_outputs", None)
        written["tie_word_embeddings"] = options["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(written))
    return folder


def save_unigram(folder: Path, size: int = 500) -> None:
    """A SentencePiece-like tokenizer: pieces with a likelihood, spaces as letters, </s> behind every text."""
    rng, letters = random.Random(0), "abcdefghijklmnopqrstuvwxyz"
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "a",
        "lazy",
        "dog",
        "seven",
        "wizards",
        "make",
        "toxic",
        "brew",
    ]
    parts = ["".join(rng.choices(letters, k=rng.randint(2, 4))) for _ in range(size)]
    pieces = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0}
    pieces |= dict.fromkeys("\u2581" + letters + letters.upper() + "0123456789.,:?!'-", -8.0)
    pieces |= dict.fromkeys((f"\u2581{word}" for word in words), -3.0)
    pieces |= {part if i % 2 else f"\u2581{part}": -6.0 - i / size for i, part in enumerate(parts)}
    tokenizer = Tokenizer(models.Unigram(list(pieces.items())[:size], unk_id=2))
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "T5Tokenizer",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "model_max_length": 512,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
