"""Weights as the kernels take them: what is refused, what is chosen, and the layout written fast."""

import numpy as np
import pytest
from weights import example, product, to_bf16

from maestrale.checkpoint import packed
from maestrale.checkpoint.dtypes import StoredTensor
from maestrale.errors import UsageError
from maestrale.native_backend import kernels


def test_the_environment_forces_an_instruction_set(monkeypatch):
    monkeypatch.setenv(kernels.ISA, "generic")
    assert kernels.choose_isa() == "generic"
    monkeypatch.delenv(kernels.ISA)
    assert kernels.choose_isa() == kernels.native.isas()[0]


def test_an_instruction_set_that_is_not_there_is_refused_in_one_line(monkeypatch):
    monkeypatch.setenv(kernels.ISA, "sse9")
    with pytest.raises(UsageError, match=r"^MAESTRALE_ISA: expected one of .*generic.* on this processor, got 'sse9'$"):
        kernels.choose_isa()


def test_the_set_in_use_is_named_and_where_it_is_not_amx_why_not(monkeypatch):
    monkeypatch.setenv(kernels.ISA, "generic")
    problem = kernels.native.amx_problem()
    assert kernels.describe() == ("generic" if problem is None else f"generic ({problem})")
    monkeypatch.setattr(kernels, "native", None)
    monkeypatch.setattr(kernels, "_why", "nothing there", raising=False)
    assert "not built (nothing there)" in kernels.describe()


def test_without_the_module_one_line_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(kernels, "native", None)
    monkeypatch.setattr(kernels, "_why", "No module named 'x'", raising=False)
    with pytest.raises(UsageError, match=r"not built \(No module named 'x'\); install a C\+\+20 compiler"):
        kernels.choose_isa()


def test_a_part_of_the_wrong_size_is_refused():
    good = example("int4-32", 32, 64).packed
    for name, array in good.parts.items():
        short = packed.PackedWeight(**{**vars(good), name: array[:1]})
        with pytest.raises(ValueError, match=f"{name}: expected {array.nbytes} bytes, got {array[:1].nbytes}"):
            kernels.weight(short)


def test_impossible_groups_are_refused():
    good = example("int4-32", 32, 64).packed
    for group in (0, -32, 12, 48):
        with pytest.raises(ValueError, match=f"groups of {group}"):
            kernels.weight(packed.PackedWeight(**{**vars(good), "group": group}))


def test_rows_of_another_width_are_refused(pool):
    weight = example("bf16", 32, 64).weight
    with pytest.raises(ValueError, match=r"x must be \[rows, 64\]"):
        product(pool, "generic", weight, np.zeros((2, 63), np.float32))


@pytest.mark.parametrize("shape", [(16, 64), (33, 72), (1, 8), (50, 1000)])
def test_the_fast_layout_is_that_of_the_definition(pool, shape):
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape, np.float32)
    f32 = packed.pack_float(StoredTensor.from_array(x, "F32"), "f32").data
    np.testing.assert_array_equal(kernels.pack(pool, x).view(np.float32), f32)
    bf16 = packed.pack_float(StoredTensor.from_array(to_bf16(x), "BF16"), "bf16").data
    np.testing.assert_array_equal(kernels.pack(pool, to_bf16(x)).view(np.uint16).reshape(bf16.shape), bf16)
    codes = rng.integers(-128, 128, shape).astype(np.int8)
    int8 = packed.pack_int8(codes, np.ones(shape[0], np.float32)).data
    np.testing.assert_array_equal(kernels.pack(pool, codes).view(np.int8).reshape(int8.shape), int8)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_the_fast_layout_pads_odd_rows_with_zeros(pool, k):
    x = np.random.default_rng(k).integers(-128, 128, (20, k)).astype(np.int8)
    expected = packed.pack_int8(x, np.ones(20, np.float32)).data
    np.testing.assert_array_equal(kernels.pack(pool, x).view(np.int8).reshape(expected.shape), expected)
    patterns = to_bf16(x.astype(np.float32))
    expected = packed.pack_float(StoredTensor.from_array(patterns, "BF16"), "bf16").data
    np.testing.assert_array_equal(kernels.pack(pool, patterns).view(np.uint16).reshape(expected.shape), expected)
