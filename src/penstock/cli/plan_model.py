"""What `penstock plan` needs to know of a model, found without loading or fetching any weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from penstock.plan.shape import Shape
from penstock.plan.shapes import shape_of
from penstock.plan.weights import PACKINGS, stored_format, weight_bytes


@dataclass(frozen=True)
class Described:
    """A model by its config.json. known: its short name in the data files, or ""; stored: the checkpoint's format;
    disk_bytes: what its weights take on this machine's disk, None when they are not here; origin: where it is from."""

    name: str
    known: str
    shape: Shape
    stored: str
    disk_bytes: int | None
    origin: str

    def stored_bytes(self) -> int:
        """Bytes of the checkpoint: counted from the config, whatever lies on the disk."""
        return weight_bytes(self.shape, self.stored)


def describe_model(name: str, revision: str | None, offline: bool) -> Described:
    """Find config.json: `demo`, a folder or file, the hub's cache, the shipped numbers, the hub (that file alone).

    Raises ModelError, EnvironmentFault.
    """
    from penstock.hub import cache, catalogue
    from penstock.hub.snapshot import DEMO
    from penstock.plan.known import find_known

    path = Path(name).expanduser()
    if name == DEMO:
        from penstock.demo import model_path

        return _of_folder(name, model_path())
    if path.suffix.lower() == ".gguf" and path.is_file():
        return _of_gguf(name, path)
    if path.is_dir():
        from penstock.hub.gguf.find import only_gguf

        file = only_gguf(path)
        return _of_gguf(name, file) if file else _of_folder(name, path)
    if path.name == "config.json" and path.is_file():
        return _of_folder(name, path.parent)
    listed = catalogue.find(name)
    hub_name, _, at = (listed.model if listed else name).partition("@")
    cached = cache.find(hub_name, revision or at or None) if hub_name.count("/") == 1 else None
    if cached is not None and (cached.path / "config.json").is_file():
        return _of_folder(hub_name, cached.path)
    known = find_known(hub_name)
    if known is not None:
        config = known[1].config
        return Described(known[1].hub, known[0], shape_of(config), stored_format(config), None, "shipped numbers")
    from penstock.hub.snapshot import fetch_config

    return _of_folder(hub_name, fetch_config(listed.model if listed else name, revision, offline=offline or None))


def _of_folder(name: str, folder: Path) -> Described:
    from penstock.hub.config import read_config
    from penstock.plan.known import find_known

    known = find_known(name)
    config = read_config(folder)
    shape, stored = shape_of(config), stored_format(config)
    disk = sum(file.stat().st_size for file in folder.glob("*.safetensors")) or None
    if disk and not any(config.get(key) for key in ("dtype", "torch_dtype", "quantization_config", "text_config")):
        stored = _nearest(shape, ("bfloat16", "float32"), disk)  # a config that does not say it: the files do
    return Described(name, known[0] if known else "", shape, stored, disk, "config.json")


def _of_gguf(name: str, file: Path) -> Described:
    """A GGUF file's header; its own mixture of types is the format nearest in size."""
    from penstock.hub.gguf.config import config_of
    from penstock.hub.gguf.file import read_gguf

    model = read_gguf(file)
    shape = shape_of(config_of(model))
    disk = sum(tensor.end - tensor.start for tensor in model.tensors.values())
    forms = tuple(form for form in PACKINGS if form.startswith("q") or form in ("float16", "bfloat16", "float32"))
    return Described(name, "", shape, _nearest(shape, forms, disk), disk, "GGUF header")


def _nearest(shape: Shape, forms: tuple[str, ...], disk: int) -> str:
    """The format in which this model would take about so many bytes."""
    return min(forms, key=lambda form: abs(weight_bytes(shape, form) - disk))
