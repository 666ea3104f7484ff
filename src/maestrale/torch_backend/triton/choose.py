"""Which kernels a device is run with; imports no triton."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

from maestrale.errors import UsageError

VARIABLE = "MAESTRALE_KERNELS"
KERNELS = ("torch", "triton")


def choose_kernels(device: torch.device) -> str:
    """ "torch", or what the environment's MAESTRALE_KERNELS says, where it can be done. Triton's are not taken unasked
    before they have once been checked on a GPU (`python bench/gpu.py --only checks`)."""
    asked = os.environ.get(VARIABLE, "torch")
    if asked not in KERNELS:
        raise UsageError(f"{VARIABLE}={asked[:40]!r}: expected {' or '.join(KERNELS)}")
    if asked == "triton":
        if find_spec("triton") is None:
            raise UsageError(f"{VARIABLE}=triton: triton is not installed: run  pip install triton")
        if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise UsageError(f"{VARIABLE}=triton on the CPU: only by its interpreter, slowly: set TRITON_INTERPRET=1")
    return asked
