"""A key that was given on the command line or in the environment: the process replaces itself by one without it."""

from __future__ import annotations

import os
import sys
from typing import Any

import click
from click.core import ParameterSource

from penstock.errors import EnvironmentFault, UsageError

_VARIABLES = ("API_KEY", "PENSTOCK_API_KEY")
_FLAG = "--api-key"


def hide_key(options: dict[str, Any]) -> None:
    """Start this command again with the key in an anonymous file instead; does not return when there is a key.

    The arguments of a process can be read by every user of the machine, its environment by every process of this user
    that starts later. Raises UsageError, EnvironmentFault.
    """
    key = options.pop("api_key")
    if not key:
        return
    source = click.get_current_context().get_parameter_source("api_key")
    if source is ParameterSource.DEFAULT_MAP:
        raise UsageError(
            "The configuration file holds a key.",
            "Such files are shared and copied.",
            "Put the key into a file of mode 600 and set api-key-file.",
        )
    if source is ParameterSource.ENVIRONMENT and (options["no_auth"] or options["api_key_file"]):
        _say("note: the API_KEY of the environment is not used, because a flag says otherwise")
        for name in _VARIABLES:
            os.environ.pop(name, None)
        return
    if options["no_auth"] or options["api_key_file"]:
        raise UsageError("--api-key contradicts --no-auth and --api-key-file.", "", "Give one of them.")
    if not hasattr(os, "memfd_create"):
        raise EnvironmentFault("--api-key is not safe on this system.", hint="Give --api-key-file FILE (mode 600).")
    if source is ParameterSource.COMMANDLINE:
        _say(
            "WARNING: a key on the command line can be read by every user of this machine, with ps, until the server "
            "has started itself again without it, and your shell remembers it. --api-key-file FILE is safe."
        )
    from penstock.server.key import pass_on

    file = f"/proc/{os.getpid()}/fd/{pass_on(key)}"
    environment = {name: value for name, value in os.environ.items() if name not in _VARIABLES}
    arguments = [*_without_key(sys.orig_argv), "--api-key-file", file]
    os.execve(sys.executable, arguments, environment)  # noqa: S606 (our own interpreter, no shell)


def _without_key(arguments: list[str]) -> list[str]:
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if not skip and argument != _FLAG and not argument.startswith(f"{_FLAG}="):
            kept.append(argument)
        skip = argument == _FLAG and not skip
    return kept


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
