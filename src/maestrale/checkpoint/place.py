"""Where a layout keeps a canonical tensor: each layout gives tables of these, the reader checks and follows them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from maestrale.checkpoint.packed import PackedWeight
from maestrale.plan import TensorPlan


@dataclass(frozen=True)
class Place:
    """name, shape: of the stored tensor that the canonical one is, or is part of.

    axes: for each stored dimension, the logical axes of the plan that make its extent.
    select: stored array → canonical array; None where they are the same.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[tuple[str, ...], ...]
    select: Callable[[NDArray], NDArray] | None = None


@dataclass(frozen=True)
class Part:
    """A stored tensor that a quantized weight is made of: its name, the dtypes that it may have, its shape."""

    name: str
    dtypes: tuple[str, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class QuantizedPlace:
    """A canonical weight that is stored quantized.

    kind: what people call the format: "int4", "Q6_K". bits: of storage a weight, scales included.
    packed: the format of the packed weight that `read` gives, which says the same as what is stored; None where it must
    give fp32 values.
    read: the parts' elements, in order → the weight [n, k].
    """

    kind: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    bits: float
    packed: str | None
    read: Callable[[list[NDArray]], PackedWeight | NDArray[np.float32]]


def same_place(name: str, plan: TensorPlan, select: Callable[[NDArray], NDArray] | None = None) -> Place:
    """A stored tensor of its own, of the canonical shape."""
    return Place(name, plan.shape, tuple((axis,) for axis in plan.axes), select)


def expert_of(name: str) -> tuple[str, int, str]:
    """`layers.3.feed_forward.experts.5.w1.weight` → ("layers.3.", 5, "w1")."""
    layer, rest = name.split("feed_forward.experts.")
    number, matrix, _ = rest.split(".")
    return layer, int(number), matrix
