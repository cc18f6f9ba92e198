"""How each family's prompts hold images: the model's image processor, and the text in a placeholder's place.

The texts are those that the families were trained with, and that transformers' processors make; tests compare the two.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL.Image

from penstock.engine.request import IMAGE_ARRAYS, Array

Outputs = Mapping[str, Any]  # of an image processor, for one image


@dataclass(frozen=True)
class Model:
    """What the files of a model's folder say. pixels: transformers' image processor; token: the placeholder; settings:
    of processor_config.json over config.json; bos: the token that begins a text."""

    pixels: Any
    token: str
    bos: str
    config: Mapping[str, Any]
    settings: Mapping[str, Any]

    @property
    def tower(self) -> Mapping[str, Any]:
        found = self.config.get("vision_config")
        return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class Kind:
    """How one family's prompts hold images.

    words: what takes the place of an image's placeholder. around: what stands before and behind a placeholder that no
    chat template printed. options: of the image processor's call. finish: the last touch to a prompt with images, and
    whether the tokenizer then adds its special tokens; None for what the route does anyway. copies: in the pixels, see
    Array.
    """

    words: Callable[[Model, Outputs], str]
    around: tuple[str, str] = ("", "")
    options: Mapping[str, Any] | None = None
    finish: Callable[[Model, str], tuple[str, bool | None]] = lambda _, text: (text, None)
    copies: Callable[[Model], tuple[int, int]] | None = None


class Processor:
    """Prepares images for one model."""

    def __init__(self, model: Model, kind: Kind) -> None:
        self._model, self._kind = model, kind
        self.token = model.token
        self.inline = f"{kind.around[0]}{model.token}{kind.around[1]}"

    def prepare(self, image: PIL.Image.Image) -> tuple[dict[str, Array], str]:
        """The arrays that the tower takes, and the text for the placeholder's place. Raises what the image processor
        does."""
        outputs = self._model.pixels([image], return_tensors="np", **(self._kind.options or {}))
        found = {name: np.asarray(outputs[name]) for name in IMAGE_ARRAYS if name in outputs}
        if "pixel_attention_mask" in found:  # 64 bits say what one can
            found["pixel_attention_mask"] = found["pixel_attention_mask"].astype(np.bool_)
        arrays = {name: _packed(array) for name, array in found.items()}
        if self._kind.copies is not None:
            arrays["pixel_values"] = _packed(found["pixel_values"], *self._kind.copies(self._model))
        return arrays, self._kind.words(self._model, outputs)

    def finished(self, text: str) -> tuple[str, bool | None]:
        """The prompt as it is tokenized; see Kind.finish."""
        return self._kind.finish(self._model, text)


def load_processor(folder: Path, token: str) -> Processor:
    """The processor of a model's folder. Raises whatever transformers does where its files are no good."""
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    config, settings = _read(folder / "config.json"), _read(folder / "processor_config.json")
    bos = _read(folder / "tokenizer_config.json").get("bos_token") or "<bos>"
    pixels = AutoImageProcessor.from_pretrained(
        str(folder), backend="pil", local_files_only=True, trust_remote_code=False
    )
    bos = bos["content"] if isinstance(bos, dict) else bos
    settings = config | {key: value for key, value in settings.items() if value is not None}
    return Processor(Model(pixels, token, bos, config, settings), KINDS[config["model_type"]])


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def _llava(model: Model, outputs: Outputs) -> str:
    height, width = outputs["pixel_values"].shape[-2:]
    return model.token * (_squares(model, height, width) - _dropped(model))


def _llava_next(model: Model, outputs: Outputs) -> str:
    """The whole image, then its pieces side by side without the padding, with one more row at the end of each line."""
    from transformers.image_processing_utils import select_best_resolution

    height, width = (int(n) for n in outputs["image_sizes"][0])
    tile = outputs["pixel_values"].shape[-1]
    side = tile // _patch(model)
    best_height, best_width = select_best_resolution([height, width], model.pixels.image_grid_pinpoints)
    lines, columns = best_height // tile * side, best_width // tile * side
    if width / height > columns / lines:  # the padding is above and below
        lines -= (lines - int(round(height * (columns / width), 7))) // 2 * 2
    else:
        columns -= (columns - int(round(width * (lines / height), 7))) // 2 * 2
    return model.token * (_squares(model, tile, tile) - _dropped(model) + lines * (columns + 1))


def _squares(model: Model, height: int, width: int) -> int:
    """Rows that a LLaVA tower makes of one piece, its class token included."""
    has_class = model.tower.get("model_type", "clip_vision_model") == "clip_vision_model"
    extra = int(model.settings.get("num_additional_image_tokens", has_class))
    return (height // _patch(model)) * (width // _patch(model)) + extra


def _dropped(model: Model) -> int:
    return int(model.settings.get("vision_feature_select_strategy", "default") == "default")


def _patch(model: Model) -> int:
    return int(model.settings.get("patch_size") or model.tower.get("patch_size") or 14)


def _idefics3(model: Model, outputs: Outputs) -> str:
    """The pieces line by line, each with its place, then the whole image."""
    rows, columns = int(outputs["rows"][0][0]), int(outputs["cols"][0][0])
    fake, image = "<fake_token_around_image>", model.token * _piece_rows(model)
    whole = f"{fake}<global-img>{image}{fake}"
    if rows == columns == 0:
        return whole
    lines = ("".join(f"{fake}<row_{y}_col_{x}>{image}" for x in range(1, columns + 1)) for y in range(1, rows + 1))
    return "".join(f"{line}\n" for line in lines) + f"\n{whole}"


def _piece_rows(model: Model) -> int:
    side = int(model.tower.get("image_size", 224)) // int(model.tower.get("patch_size", 32))
    return int(model.settings.get("image_seq_len") or side**2 // int(model.config.get("scale_factor", 2)) ** 2)


def _qwen2_vl(model: Model, outputs: Outputs) -> str:
    return model.token * (int(outputs["image_grid_thw"][0].prod()) // model.pixels.merge_size**2)


def _frames(model: Model) -> tuple[int, int]:
    return model.pixels.temporal_patch_size, model.pixels.patch_size**2


def _paligemma(model: Model, _: Outputs) -> str:
    return model.token * int(model.pixels.image_seq_length)  # preprocessor_config.json has it


def _paligemma_prompt(model: Model, text: str) -> tuple[str, bool]:
    """Images, then the beginning of a sequence, then the task, then the end of a line."""
    end = text.rfind(model.token) + len(model.token)
    return f"{text[:end]}{model.bos}{text[end:]}\n", False


def _packed(array: np.ndarray, copies: int = 1, stretch: int = 1) -> Array:
    """Numbers for the wire."""
    shape = list(array.shape)
    kind: Literal["float32", "int64", "bool"] = "float32"
    if array.dtype == np.bool_:
        kind = "bool"
    elif np.issubdtype(array.dtype, np.integer):
        kind = "int64"
    once = array.reshape(-1, copies, stretch)[:, 0]
    return Array(kind, shape, once.astype(kind).tobytes(), copies, stretch)


QWEN_VL = Kind(_qwen2_vl, around=("<|vision_start|>", "<|vision_end|>"), copies=_frames)
KINDS = {
    "llava": Kind(_llava),
    "llava_next": Kind(_llava_next),
    "idefics3": Kind(_idefics3, options={"return_row_col_info": True}),
    "smolvlm": Kind(_idefics3, options={"return_row_col_info": True}),
    "paligemma": Kind(_paligemma, finish=_paligemma_prompt),
    "qwen2_vl": QWEN_VL,
    "qwen2_5_vl": QWEN_VL,
}
