"""Fewer bits a weight: the codes and scales of one linear layer, by rounding to nearest on scales that are sought.

int8: one scale a row, max|w| / 127. int4, symmetric: one scale a group of inputs. Of the eight steps below zero and
the seven above, a group's widest value gets the side of eight, so a scale may be negative. `_STEPS` lists how many
steps away from zero that value is put at first; for the codes that follow, the scale that fits best is
Σ w c / Σ c² (least squares). The candidate with the smallest squared error wins; the codes are those nearest on it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from maestrale.checkpoint.dtypes import StoredTensor, cast
from maestrale.checkpoint.packed import BLOCK, GROUPS, MIDDLE, PackedWeight, concatenate, pack_int4, pack_int8
from maestrale.errors import CheckpointError
from maestrale.threads import choose_threads

_STEPS = (8.0, 7.5, 7.0, 8.5, 6.5)
_CHUNK = 1 << 18  # weights searched at once: the temporaries stay in a core's cache


def fitting_group(k: int, group: int) -> int | None:
    """The largest group, at most `group`, that divides k inputs; None where none does (such a layer becomes int8)."""
    return next((size for size in reversed(GROUPS) if size <= group and k % size == 0), None)


def round_to_nearest(
    name: str, tensor: StoredTensor, format: str, group: int = 32, threads: int | None = None
) -> PackedWeight:
    """A stored weight [n, k] as int8 or int4; k is a multiple of `group` for int4. Memory: the result, and a few MB.

    name: of the weight, for errors. threads: at once; None: as `choose_threads` says.

    CheckpointError where values are NaN, Inf or too large for a scale in float16 (int4).
    """
    n, k = tensor.shape
    rows = max(1, _CHUNK // k // BLOCK) * BLOCK

    def pack(start: int) -> PackedWeight:
        part = StoredTensor.from_array(tensor.array[start : start + rows], tensor.dtype)
        values = cast(part, "F32").array
        if format == "int8":
            return pack_int8(*int8_codes(values))
        return pack_int4(*int4_codes(values, group))

    from concurrent.futures import ThreadPoolExecutor  # slow to import, and a folder that is only run needs none

    try:
        with ThreadPoolExecutor(threads or choose_threads()) as pool:
            return concatenate(list(pool.map(pack, range(0, n, rows))))
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from None


def int8_codes(values: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """values [n, k] → codes [n, k] from -127 to 127, scales [n]."""
    scales = np.abs(values).max(axis=1) / np.float32(127)
    codes = nearest(values, _checked(scales)[:, None], -127, 127)
    return codes.astype(np.int8), scales


def int4_codes(values: NDArray[np.float32], group: int) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """values [n, k] → codes [n, k] from 0 to 15, scales [n, k / group]: w ≈ (code - 8) * scale."""
    grouped = values.reshape(len(values), -1, group)
    scales = int4_scales(grouped)
    codes = nearest(grouped, scales.astype(np.float32)[..., None], -MIDDLE, MIDDLE - 1) + MIDDLE
    return codes.astype(np.uint8).reshape(values.shape), scales


def int4_scales(values: NDArray[np.float32], weights: NDArray[np.float32] | None = None) -> NDArray[np.float16]:
    """values [..., group] → the scale of each group. weights: how much an input's squared error counts, [..., group]
    or what broadcasts to it; all alike where None."""
    widest = _checked(np.take_along_axis(values, np.abs(values).argmax(axis=-1)[..., None], -1))
    weighted = values if weights is None else values * weights
    best = np.zeros(values.shape[:-1], np.float32)
    least = np.full(best.shape, np.inf, np.float32)
    for steps in _STEPS:
        codes = nearest(values, -widest / np.float32(steps), -MIDDLE, MIDDLE - 1)
        product = np.einsum("...i,...i->...", weighted, codes)
        square = np.einsum("...i,...i->...", codes, codes if weights is None else codes * weights)
        scale = np.divide(product, square, out=np.zeros_like(product), where=square > 0)
        with np.errstate(over="ignore"):
            scale = _checked(scale.astype(np.float16).astype(np.float32))
        error = scale * (scale * square - 2 * product)  # less the group's own Σ w², which is the same for all
        better = error < least
        best[better], least[better] = scale[better], error[better]
    return best.astype(np.float16)


def nearest(values: NDArray[np.float32], scales: NDArray[np.float32], low: int, high: int) -> NDArray[np.float32]:
    """The whole numbers from low to high that come nearest to values / scales; 0 where a scale is 0."""
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales != 0)
    codes = values * inverse
    return np.clip(np.rint(codes, out=codes), low, high, out=codes)


def _checked(values: NDArray[np.float32]) -> NDArray[np.float32]:
    if not np.isfinite(values).all():
        raise CheckpointError("NaN, Inf, or values whose scale is beyond float16")
    return values
