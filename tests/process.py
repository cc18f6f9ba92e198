"""Running Penstock's commands as users do: a process, its streams, its exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
UNSET = ("HF_HUB_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "SLURM_JOB_ID")


def environment(home: Path, **extra: str) -> dict[str, str]:
    """A clean environment whose home, configuration and hub cache lie under `home`."""
    env = {k: v for k, v in os.environ.items() if k not in UNSET and not k.startswith("PENSTOCK_")}
    env |= {
        "HOME": str(home),
        "HF_HOME": str(home / "hf"),
        "XDG_CONFIG_HOME": str(home / "config"),
        "PYTHONPATH": str(ROOT / "src"),
        "OMP_NUM_THREADS": "1",
    }
    return {**env, **extra}


def command(*args: str | Path, module: str = "penstock.cli.main") -> list[str]:
    """The argument list of a command."""
    return [sys.executable, "-m", module, *map(str, args)]


def penstock(
    *args: str | Path,
    home: Path,
    stdin: bytes = b"",
    cwd: Path | None = None,
    module: str = "penstock.cli.main",
    timeout: float = 60,
    **extra: str,
) -> subprocess.CompletedProcess[bytes]:
    """Run a command to its end."""
    return subprocess.run(
        command(*args, module=module),
        env=environment(home, **extra),
        input=stdin,
        cwd=cwd,
        capture_output=True,
        timeout=timeout,
        check=False,
    )


def check_error(done: subprocess.CompletedProcess[bytes], code: int, *words: str) -> str:
    """The error of a command: its exit code, at most six lines, no traceback, these words. Returns the text."""
    text = done.stderr.decode()
    assert done.returncode == code, text
    assert "Traceback" not in text
    start = text.find("Error: ")
    assert start >= 0, text
    message = text[start:].strip()
    assert len(message.splitlines()) <= 6, text
    for word in words:
        assert word in message, text
    return message
