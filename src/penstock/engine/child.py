"""What every process of ours does first, and what it is not told."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import resource
import signal
import sys

_PR_SET_PDEATHSIG = 1
_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_API_TOKEN", "PENSTOCK_API_KEY", "API_KEY")


def environment() -> dict[str, str]:
    """The environment for a child: ours without keys and tokens."""
    return {name: value for name, value in os.environ.items() if name not in _SECRETS}


def settle_in() -> None:
    """Die with the parent, leave Ctrl-C to it, dump stacks on SIGUSR2, leave no core file with prompts in it."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
