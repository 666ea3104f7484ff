"""Kernels that begin before the one before them has ended (programmatic dependent launch: CUDA C++ Programming Guide).

A step of one sequence is some two hundred kernels of a few microseconds each, so a microsecond between two of them is a
tenth of the step. A kernel launched with LAUNCH takes its place as soon as all programs of the one before have called
`begin`; it reads weights, which no kernel of a step writes, and then calls `wait`, after which everything that came
before it in the stream is done and seen. So every kernel launched with LAUNCH calls both, and before `wait` it touches
weights alone.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from maestrale.torch_backend.triton.dot import INTERPRETED

# From compute capability 9.0 on; where there is no GPU, kernels are compiled for one of these.
_HAS_IT = not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (9, 0)
AHEAD = tl.constexpr(_HAS_IT and not INTERPRETED.value)
LAUNCH: dict[str, Any] = {"launch_pdl": True} if AHEAD.value else {}


@triton.jit
def begin():
    """The next kernel may take its place."""
    if AHEAD:
        gdc_launch_dependents()


@triton.jit
def wait():
    """Until everything before this kernel is done."""
    if AHEAD:
        gdc_wait()


@triton.jit
def fetch(at):
    """Into the second-level cache the lines [128 bytes each] that these addresses are in."""
    if AHEAD:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at.to(tl.int64)], tl.int32, is_pure=False, pack=1
        )
