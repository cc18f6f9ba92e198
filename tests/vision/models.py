"""Tiny random vision-language models made by transformers, with their tokenizers and image processors."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    ProcessorMixin,
)

from tests.checkpoints import save_tokenizer

TEXT: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
CLIP: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "projection_dim": 32,
    "image_size": 28,
    "patch_size": 7,
}
IMAGE = 5  # the id of the placeholder: the first behind those of every tokenizer of `save_tokenizer`
PARTS_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Tiny:
    """options: of the config; pixels: preprocessor_config.json; settings: processor_config.json; special: tokens of the
    tokenizer, the placeholder first; around: what a template prints before and behind it; processor: transformers'."""

    options: dict[str, Any]
    pixels: dict[str, Any]
    settings: dict[str, Any]
    special: tuple[str, ...] = ("<image>",)
    around: tuple[str, str] = ("", "")
    processor: str = "LlavaProcessor"


PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
CLIP_PIXELS = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
LLAVA_SETTINGS = {"patch_size": 7, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
IDEFICS = {
    "text_config": TEXT,
    "vision_config": {**CLIP, "model_type": "idefics3_vision", "patch_size": 7},
    "image_token_id": IMAGE,
    "scale_factor": 2,
    "pad_token_id": 1,
}
IDEFICS_PIXELS = {"size": {"longest_edge": 84}, "max_image_size": {"longest_edge": 28}}
IDEFICS_TOKENS = (
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
    *(f"<row_{y}_col_{x}>" for y in range(1, 4) for x in range(1, 4)),
)
PALIGEMMA = {
    "vision_config": {**CLIP, "model_type": "siglip_vision_model"},
    "image_token_index": IMAGE,
    "projection_dim": 64,
    "hidden_size": 64,
    "pad_token_id": 1,
}
PALIGEMMA_PIXELS = {
    "image_processor_type": "SiglipImageProcessor",
    "size": {"height": 28, "width": 28},
    "image_seq_length": 16,
}
QWEN_TEXT = {
    **TEXT,
    "use_sliding_window": False,
    "max_window_layers": 3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
}
QWEN = {
    "image_token_id": IMAGE,
    "vision_start_token_id": IMAGE + 1,
    "vision_end_token_id": IMAGE + 2,
    "video_token_id": IMAGE + 3,
}
QWEN_PIXELS = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "patch_size": 7,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": 14 * 14 * 4, "longest_edge": 14 * 14 * 40},
}
QWEN_TOKENS = ("<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>")
QWEN_TOWER = {"depth": 2, "num_heads": 4, "patch_size": 7, "spatial_merge_size": 2, "temporal_patch_size": 2}
TINY: dict[str, Tiny] = {
    "llava": Tiny(
        {"model_type": "llava", "text_config": TEXT, "vision_config": CLIP, "image_token_index": IMAGE},
        {"image_processor_type": "CLIPImageProcessor", **CLIP_PIXELS},
        LLAVA_SETTINGS,
    ),
    "llava-siglip-qwen2": Tiny(
        {
            "model_type": "llava",
            "text_config": {**TEXT, "model_type": "qwen2"},
            "vision_config": {**CLIP, "model_type": "siglip_vision_model"},
            "image_token_index": IMAGE,
            "vision_feature_select_strategy": "full",
            "vision_feature_layer": -1,
        },
        {"image_processor_type": "SiglipImageProcessor", "size": {"height": 28, "width": 28}},
        {"patch_size": 7, "vision_feature_select_strategy": "full", "num_additional_image_tokens": 0},
    ),
    "llava-next": Tiny(
        {
            "model_type": "llava_next",
            "text_config": {**TEXT, "model_type": "mistral"},
            "vision_config": CLIP,
            "image_token_index": IMAGE,
            "image_grid_pinpoints": PINPOINTS,
        },
        {"image_processor_type": "LlavaNextImageProcessor", **CLIP_PIXELS, "image_grid_pinpoints": PINPOINTS},
        LLAVA_SETTINGS,
        processor="LlavaNextProcessor",
    ),
    "idefics3": Tiny(
        {"model_type": "idefics3", **IDEFICS},
        {"image_processor_type": "Idefics3ImageProcessor", **IDEFICS_PIXELS},
        {"image_seq_len": 4},
        IDEFICS_TOKENS,
        processor="Idefics3Processor",
    ),
    "smolvlm": Tiny(
        {"model_type": "smolvlm", **IDEFICS},
        {"image_processor_type": "SmolVLMImageProcessor", **IDEFICS_PIXELS},
        {"image_seq_len": 4},
        IDEFICS_TOKENS,
        processor="Idefics3Processor",  # that of SmolVLM needs torchvision; for images the two are alike
    ),
    "qwen2-vl": Tiny(
        {
            "model_type": "qwen2_vl",
            **QWEN,
            "text_config": {**QWEN_TEXT, "model_type": "qwen2_vl_text"},
            "vision_config": {**QWEN_TOWER, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
        },
        QWEN_PIXELS,
        {},
        QWEN_TOKENS,
        ("<|vision_start|>", "<|vision_end|>"),
        "Qwen2VLProcessor",
    ),
    "qwen2.5-vl": Tiny(
        {
            "model_type": "qwen2_5_vl",
            **QWEN,
            "text_config": {**QWEN_TEXT, "model_type": "qwen2_5_vl_text"},
            "vision_config": {
                **QWEN_TOWER,
                "hidden_size": 32,
                "out_hidden_size": 64,
                "intermediate_size": 48,
                "window_size": 28,
                "fullatt_block_indexes": [1],
            },
        },
        QWEN_PIXELS,
        {},
        QWEN_TOKENS,
        ("<|vision_start|>", "<|vision_end|>"),
        "Qwen2_5_VLProcessor",
    ),
    "paligemma": Tiny(
        {"model_type": "paligemma", "text_config": {**TEXT, "model_type": "gemma", "head_dim": 16}, **PALIGEMMA},
        PALIGEMMA_PIXELS,
        {},
        processor="PaliGemmaProcessor",
    ),
    "paligemma2": Tiny(
        {
            "model_type": "paligemma",
            "text_config": {**TEXT, "model_type": "gemma2", "head_dim": 16, "sliding_window": 200},
            **PALIGEMMA,
        },
        PALIGEMMA_PIXELS,
        {},
        processor="PaliGemmaProcessor",
    ),
}


def save_vision(folder: Path, name: str, seed: int = 0) -> Path:
    """Write a random model of TINY with its tokenizer and image processor into `folder`."""
    tiny = TINY[name]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(**json.loads(json.dumps(tiny.options)))
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key or ".ln_" in key:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.normal_(0, 0.12)
    model.save_pretrained(folder)
    placeholder = f"{tiny.around[0]}{tiny.special[0]}{tiny.around[1]}"
    save_tokenizer(folder, tiny.special, PARTS_TEMPLATE.replace("IMAGE", placeholder))
    (folder / "preprocessor_config.json").write_text(json.dumps(tiny.pixels))
    (folder / "processor_config.json").write_text(json.dumps(tiny.settings))
    return folder


def reference(folder: Path) -> PreTrainedModel:
    """transformers' model."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    return model.eval()


def their_processor(folder: Path, name: str) -> ProcessorMixin:
    """transformers' processor, its images read with Pillow as ours are."""
    pixels = AutoImageProcessor.from_pretrained(folder, backend="pil")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    kind = getattr(transformers, TINY[name].processor)

    class Still(kind):  # type: ignore[misc, valid-type]
        """Without a video processor, which needs torchvision."""

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return argument and super().check_argument_for_proper_class(argument_name, argument)

    made: ProcessorMixin = Still(pixels, tokenizer, **TINY[name].settings)
    return made


def picture(width: int, height: int, seed: int = 0) -> PIL.Image.Image:
    """Coloured noise over a gradient."""
    rng = np.random.default_rng(seed)
    slope = np.linspace(0, 120, width * height).reshape(height, width, 1)
    return PIL.Image.fromarray((slope + rng.integers(0, 130, (height, width, 3))).astype(np.uint8))


def encoded(image: PIL.Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """An image as a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def data_url(raw: bytes, kind: str = "png") -> str:
    """A file as an address."""
    return f"data:image/{kind};base64,{base64.b64encode(raw).decode()}"
