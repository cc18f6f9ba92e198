"""Fetching one snapshot of a hub model, into the cache or a folder: resumable, verified, by several processes at once.

Only data is fetched: configuration, tokenizer, templates and safetensors; Python files only where their user trusts
them, and pickles (.bin) only for their conversion. The hub's library says what a commit holds and who may have it; the
bytes are moved here, because the library forgets what an interrupted transfer had.
"""

from __future__ import annotations

import contextlib
import fnmatch
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.errors import ModelError, PenstockError, ResourceError
from penstock.hub.cache import cache_folder
from penstock.hub.refusals import explain
from penstock.hub.store import COMMIT, CacheStore, FolderStore
from penstock.hub.transfer import Meter, RemoteFile, fetch, verify

ALLOW = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
CODE = ["*.py"]
PICKLES = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]
IGNORE = ["*/*", "adapter_*", "*.bin.index.json"]  # fnmatch: `*/*` is everything in subfolders
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")  # of a LoRA adapter
CONNECT_SECONDS = 6.0  # one connection attempt
ANSWER_SECONDS = 15.0  # everything until the hub has described the model, name lookup included
LINE_SECONDS = 15.0  # between lines of progress
THREADS = 4
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Downloaded:
    """A snapshot on disk. size: bytes of its files; fetched: what came over the network just now."""

    path: Path
    commit: str
    files: int
    size: int
    fetched: int
    seconds: float


def download(name: str, revision: str | None, *, pickles: bool = False, code: bool = False) -> Path:
    """Fetch hub model `name` (ORG/NAME, already checked) at `revision` (None: main) and return its snapshot folder.

    pickles: take its .bin weights, to convert them. code: take its .py files as well. An interrupted download goes on
    where it stopped when it is called again. Raises ModelError (unknown, gated, nothing usable in it), EnvironmentFault
    (no network), ResourceError (disk full).
    """
    return download_snapshot(name, revision, pickles=pickles, code=code).path


def download_snapshot(
    name: str,
    revision: str | None,
    *,
    to: Path | None = None,
    token: str | None = None,
    pickles: bool = False,
    code: bool = False,
    adapter: bool = False,
    only: str | None = None,
    show: Callable[[Meter], None] | None = None,
) -> Downloaded:
    """As `download`, with the sums. adapter: of a LoRA adapter; to: a folder for plain files instead of the cache;
    token: instead of the stored one; only: one file of the repository (a GGUF); show: called a few times a second with
    the state."""
    from huggingface_hub import HfApi, hf_hub_url  # 150 ms: only when the network is really needed
    from huggingface_hub.utils import build_hf_headers, get_session

    api = HfApi(token=token)
    since = time.monotonic()
    try:
        commit, listed = _within(ANSWER_SECONDS, lambda: _list(api, name, revision))
        sizes = {n: f.size for n, f in listed.items()}
        needed = _of_adapter(name, sizes) if adapter else _needed(name, sizes, pickles, code, only)
        files = [listed[n] for n in needed]
        total = sum(file.size for file in files)
        store = FolderStore(to) if to is not None else CacheStore(name)
        store.check()
        missing = [file for file in files if not store.file(file).exists()]
        _check_space(name, sum(file.size for file in missing) - store.partial_bytes(missing), store.root)
        meter = Meter(total)
        headers = build_hf_headers(token=token)
        client = get_session()
        with _shown(name, meter, show if missing else lambda _: None, total, store.root):
            _all(
                lambda file: _bring(client, hf_hub_url(name, file.name, revision=commit), headers, file, store, meter),
                files,
                meter,
            )
        path = store.finish(commit, revision, files)
    except PenstockError:
        raise
    except Exception as error:
        explain(name, revision, error, given_token=token is not None)
    return Downloaded(path, commit, len(files), total, meter.fetched, time.monotonic() - since)


def _list(api: Any, name: str, revision: str | None) -> tuple[str, dict[str, RemoteFile]]:
    """The commit that `revision` is now, and every file of it: whatever moves later, this download is of one commit."""
    commit = str(api.model_info(name, revision=revision, timeout=CONNECT_SECONDS).sha)
    files = {}
    for entry in api.list_repo_tree(name, revision=commit, recursive=True):
        if hasattr(entry, "blob_id"):
            sha256 = entry.lfs.sha256 if entry.lfs else None
            files[entry.path] = RemoteFile(entry.path, entry.size, sha256, entry.blob_id)
    for file in files.values():
        if not (COMMIT.fullmatch(file.oid) and (file.sha256 is None or _SHA256.fullmatch(file.sha256))):
            raise ModelError(f"The hub's list of files of {name} is not one: {file.name[:80]!r} has no hash.")
    return commit, files


def _needed(name: str, sizes: dict[str, int], pickles: bool, code: bool, only: str | None) -> list[str]:
    """The files that Penstock reads. Raises ModelError when there is nothing to load."""
    if only is not None:
        if only not in sizes or "/" in only or only.startswith("."):
            near = [file for file in sizes if file.endswith(".gguf")][:4]
            raise ModelError(f"{name} has no file {only[:80]!r}.", f"It has {', '.join(near)}." if near else "")
        return [only]
    if not pickles and _is_adapter(sizes):
        return list(ADAPTER)
    allow = [*ALLOW[:1], *ALLOW[2:], *PICKLES] if pickles else ALLOW
    allow = [*allow, *CODE] if code else allow
    ignore = ["*/*"] if pickles else _check_usable(name, sizes)
    return [
        file
        for file in sizes
        if any(fnmatch.fnmatchcase(file, p) for p in allow)
        and not any(fnmatch.fnmatchcase(file, p) for p in ignore)
        and not file.startswith(".")
    ]


