"""Fetching one snapshot of a hub model into the cache, with a plain message for each way that can fail.

Only data is fetched: configuration, tokenizer, templates and safetensors; never Python files, and pickles (.bin) only
for their conversion.
"""

from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from penstock.errors import EnvironmentFault, ModelError, PenstockError, ResourceError
from penstock.hub.cache import cache_folder, token_source
from penstock.hub.folder import reason

ALLOW = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
PICKLES = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]
IGNORE = ["*/*", "adapter_*", "*.bin.index.json"]  # fnmatch: `*/*` is everything in subfolders
CONNECT_SECONDS = 6.0  # one connection attempt
ANSWER_SECONDS = 15.0  # everything until the hub has described the model, name lookup included


def download(name: str, revision: str | None, *, pickles: bool = False) -> Path:
    """Fetch hub model `name` (ORG/NAME, already checked) at `revision` (None: main) and return its snapshot folder.

    pickles: take its .bin weights, to convert them. An interrupted download goes on where it stopped when it is called
    again. Raises ModelError (unknown, gated, nothing usable in it), EnvironmentFault (no network), ResourceError (disk
    full).
    """
    from huggingface_hub import HfApi, snapshot_download  # 150 ms: only when the network is really needed
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()

    def describe() -> Any:
        return HfApi().model_info(name, revision=revision, timeout=CONNECT_SECONDS, files_metadata=True)

    try:
        info = _within(ANSWER_SECONDS, describe)
        files = {s.rfilename: s.size or 0 for s in info.siblings or []}
        allow = [*ALLOW[:1], *ALLOW[2:], *PICKLES] if pickles else ALLOW
        ignore = ["*/*"] if pickles else _check_usable(name, files)
        weights = (".bin", ".json") if pickles else (".safetensors", ".json")
        total = sum(size for file, size in files.items() if file.endswith(weights) and "/" not in file)
        _check_space(name, total)
        print(f"downloading {name} ({total / 1e9:.2f} GB) to {cache_folder()}", file=sys.stderr, flush=True)
        return Path(
            snapshot_download(
                name,
                revision=revision,
                cache_dir=cache_folder(),
                allow_patterns=allow,
                ignore_patterns=ignore,
                max_workers=4,
            )
        )
    except PenstockError:
        raise
    except Exception as error:
        explain(name, revision, error)


def download_config(name: str, revision: str | None) -> Path:
    """Fetch config.json alone into the cache and return its folder. Raises as `download` does."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()

    def fetch() -> str:
        return hf_hub_download(
            name, "config.json", revision=revision, cache_dir=cache_folder(), etag_timeout=CONNECT_SECONDS
        )

    try:
        return Path(_within(ANSWER_SECONDS, fetch)).parent
    except Exception as error:
        explain(name, revision, error)


def explain(name: str, revision: str | None, error: Exception) -> NoReturn:
    """Turn an exception of the hub's library into what a user can act on; raises always."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{name}"
    token = token_source()
    if isinstance(error, errors.GatedRepoError):
        if token is None:
            raise ModelError(
                f"{name} is gated: its publisher wants to know who downloads it, and no hub token is set.",
                f"Accept its terms at {page}",
                "then make a token at that site and store it with: hf auth login",
            ) from error
        raise ModelError(
            f"{name} is gated, and your account has no access yet.",
            f"The token from {token} was refused. Accept the terms at {page}",
            "(some publishers answer after a day); `hf auth whoami` tells whose token it is.",
        ) from error
    if isinstance(error, errors.RevisionNotFoundError):
        raise ModelError(
            f"{name} has no revision {revision!r}.",
            f"Its revisions are listed at {page}/tree/main",
            "Leave it out for main.",
        ) from error
    if isinstance(error, errors.RepositoryNotFoundError):
        raise UnknownModel(name, with_token=token is not None) from error
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403):
            raise ModelError(
                f"The hub refuses access to {name} (status {status}).",
                f"Token: {token or 'none set'}.",
                "Check the token with `hf auth whoami`, or store a new one with `hf auth login`.",
            ) from error
        raise EnvironmentFault(
            f"The hub answered status {status} for {name}.",
            "It is overloaded or out of order." if status >= 429 else "",
            "Try again in a few minutes; what is downloaded already stays.",
        ) from error
    if isinstance(error, OSError) and error.errno in (28, 122, 30, 13):  # ENOSPC, EDQUOT, EROFS, EACCES
        raise EnvironmentFault(
            f"The hub cache {cache_folder()} cannot be written: {reason(error)}.",
            "",
            "Free some space, or set HF_HOME to a folder with space and write access.",
        ) from error
    raise Unreachable(name, _words(error)) from error


class UnknownModel(ModelError):
    """The hub knows no such name (or hides it: private models look the same). The caller adds close matches."""

    def __init__(self, name: str, with_token: bool) -> None:
        seen = "and your token" if with_token else "without a token"
        super().__init__(
            f"The hub knows no model {name!r}.", f"It does not exist, or is private {seen} does not open it."
        )


class Unreachable(EnvironmentFault):
    """The model is not here, and the hub cannot be asked."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(
            f"{name} is not on this machine, and the hub cannot be reached.",
            why,
            f"Where there is internet (often the login node), run: hf download {name}\n"
            "then set HF_HOME to the same folder here; or give the path of a model folder.",
        )


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
        hint = f"Fetch one, for example with `hf download {name} {file} --local-dir .`, and give the file."
    elif "adapter_config.json" in top:
        why = "It is a LoRA adapter; give its base model."
    elif any(file.endswith((".bin", ".pt", ".pth")) for file in files):
        why = "It holds only .bin or .pt weights: pickles, which can run code when read, so they are never loaded."
        if any(file.startswith("pytorch_model") for file in top):
            hint = f"Convert them once, in a sandbox: penstock convert {name}"
    else:
        why = "It lacks config.json or *.safetensors weights; is it a language model?"
    raise ModelError(what, why, hint)


def _check_space(name: str, need: int) -> None:
    folder = cache_folder()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if need > free:
        raise ResourceError(
            f"Too little disk for {name}: it needs {need / 1e9:.1f} GB, {cache_folder()} has {free / 1e9:.1f} GB.",
            "",
            "Free some space, or set HF_HOME to a folder with more.",
        )


def _words(error: BaseException) -> str:
    """The innermost cause of a network error, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{text[:160]}." if not text.endswith(".") else text[:160]
