"""Rounding by the kernels beside rounding in numpy, the definition."""

import numpy as np
import pytest

from maestrale.checkpoint import rounding as reference
from maestrale.checkpoint.dtypes import StoredTensor, cast
from maestrale.checkpoint.packed import dequantize, unpack
from maestrale.errors import CheckpointError
from maestrale.native_backend import kernels
from maestrale.native_backend.rounding import round_to_nearest


def stored(values, dtype="F32") -> StoredTensor:
    return cast(StoredTensor.from_array(np.asarray(values, np.float32), "F32"), dtype)


@pytest.fixture(autouse=True)
def forced(isa, monkeypatch):
    monkeypatch.setenv(kernels.ISA, isa)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("shape", [(1, 1), (16, 128), (37, 50), (40, 333)])
def test_int8_is_the_definition_to_the_last_bit(shape, dtype):
    tensor = stored(np.random.default_rng(0).standard_normal(shape), dtype)
    ours, theirs = round_to_nearest("w", tensor, "int8"), reference.round_to_nearest("w", tensor, "int8")
    assert (ours.format, ours.shape, ours.group) == (theirs.format, theirs.shape, theirs.group)
    assert ours.parts.keys() == theirs.parts.keys()
    for name, part in theirs.parts.items():
        np.testing.assert_array_equal(ours.parts[name], part)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_int4_is_the_definition_but_where_two_scales_are_as_good(group, dtype):
    rng = np.random.default_rng(1)
    values = rng.standard_normal((37, 384)) * 10.0 ** rng.uniform(-7, 2, (37, 1))  # some scales lose digits in float16
    values[3], values[:, 128:160] = 0, 0
    tensor = stored(values, dtype)
    ours, theirs = (f("w", tensor, "int4", group) for f in (round_to_nearest, reference.round_to_nearest))
    assert {name: part.shape for name, part in ours.parts.items()} == {n: p.shape for n, p in theirs.parts.items()}
    exact = cast(tensor, "F32").array.astype(np.float64).reshape(37, -1, group)
    errors = [((dequantize(w).reshape(exact.shape) - exact) ** 2).sum(axis=-1) for w in (ours, theirs)]
    np.testing.assert_allclose(*errors, rtol=1e-4)
    same = unpack(ours)[1] == unpack(theirs)[1]
    assert same.mean() > 0.99
    codes = [unpack(w)[0].reshape(exact.shape)[same] for w in (ours, theirs)]
    np.testing.assert_array_equal(*codes)
    assert not ours.data[-1, :, 37 % 16 :].any()  # rows that pad the last block


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e7])
def test_values_without_a_scale_are_refused_by_name(bad):
    values = np.ones((16, 64))
    values[3, 47] = bad
    with pytest.raises(CheckpointError, match="NaN, Inf"):
        round_to_nearest("layers.0", stored(values), "int4")
    if not np.isfinite(bad):
        with pytest.raises(CheckpointError, match="NaN, Inf"):
            round_to_nearest("layers.0", stored(values), "int8")


def test_the_answer_does_not_depend_on_threads():
    tensor = stored(np.random.default_rng(5).standard_normal((600, 256)))
    one, three = (round_to_nearest("w", tensor, "int4", threads=threads) for threads in (1, 3))
    for name, array in one.parts.items():
        np.testing.assert_array_equal(array, three.parts[name])


def test_rounding_needs_no_system_that_tells_a_process_its_cores(monkeypatch):
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    monkeypatch.delenv("MAESTRALE_THREADS", raising=False)
    assert round_to_nearest("w", stored(np.ones((16, 64))), "int4").shape == (16, 64)
