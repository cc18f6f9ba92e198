"""The hub's refusals and the network's failures as messages that a user can act on."""

from __future__ import annotations

from typing import NoReturn

from penstock.errors import EnvironmentFault, ModelError
from penstock.hub.cache import cache_folder, token_source
from penstock.hub.folder import reason


def explain(name: str, revision: str | None, error: Exception, given_token: bool = False) -> NoReturn:
    """Turn an exception of the hub's library into what a user can act on; raises always. given_token: whether the token
    was given for this download rather than stored."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{name}"
    token = "--token-file" if given_token else token_source()
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
    if isinstance(error, errors.EntryNotFoundError):
        raise ModelError(
            f"{name} lacks a file that a model must have, config.json most likely.",
            "It may hold GGUF files, an adapter, or no language model.",
            f"Of GGUF files fetch one: penstock download {name} --file NAME.gguf --to .",
        ) from error
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
            f"Where there is internet (often the login node), run: penstock download {name}\n"
            "then set HF_HOME to the same folder here; or give the path of a model folder.",
        )


def _words(error: BaseException) -> str:
    """The innermost cause of a network error, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{text[:160]}." if not text.endswith(".") else text[:160]
