"""Where there is no card, kernels run on Triton's interpreter, which has to be asked for before Triton is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        import triton  # noqa: F401
    except ImportError:
        pass
    else:
        from tests.kernels import interpreter

        interpreter.repair()