def _is_adapter(sizes: dict[str, int]) -> bool:
    """Whether a repository holds a LoRA adapter and no model."""
    return "config.json" not in sizes and all(file in sizes for file in ADAPTER)


def _of_adapter(name: str, sizes: dict[str, int]) -> list[str]:
    """The files of a LoRA adapter. Raises ModelError where there is none."""
    for file in ADAPTER:
        if file not in sizes:
            raise ModelError(f"{name} is no LoRA adapter that can be loaded.", f"It has no {file}.")
    return list(ADAPTER)


def _bring(
    client: Any, url: str, headers: dict[str, str], file: RemoteFile, store: CacheStore | FolderStore, meter: Meter
) -> None:
    """One file, fetched if it is missing, verified once if somebody else has put it there."""
    target = store.file(file)
    if target.exists():
        if store.verified(file) or verify(target, file, lambda _: meter.add(0)):
            store.record(file)
            meter.add(file.size, network=False)
            return
        target.unlink()
    fetch(client, url, headers, file, target, meter)
    store.record(file)


def _all(work: Callable[[RemoteFile], None], files: list[RemoteFile], meter: Meter) -> None:
    """Every file, some at a time; the first failure stops the others."""
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="download")
    try:
        for done in [pool.submit(work, file) for file in sorted(files, key=lambda f: -f.size)]:
            done.result()
    except BaseException:  # Ctrl-C too
        meter.stop = True
        raise
    finally:
        pool.shutdown(wait=not meter.stop, cancel_futures=True)


@contextlib.contextmanager
def _shown(name: str, meter: Meter, show: Callable[[Meter], None] | None, total: int, where: Path) -> Iterator[None]:
    """Tell how far it is while the body runs: `show`, or lines on stderr."""
    if show is None:
        print(f"downloading {name} ({total / 1e9:.2f} GB) to {where}", file=sys.stderr, flush=True)
    over = threading.Event()

    def tell() -> None:
        while not over.wait(0.2 if show else LINE_SECONDS):
            if show:
                show(meter)
            else:
                print(f"downloading {name}: {progress_line(meter)}", file=sys.stderr, flush=True)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        if show:
            show(meter)


def progress_line(meter: Meter) -> str:
    """`45 %, 3.15 of 7.00 GB, 85 MB/s, 45 s left`."""
    share = meter.done / meter.total if meter.total else 1.0
    left = (meter.total - meter.done) / meter.rate if meter.rate > 0 else 0.0
    unit, size = ("GB", 1e9) if meter.total >= 1e9 else ("MB", 1e6)
    text = f"{share:.0%}, {meter.done / size:.1f} of {meter.total / size:.1f} {unit}, {meter.rate / 1e6:.0f} MB/s"
    if meter.waiting:
        return f"{text}, another process fetches {meter.waiting}"
    return f"{text}, {left:.0f} s left" if left and meter.fetched else text


def download_config(name: str, revision: str | None) -> Path:
    """Fetch config.json alone into the cache and return its folder. Raises as `download` does."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()

    def fetch_it() -> str:
        return str(
            hf_hub_download(
                name, "config.json", revision=revision, cache_dir=cache_folder(), etag_timeout=CONNECT_SECONDS
            )
        )

    try:
        return Path(_within(ANSWER_SECONDS, fetch_it)).parent
    except Exception as error:
        explain(name, revision, error)


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """Run `call` with a deadline of its own: name lookup has no timeout, and a dead resolver blocks for a minute."""
    result: list[Any] = []
    failure: list[Exception] = []

    def work() -> None:
        try:
            result.append(call())
        except Exception as error:
            failure.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if failure:
        raise failure[0]
    if not result:
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    return result[0]


def _check_usable(name: str, files: dict[str, int]) -> list[str]:
    """Refuse repositories with nothing to load, before a byte is fetched. Returns the patterns to leave out."""
    top = [file for file in files if "/" not in file]
    weights = [file for file in top if file.endswith(".safetensors") and not file.startswith("adapter_")]
    if weights and "config.json" in top:
        several = any(not file.startswith("consolidated") for file in weights)
        return [*IGNORE, "consolidated*"] if several else IGNORE
    what = f"{name} has nothing that Penstock can load."
    hint = "Look for a repository, or a revision (NAME@REVISION), with safetensors."
    if any(file.endswith(".gguf") for file in files):
        file = next(file for file in files if file.endswith(".gguf"))
        why = "It holds GGUF files; one of them is enough."
        hint = f"Fetch one, for example with `penstock download {name} --file {file} --to .`, and give the file."
    elif "adapter_config.json" in top:
        why = f"It is a LoRA adapter without {ADAPTER[1]}."
    elif any(file.endswith((".bin", ".pt", ".pth")) for file in files):
        why = "It holds only .bin or .pt weights: pickles, which can run code when read, so they are never loaded."
        if any(file.startswith("pytorch_model") for file in top):
            hint = f"Convert them once, in a sandbox: penstock convert {name}"
    else:
        why = "It lacks config.json or *.safetensors weights; is it a language model?"
    raise ModelError(what, why, hint)


def _check_space(name: str, need: int, folder: Path) -> None:
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    free = shutil.disk_usage(there).free
    if need > free:
        raise ResourceError(
            f"Too little disk for {name}: it needs {need / 1e9:.1f} GB, {folder} has {free / 1e9:.1f} GB.",
            "",
            "Free some space, set HF_HOME to a folder with more, or give one with --to.",
        )
