"""Linear layers against float64 products of what the weights stand for and of the rows as they are quantized."""

import numpy as np
import pytest
from weights import FORMATS, example, rows_seen

from maestrale.native_backend import kernels

TOLERANCE = {"f32": 2e-6, "bf16": 2e-6}  # fp32 sums of a few hundred numbers, as a share of the sum of their sizes
SHAPES = [(16, 128), (72, 256), (100, 384), (7, 128), (129, 640)]


def product(example, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the float64 product, the sum of the sizes that it adds)."""
    return rows @ example.values.T, np.abs(rows) @ np.abs(example.values).T


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("exact", [False, True])
def test_products_are_those_of_the_formula(isa, pool, name, shape, exact):
    one = example(name, *shape)
    for count in (1, 2, 3, 5, 17):
        x = np.random.default_rng(count).standard_normal((count, shape[1]), np.float32)
        expected, size = product(one, rows_seen(name, x, exact))
        got = kernels.linear(pool, isa, one.weight, x, exact)
        assert np.all(np.abs(got - expected) <= TOLERANCE.get(name, 2e-6) * size)
