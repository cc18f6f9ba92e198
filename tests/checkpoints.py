"""Tiny random checkpoints made by transformers, with a byte-level tokenizer trained on a few sentences."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM

from tests.families import SHAPES, Options

ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save_tiny(folder: Path, family: str, seed: int = 0, **overrides: Any) -> Path:
    """Write a random model of a family (a key of SHAPES) with its tokenizer into `folder`."""
    save_model(folder, {**SHAPES[family], **overrides}, seed)
    save_tokenizer(folder)
    return folder


def save_model(folder: Path, options: Options, seed: int = 0) -> Path:
    """Write a random model of a configuration into `folder`. max_shard_size: of its files."""
    torch.manual_seed(seed)
    options = copy.deepcopy(options)
    shards = options.pop("max_shard_size", "5GB")
    config = AutoConfig.for_model(**options)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # larger weights than the default, so that greedy text does not loop at once
        for name, parameter in model.named_parameters():
            if "norm" in name or ".ln_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
            else:
                parameter.normal_(0, 0.12)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0, 0.1)
    model.save_pretrained(folder, max_shard_size=shards)
    return folder


def save_tokenizer(folder: Path, special: tuple[str, ...] = (), chat_template: str = CHAT_TEMPLATE) -> None:
    """A byte-level BPE tokenizer of 512 entries with <s>, </s>, further special tokens and a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = "the quick brown fox jumps over a lazy dog while seven wizards make toxic brew for an evil queen "
    tokenizer.train_from_iterator([words * 20, words.title(), "0123456789 def return import"], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "model_max_length": 512,
        "chat_template": chat_template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
