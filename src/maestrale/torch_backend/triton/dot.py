"""The product of two tiles, right on the GPU and in Triton's interpreter alike."""

from __future__ import annotations

import triton
import triton.language as tl

# The interpreter keeps bfloat16 as bit patterns and multiplies those (triton 3.9); as fp32 the same numbers multiply,
# which is exact.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a, b):
    """a [M, K] times b [K, N], added up in fp32; fp32 operands are not rounded to tf32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision="ieee")
