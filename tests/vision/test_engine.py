"""What the engine does with images that are not right, checkpoints of other layouts, formats, and missing tensors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from penstock.engine.config import EngineConfig
from penstock.engine.loop import EngineLoop
from penstock.engine.request import Array, EngineRequest, Image
from penstock.errors import InvalidRequest, ModelError
from penstock.hub.checkpoint import read_checkpoint
from penstock.models.families import describe
from penstock.models.vision import tower_entries
from tests.engine.driver import generate

from .models import IMAGE, save_vision


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vision(tmp_path_factory.mktemp("llava"), "llava")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vision(tmp_path_factory.mktemp("qwen"), "qwen2-vl")


def load(folder: Path, **options: Any) -> EngineLoop:
    return EngineLoop.load(EngineConfig(str(folder), **{"dtype": "float32", **options}))


def array(*shape: int, seed: int = 0) -> Array:
    numbers = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return Array("float32", list(shape), numbers.numpy().tobytes())


def square(seed: int = 0, side: int = 28, tokens: int = 16) -> Image:
    """An image of the tiny LLaVA."""
    return Image(tokens, bytes([seed, side]) * 16, {"pixel_values": array(1, 3, side, side, seed=seed)})


def patches(grid: tuple[int, int, int], tokens: int, count: int | None = None) -> Image:
    """An image of the tiny Qwen2-VL."""
    count = math.prod(grid) if count is None else count
    places = Array("int64", [1, 3], torch.tensor(grid).numpy().tobytes())
    pixels = array(count, 3 * 2 * 7 * 7)
    return Image(tokens, b"q" * 32, {"pixel_values": pixels, "image_grid_thw": places})


def request(number: int, *images: Image, rows: int | None = None, new: int = 8, **options: Any) -> EngineRequest:
    rows = sum(image.tokens for image in images) if rows is None else rows
    ids = [0, 40, *[IMAGE] * rows, 50, 51]
    return EngineRequest(id=number, prompt_ids=ids, max_new_tokens=new, ignore_eos=True, images=list(images), **options)


def changed(image: Image, **fields: Any) -> Image:
    return msgspec.structs.replace(image, **fields)


BAD: dict[str, tuple[list[Image], int | None, str]] = {
    "too few places": ([square()], 15, "has 15 places for rows of images, and its images have 16 rows"),
    "too many places": ([square()], 17, "has 17 places"),
    "no rows": ([changed(square(), tokens=0)], None, "not as an image processor makes it"),
    "a short digest": ([changed(square(), digest=b"x")], None, "not as an image processor makes it"),
    "strange arrays": ([changed(square(), arrays={"labels": array(1)})], None, "not as an image processor makes it"),
    "a short array": (
        [changed(square(), arrays={"pixel_values": Array("float32", [1, 3, 28, 28], b"1234")})],
        None,
        "do not fill their shape",
    ),
    "a shape below zero": (
        [changed(square(), arrays={"pixel_values": Array("float32", [-1, -1], b"1234")})],
        None,
        "impossible shape",
    ),
    "no copies": (
        [changed(square(), arrays={"pixel_values": Array("float32", [0], b"", 0)})],
        None,
        "impossible shape",
    ),
    "half a stretch": (
        [changed(square(), arrays={"pixel_values": Array("float32", [6], b"\0" * 12, 2, 2)})],
        None,
        "impossible shape",
    ),
    "too many": ([square()] * 257, None, "at most 256 images"),
}


@pytest.mark.parametrize("name", BAD)
def test_images_that_cannot_be_are_refused_before_they_run(name: str, llava: Path) -> None:
    images, rows, words = BAD[name]
    engine = load(llava, max_total_tokens=1024)
    with pytest.raises(InvalidRequest, match=words):
        engine.add(request(1, *images, rows=rows))
    assert not engine.has_work


@pytest.mark.parametrize(
    "image",
    [
        patches((1, 4, 8), 4),
        patches((0, 4, 4), 4, count=16),
        changed(patches((1, 4, 4), 4), arrays={"pixel_values": array(16, 294)}),
        changed(patches((1, 4, 4), 4), arrays={"image_grid_thw": Array("int64", [3], b"\0" * 24)}),
        patches((1, 2**40, 2**40), 4, count=16),
    ],
)
def test_grids_that_are_not_the_rows_are_refused(image: Image, qwen: Path) -> None:
    engine = load(qwen)
    assert len(generate(engine, [request(1, patches((1, 4, 4), 4))])[1].ids) == 8
    with pytest.raises(InvalidRequest, match="not as the model's image processor makes it"):
        engine.add(request(1, image))


@pytest.mark.parametrize(
    "image",
    [square(side=21), square(side=28, tokens=9), changed(square(seed=9), arrays={"pixel_values": array(3)})],
    ids=["of another size", "of other rows", "of another shape"],
)
def test_a_tower_that_fails_fails_one_request(image: Image, llava: Path) -> None:
    engine = load(llava)
    alone = generate(engine, [request(1, square())])[1].ids
    results = generate(engine, [request(1, square()), request(2, image), request(3)])
    assert results[2].finish == "error"
    assert results[2].error == "the model's vision tower cannot take this image"
    assert results[1].ids == alone
    assert len(results[3].ids) == 8
    assert engine.stats.used_blocks == 0


def test_pixels_that_are_not_numbers_end_their_request_and_leave_no_trace(llava: Path) -> None:
    engine = load(llava)
    nan = changed(square(), digest=b"n" * 32, arrays={"pixel_values": Array("float32", [1, 3, 28, 28], b"\xff" * 9408)})
    alone = generate(engine, [request(1, square())])[1].ids
    results = generate(engine, [request(1, square()), request(2, nan)])
    assert "not numbers" in (results[2].error or "")
    assert results[1].ids == alone
    assert generate(engine, [request(1, square())])[1].ids == alone


def test_the_tower_sees_an_image_once(llava: Path) -> None:
    """For several live sequences of one key; not for another's."""
    engine = load(llava, prefix_caching=False)
    seen: list[Any] = []
    tower = engine._eyes._tower  # type: ignore[union-attr]
    engine._eyes._tower = lambda arrays: seen.append(arrays) or tower(arrays)  # type: ignore
    generate(engine, [request(n, square()) for n in range(3)])
    assert len(seen) == 1
    generate(engine, [request(n, square(), salt=bytes([n])) for n in range(2)])
    assert len(seen) == 3


