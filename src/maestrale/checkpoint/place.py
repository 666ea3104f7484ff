"""Where a layout keeps a canonical tensor: each layout gives a table of these, the reader checks and follows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from numpy.typing import NDArray

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


def same_place(name: str, plan: TensorPlan, select: Callable[[NDArray], NDArray] | None = None) -> Place:
    """A stored tensor of its own, of the canonical shape."""
    return Place(name, plan.shape, tuple((axis,) for axis in plan.axes), select)


def expert_of(name: str) -> tuple[str, int, str]:
    """`layers.3.feed_forward.experts.5.w1.weight` → ("layers.3.", 5, "w1")."""
    layer, rest = name.split("feed_forward.experts.")
    number, matrix, _ = rest.split(".")
    return layer, int(number), matrix
