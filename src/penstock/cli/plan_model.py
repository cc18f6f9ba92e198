"""What `penstock plan` needs to know of a model, found without loading or fetching any weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.plan.shape import Shape
from penstock.plan.shapes import shape_of
from penstock.plan.weights import PACKINGS, stored_format, weight_bytes


@dataclass(frozen=True)
class Described:
    """A model by its config.json. known: its short name in the data files, ""; stored: the checkpoint's format;
    disk_bytes: what its weights take on this machine's disk, None when they are not here; folder: where, or None."""

    name: str
    known: str
    shape: Shape
    stored: str
    disk_bytes: int | None
    folder: Path | None
    origin: str

    def stored_bytes(self) -> int:
        """Bytes of the checkpoint: counted from the config, whatever lies on the disk."""
        return weight_bytes(self.shape, self.stored)

    def count_error(self) -> float | None:
        """By how much the counted bytes are off those on the disk, as a share; None without weights here."""
        return self.stored_bytes() / self.disk_bytes - 1 if self.disk_bytes else None


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
        return _of_config(known[1].hub, known[1].config, known[0], None, None, "shipped numbers")
    from penstock.hub.snapshot import fetch_config

    return _of_folder(hub_name, fetch_config(listed.model if listed else name, revision, offline=offline or None))


def _of_folder(name: str, folder: Path) -> Described:
    from penstock.hub.config import read_config
    from penstock.plan.known import find_known

    known = find_known(name)
    disk = sum(file.stat().st_size for file in folder.glob("*.safetensors")) or None
    return _of_config(
        name, read_config(folder), known[0] if known else "", disk, folder if disk else None, "config.json"
    )


def _of_gguf(name: str, file: Path) -> Described:
    """A GGUF file's header; its own mixture of types is the format nearest in size."""
    from penstock.hub.gguf.config import config_of
    from penstock.hub.gguf.file import read_gguf

    model = read_gguf(file)
    shape = shape_of(config_of(model))
    disk = sum(tensor.end - tensor.start for tensor in model.tensors.values())
    forms = [form for form in PACKINGS if form.startswith("q") or form in ("float16", "bfloat16", "float32")]
    stored = min(forms, key=lambda form: abs(weight_bytes(shape, form) - disk))
    return Described(name, "", shape, stored, disk, file.parent, "GGUF header")


def _of_config(
    name: str, config: dict[str, Any], known: str, disk: int | None, folder: Path | None, origin: str
) -> Described:
    return Described(name, known, shape_of(config), stored_format(config), disk, folder, origin)
