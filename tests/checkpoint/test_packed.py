"""The packed layout, element by element, against the words of native_backend/csrc/linear.h."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maestrale.checkpoint.dtypes import STORAGE, StoredTensor, cast
from maestrale.checkpoint.packed import (
    PackedWeight,
    concatenate,
    dequantize,
    pack_float,
    pack_int4,
    pack_int8,
    part_layout,
    unpack,
)

rows, columns = st.integers(1, 40), st.integers(1, 21)


def drawn(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def int4_parts(n, k, group, seed=0):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (n, k)).astype(np.uint8)
    scales = rng.uniform(0.01, 1, (n, k // group)).astype(np.float16)
    return codes, scales, rng.standard_normal((n, k // group), np.float32)


def as_announced(weight: PackedWeight) -> bool:
    layout = part_layout(weight.format, weight.shape, weight.group, weight.offsets is not None)
    found = {name: (array.dtype, array.shape) for name, array in weight.parts.items()}
    return found == {name: (STORAGE[dtype], shape) for name, (dtype, shape) in layout.items()} and all(
        array.flags.c_contiguous for array in weight.parts.values()
    )


@given(rows, columns)
@settings(max_examples=30, deadline=None)
def test_f32_has_a_block_of_16_outputs_for_each_input(n, k):
    values = drawn((n, k))
    weight = pack_float(StoredTensor.from_array(values, "F32"), "f32")
    assert as_announced(weight)
    flat = weight.data.reshape(-1)
    for o in range(n):
        for i in range(k):
            assert flat[(o // 16 * k + i) * 16 + o % 16] == values[o, i]
    assert np.count_nonzero(flat) == np.count_nonzero(values)
    np.testing.assert_array_equal(dequantize(weight), values)


@given(rows, columns)
@settings(max_examples=30, deadline=None)
def test_bf16_keeps_pairs_of_inputs_together(n, k):
    tensor = cast(StoredTensor.from_array(drawn((n, k)), "F32"), "BF16")
    weight = pack_float(tensor, "bf16")
    assert as_announced(weight)
    flat, pairs = weight.data.reshape(-1), -(-k // 2)
    for o in range(n):
        for i in range(k):
            assert flat[((o // 16 * pairs + i // 2) * 16 + o % 16) * 2 + i % 2] == tensor.array[o, i]
    np.testing.assert_array_equal(dequantize(weight), cast(tensor, "F32").array)


@given(rows, columns)
@settings(max_examples=30, deadline=None)
def test_int8_keeps_fours_of_inputs_together_with_a_scale_and_a_sum_a_row(n, k):
    rng = np.random.default_rng(n * 100 + k)
    codes, scales = rng.integers(-128, 128, (n, k)).astype(np.int8), rng.uniform(0.1, 1, n).astype(np.float32)
    weight = pack_int8(codes, scales)
    assert as_announced(weight)
    flat, fours = weight.data.reshape(-1), -(-k // 4)
    for o in range(n):
        assert weight.sums[o] == sum(int(q) for q in codes[o])
        for i in range(k):
            assert flat[((o // 16 * fours + i // 4) * 16 + o % 16) * 4 + i % 4] == codes[o, i]
            assert dequantize(weight)[o, i] == np.float32(codes[o, i]) * scales[o]
    assert not weight.scales[n:].any()
    assert not weight.sums[n:].any()


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(("n", "k", "group"), [(1, 32, 32), (17, 64, 32), (16, 128, 64), (33, 256, 128), (5, 8, 8)])
def test_int4_keeps_eights_of_inputs_in_four_bytes(n, k, group, affine):
    codes, scales, offsets = int4_parts(n, k, group)
    weight = pack_int4(codes, scales, offsets if affine else None)
    assert as_announced(weight)
    assert weight.group == group
    flat, scale_flat, values = weight.data.reshape(-1), weight.scales.reshape(-1), dequantize(weight)
    for o in range(n):
        for i in range(k):
            byte = flat[((o // 16 * (k // 8) + i // 8) * 16 + o % 16) * 4 + i % 4]
            assert (byte >> 4 if i % 8 >= 4 else byte & 15) == codes[o, i]
            scale = scale_flat[(o // 16 * (k // group) + i // group) * 16 + o % 16]
            assert scale == scales[o, i // group]
            wide, q = np.float32(scale), np.float32(codes[o, i])
            assert values[o, i] == (q * wide + offsets[o, i // group] if affine else (q - 8) * wide)


@given(rows, st.sampled_from(["f32", "bf16", "int8", "int4", "affine"]))
@settings(max_examples=40, deadline=None)
def test_unpacking_gives_back_what_was_packed(n, format):
    codes, scales, offsets = int4_parts(n, 64, 32, seed=n)
    if format in ("f32", "bf16"):
        dtype = {"f32": "F32", "bf16": "BF16"}[format]
        tensor = cast(StoredTensor.from_array(drawn((n, 13)), "F32"), dtype)
        np.testing.assert_array_equal(unpack(pack_float(tensor, format))[0], tensor.array)
    elif format == "int8":
        found = unpack(pack_int8(codes.view(np.int8), offsets[:, 0]))
        np.testing.assert_array_equal(found[0], codes.view(np.int8))
        np.testing.assert_array_equal(found[1], offsets[:, 0])
    else:
        found = unpack(pack_int4(codes, scales, offsets if format == "affine" else None))
        np.testing.assert_array_equal(found[0], codes)
        np.testing.assert_array_equal(found[1], scales)
        assert (found[2] is None) == (format == "int4")
        if format == "affine":
            np.testing.assert_array_equal(found[2], offsets)


def test_pieces_of_16_rows_are_packed_apart_as_together():
    codes, scales, offsets = int4_parts(2055, 64, 32)
    whole = pack_int4(codes, scales, offsets)
    cuts = [slice(0, 32), slice(32, 1040), slice(1040, 2055)]
    joined = concatenate([pack_int4(codes[cut], scales[cut], offsets[cut]) for cut in cuts])
    assert joined.shape == whole.shape
    for name, array in whole.parts.items():
        np.testing.assert_array_equal(joined.parts[name], array)
    expected = codes.reshape(2055, 2, 32) * scales.astype(np.float32)[..., None] + offsets[..., None]
    np.testing.assert_array_equal(dequantize(whole), expected.reshape(2055, 64))


def test_a_group_that_does_not_divide_the_inputs_is_refused():
    with pytest.raises(ValueError, match="multiple of 8"):
        pack_int4(np.zeros((16, 60), np.uint8), np.zeros((16, 2), np.float16))
