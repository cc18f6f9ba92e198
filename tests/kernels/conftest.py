"""Where there is no card, kernels run on Triton's interpreter (tests/conftest.py asks for it), put right here."""

import torch

if not torch.cuda.is_available():
    try:
        import triton  # noqa: F401
    except ImportError:
        pass
    else:
        from tests.kernels import interpreter

        interpreter.repair()
