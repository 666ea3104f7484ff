"""Linear layers against float64 products of what the weights stand for and of the rows as they are quantized."""

import numpy as np
import pytest
from weights import FORMATS, example, product, rows_seen

from maestrale.native_backend import kernels

# n not a multiple of 16, k odd where the format can have it, more blocks than a tile
SHAPES = [(16, 128), (72, 256), (7, 128), (129, 640)]
ODD_SHAPES = [(33, 1), (50, 7), (16, 129), (1, 334)]
CASES = [(name, shape) for name in FORMATS for shape in SHAPES] + [
    (name, shape) for name in ("f32", "bf16", "int8") for shape in ODD_SHAPES
]
SHARE = 2e-6  # of the sum of the sizes of what is added: fp32 sums of some hundred numbers


def normal(count: int, k: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, k), np.float32)


def assert_is_product(got, rows, values):
    expected, size = rows @ values.T, np.abs(rows) @ np.abs(values).T
    assert np.all(np.abs(got - expected) <= SHARE * size + 1e-30)


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_products_are_those_of_the_formula(isa, pool, name, shape):
    one = example(name, *shape)
    for count in (1, 2, 3, 5, 8, 17, 70):
        x = normal(count, shape[1], seed=count)
        assert_is_product(product(pool, isa, one.weight, x), rows_seen(name, x), one.values)


@pytest.mark.parametrize("name", [name for name in FORMATS if name.startswith("int")])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_codes_do_not_overflow(isa, pool, name, sign):
    one = example(name, 48, 4096, extreme=True)
    x = sign * np.sign(normal(5, 4096)).astype(np.float32)  # q = 127 or -127 everywhere
    assert_is_product(product(pool, isa, one.weight, x), rows_seen(name, x), one.values)
    same = np.full((5, 4096), sign, np.float32)
    assert_is_product(product(pool, isa, one.weight, same), rows_seen(name, same), one.values)


@pytest.mark.parametrize("name", FORMATS)
def test_the_bits_of_a_row_do_not_depend_on_the_others(isa, pool, name):
    one, x = example(name, 210, 384), normal(70, 384)
    whole = product(pool, isa, one.weight, x)
    for first, last in [(0, 1), (3, 5), (69, 70), (0, 4), (5, 11), (1, 9), (10, 33), (2, 70)]:
        part = product(pool, isa, one.weight, x[first:last])
        np.testing.assert_array_equal(part, whole[first:last])


@pytest.mark.parametrize("name", FORMATS)
def test_the_bits_do_not_depend_on_blocks_and_threads(isa, pool, name):
    one, x = example(name, 210, 384), normal(9, 384)
    for count in (1, 9):
        whole = product(pool, isa, one.weight, x[:count])
        for threads in (1, 3):
            other = kernels.native.Pool(threads)
            np.testing.assert_array_equal(product(other, isa, one.weight, x[:count]), whole)
        for first, last in [(0, 1), (1, 4), (2, 9), (5, 14), (13, 14)]:
            y = np.full_like(whole, 7)
            kernels.native.linear(pool, isa, one.weight, x[:count], y, blocks=(first, last))
            np.testing.assert_array_equal(y[:, first * 16 : last * 16], whole[:, first * 16 : last * 16])
            outside = np.delete(y, slice(first * 16, last * 16), axis=1)
            assert np.all(outside == 7)  # nothing else is written


@pytest.mark.parametrize("name", FORMATS)
def test_results_are_added_where_that_is_asked_for(isa, pool, name):
    one, x, y = example(name, 72, 256), normal(5, 256), normal(5, 72, seed=1)
    expected = y + product(pool, isa, one.weight, x)
    kernels.native.linear(pool, isa, one.weight, x, y, add=True)
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("name", FORMATS)
def test_swiglu_joins_the_two_products(isa, pool, name):
    w1, w3, x = example(name, 210, 256), example(name, 210, 256, seed=1), normal(30, 256)
    a, b = (product(pool, isa, w.weight, x).astype(np.float64) for w in (w1, w3))
    whole = np.empty((30, 210), np.float32)
    kernels.native.swiglu(pool, isa, w1.weight, w3.weight, x, whole)
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(whole, a / (1 + np.exp(-a)) * b, rtol=1e-6, atol=1e-30)
    one = np.empty((1, 210), np.float32)
    kernels.native.swiglu(pool, isa, w1.weight, w3.weight, x[7:8], one)
    np.testing.assert_array_equal(one, whole[7:8])


@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_zeros_and_of_tiny_numbers_give_numbers(isa, pool, name):
    one = example(name, 16, 128)
    x = np.stack([np.zeros(128), np.full(128, 1e-38), np.full(128, -1e30)]).astype(np.float32)
    got = product(pool, isa, one.weight, x)
    assert np.all(np.isfinite(got))
    assert np.all(got[0] == 0)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_shows_it_and_leaves_the_others_alone(isa, pool, name, bad):
    one, x = example(name, 40, 128), normal(3, 128)
    good = product(pool, isa, one.weight, x)
    x[1, 77] = bad
    got = product(pool, isa, one.weight, x)
    assert not np.any(np.isfinite(got[1]))
    np.testing.assert_array_equal(got[[0, 2]], good[[0, 2]])


def test_instruction_sets_agree_on_integer_products(pool):
    """int8 sums are exact, and their two roundings are everyone's: all sets give the same bits."""
    one, x = example("int8", 72, 256), normal(9, 256)
    results = [product(pool, isa, one.weight, x) for isa in kernels.native.isas()]
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])