OLD = {
    "llava": {"vision_tower.": "vision_tower.vision_model."},
    "idefics3": {},
    "qwen2-vl": {"model.language_model.": "model.", "model.visual.": "visual."},
    "paligemma": {"vision_tower.": "vision_tower.vision_model."},
}
NEW = {"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head."}


@pytest.mark.parametrize("name", OLD)
def test_checkpoints_of_every_layout_load(name: str, tmp_path: Path) -> None:
    """Names as transformers 4 and 5 write them."""
    folder = save_vision(tmp_path, name)
    image = patches((1, 4, 4), 4) if "qwen" in name else square()
    if name == "idefics3":
        image = Image(4, b"i" * 32, {"pixel_values": array(1, 1, 3, 28, 28)})
    expected = generate(load(folder), [request(1, image)])[1].ids
    tensors = load_file(folder / "model.safetensors")
    layouts = [OLD[name], {**NEW, **{old: f"model.{old}" for old in ("vision_tower.", "multi_modal_projector.")}}]
    for layout in layouts:
        renamed = {}
        for key, tensor in tensors.items():
            prefix = next((old for old in layout if key.startswith(old)), "")
            renamed[layout.get(prefix, "") + key.removeprefix(prefix)] = tensor
        save_file(renamed, folder / "model.safetensors", {"format": "pt"})
        assert generate(load(folder), [request(1, image)])[1].ids == expected, layout


def test_a_flat_config_of_qwen2_vl_reads_like_a_nested_one(qwen: Path, tmp_path: Path) -> None:
    raw = json.loads((qwen / "config.json").read_text())
    text = raw.pop("text_config")
    rope = text.pop("rope_parameters")
    flat = {**text, **raw, "rope_theta": rope["rope_theta"]}
    flat["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    (tmp_path / "config.json").write_text(json.dumps(flat))
    assert describe(tmp_path)[0] == describe(qwen)[0]
    flat["rope_scaling"]["mrope_section"] = [2, 2, 2]
    (tmp_path / "config.json").write_text(json.dumps(flat))
    with pytest.raises(ModelError, match="`mrope_section` has 6 pairs, a head 8"):
        describe(tmp_path)


def test_a_checkpoint_without_its_tower_is_refused(llava: Path, tmp_path: Path) -> None:
    tensors = load_file(llava / "model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if "patch_embedding" not in name}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((llava / "config.json").read_text())
    with pytest.raises(ModelError, match=r"lacks tensors of the model's vision tower, such as 'vision_tower\..*patch"):
        load(tmp_path)


@pytest.mark.parametrize(
    "options",
    [{"dtype": "bfloat16"}, {"dtype": "bfloat16", "quantize": "int8"}, {"dummy_weights": True}],
    ids=["bfloat16", "int8", "dummy"],
)
def test_every_format_sees(options: dict[str, Any], llava: Path) -> None:
    engine = load(llava, **options)
    first = generate(engine, [request(1, square())])[1]
    assert first.error is None
    assert len(first.ids) == 8


def test_the_plan_counts_the_tower(llava: Path) -> None:
    stages: list[Any] = []
    EngineLoop.load(EngineConfig(str(llava), dtype="float32"), stages.append)
    assert any("takes images" in stage.text for stage in stages)
    entries = read_checkpoint(llava)
    tower = tower_entries(entries, describe(llava)[1])
    assert {name.split(".")[0] for name in tower} == {"vision_tower", "multi_modal_projector"}
    assert len(tower) + sum("language_model" in name for name in entries) == len(entries)
