"""Tile registers: the kernels that AMX runs, here on tiles in plain C++ where the processor has none."""

import numpy as np
import pytest
from weights import FORMATS, example, product

from maestrale.checkpoint.dtypes import StoredTensor
from maestrale.checkpoint.packed import pack_float
from maestrale.native_backend import kernels

native = kernels.native
TILED = [isa for isa in native.isas() if isa.startswith("amx")]
tiled = pytest.mark.skipif(not TILED, reason="needs AVX-512, which the tiles stand beside")


@tiled
@pytest.mark.parametrize("name", [name for name in FORMATS if name.startswith("int")])
@pytest.mark.parametrize("shape", [(16, 128), (129, 640), (100, 384), (40, 896)])
def test_bytes_in_tiles_give_the_bits_of_vectors(pool, name, shape):
    one, rng = example(name, *shape), np.random.default_rng(0)
    for count in (7, 8, 15, 16, 17, 31, 32, 33, 48, 95):
        x = rng.standard_normal((count, shape[1]), np.float32)
        expected = product(pool, "avx512", one.weight, x)
        for isa in TILED:
            np.testing.assert_array_equal(product(pool, isa, one.weight, x), expected)


@tiled
@pytest.mark.parametrize("k", [1, 3, 62, 65, 130, 334])
def test_rows_that_no_tile_divides_are_filled_with_zeros(pool, k):
    one, x = example("int8", 50, k), np.random.default_rng(k).standard_normal((20, k), np.float32)
    expected = product(pool, "avx512", one.weight, x)
    for isa in TILED:
        np.testing.assert_array_equal(product(pool, isa, one.weight, x), expected)


@tiled
def test_swiglu_on_tiles_has_the_bits_of_vectors(pool):
    w1, w3 = example("int8", 210, 256), example("int8", 210, 256, seed=1)
    x, found = np.random.default_rng(0).standard_normal((70, 256), np.float32), []
    for isa in ["avx512", *TILED]:
        y = np.empty((70, 210), np.float32)
        native.swiglu(pool, isa, w1.weight, w3.weight, x, y)
        found.append(y)
    for y in found[1:]:
        np.testing.assert_array_equal(y, found[0])


def even_and_odd_sums(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """What TDPBF16PS gives for x [T, k] and w [n, k] of which every product and sum of two is a number of fp32: the
    order of its additions, 32 inputs at a time, the even apart from the odd (SDM volume 2)."""
    total = np.zeros((len(x), len(w)), np.float32)
    for i in range(0, x.shape[1], 32):
        parts = np.zeros((2, *total.shape), np.float32)
        for k in range(i, min(i + 32, x.shape[1])):
            parts[k % 2] += np.outer(x[:, k], w[:, k])
        total += parts[0] + parts[1]
    return total


@tiled
@pytest.mark.parametrize("k", [64, 70, 257])
def test_bf16_in_tiles_adds_in_the_order_of_the_manual(pool, k):
    rng = np.random.default_rng(k)  # powers of two and 0: products need no rounding, sums do
    x, w = (np.ldexp(rng.choice([-1, 0, 1], shape), rng.integers(-9, 9, shape)) for shape in ((40, k), (50, k)))
    x, w = x.astype(np.float32), w.astype(np.float32)
    weight = kernels.weight(pack_float(StoredTensor.from_array(w, "F32"), "bf16"))
    expected = even_and_odd_sums(x, w)
    assert np.any(expected != (x.astype(np.float64) @ w.T.astype(np.float64)))  # so the order matters
    for isa in TILED:
        for count in (1, 16, 40):
            np.testing.assert_array_equal(product(pool, isa, weight, x[:count]), expected[:count])


def test_amx_serves_where_its_self_test_succeeds_and_says_why_where_not():
    assert (native.amx_problem() is None) == ("amx" in native.isas())


def test_a_self_test_that_the_processor_ends_leaves_this_process_alone():
    """Without AMX the first of its instructions is an illegal one."""
    found = native.amx_self_test()
    if "amx" in native.isas():
        assert found is None
    else:
        assert "self-test was ended" in found or "alone" in found
