"""From what a user typed to the folder of a LoRA adapter."""

from __future__ import annotations

from pathlib import Path

from penstock.errors import ModelError, UsageError
from penstock.hub import cache
from penstock.hub.download import ADAPTER, download_snapshot
from penstock.hub.refusals import UnknownModel, Unreachable
from penstock.hub.snapshot import hub_name_of, is_folder


def parse_adapters(text: str) -> dict[str, str]:
    """`NAME=SOURCE,SOURCE ...`, as TGI's --lora-adapters has it, to {name: source}. An adapter without a name is called
    as its source is, without the revision. Raises UsageError."""
    found: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, given, source = item.partition("=")
        if not given:
            name, source = item.partition("@")[0] if not is_folder(Path(item)) else item, item
        if not name.strip() or not source.strip() or (source.count("@") > 1 and not is_folder(Path(source))):
            raise UsageError(
                f"Invalid LoRA adapter format: {item[:200]}",
                hint="Write NAME=FOLDER or ORG/NAME[@REVISION], and commas between them.",
            )
        if name.strip() in found:
            raise UsageError(
                f"Two adapters have the name {name.strip()[:200]!r}.", hint="Give each its own: NAME=FOLDER"
            )
        found[name.strip()] = source.strip()
    return found


def resolve_adapter(source: str, *, offline: bool | None = None) -> Path:
    """The folder of an adapter: a folder, or ORG/NAME[@REVISION] of the hub (local cache first).

    offline: never touch the network (None: as HF_HUB_OFFLINE says). Raises ModelError for one that is unknown,
    EnvironmentFault when it would have to be downloaded and cannot be reached.
    """
    folder = Path(source).expanduser() if not source.startswith("~") or "/" in source else Path(source)
    if source and is_folder(folder):
        return folder.resolve()
    try:
        name, revision = hub_name_of(source)
    except ModelError:
        raise ModelError(
            f"There is no adapter {source[:200]!r}.",
            "It is neither a folder here nor a hub name (ORG/NAME).",
            "Give the folder that holds adapter_config.json and adapter_model.safetensors.",
        ) from None
    cached = cache.find(name, revision)
    if cached is not None and all((cached.path / file).exists() for file in ADAPTER):
        return cached.path
    if cache.is_offline() if offline is None else offline:
        raise Unreachable(
            name, f"{cache.cache_folder()} does not hold it; HF_HUB_OFFLINE or --offline forbids the hub."
        )
    try:
        return download_snapshot(name, revision, adapter=True).path
    except UnknownModel as error:
        raise ModelError(f"There is no adapter {source[:200]!r}.", error.why) from error
