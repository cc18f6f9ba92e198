"""What the scripts share: where the server is, the questions, and a runner that tells every failure."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

URL = os.environ["PENSTOCK_URL"]
KEY = os.environ["PENSTOCK_API_KEY"]
TOKENIZER = os.environ["PENSTOCK_TOKENIZER"]  # the folder of the demo model, for clients that count tokens
MODEL = "demo"
QUESTION = "How do I list my jobs on Slurm?"
ANSWER = "`squeue --me` lists only your own jobs."
TALK = [{"role": "user", "content": QUESTION}]
SIGHTING = "I saw a puppy, a cat and a raccoon during my bike ride in the park"
RECORD = {"location": "park", "activity": "bike ride", "animals_seen": 3, "animals": ["puppy", "cat", "raccoon"]}
SCHEMA = {
    "type": "object",
    "properties": {
        "location": {"type": "string"},
        "activity": {"type": "string"},
        "animals_seen": {"type": "integer", "minimum": 1, "maximum": 5},
        "animals": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["location", "activity", "animals_seen", "animals"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather at a place",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Rome", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def command(*arguments: str, stdin: str = "", **environment: str) -> str:
    """Run a command of this script's venv and return what it prints; its errors are in the exception."""
    program, *rest = arguments
    done = subprocess.run(
        [str(Path(sys.executable).parent / program), *rest],
        input=stdin, capture_output=True, text=True, timeout=240, check=False, env={**os.environ, **environment},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{program} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return done.stdout


def refused(kind: type[Exception] | tuple[type[Exception], ...], call: Callable[[], object]) -> Exception:
    """The error that a call must end with."""
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind}")


def run(names: dict[str, object]) -> None:
    """Run every `check_...` of a script, all of them even when one fails; exit with 1 then.

    names: the script's globals. The words on the command line, if any, choose by part of the name.
    """
    failed = 0
    for name, check in names.items():
        if not name.startswith("check_") or not isinstance(check, Callable):
            continue
        if sys.argv[1:] and not any(word in name for word in sys.argv[1:]):
            continue
        began = time.monotonic()
        try:
            check()
        except Exception:
            failed += 1
            print(f"FAILED {name}\n{traceback.format_exc(limit=-3)}", flush=True)
        else:
            print(f"ok {name} {time.monotonic() - began:.2f} s", flush=True)
    sys.exit(bool(failed))
