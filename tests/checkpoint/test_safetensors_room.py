import os
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from maestrale.checkpoint.dtypes import STORAGE
from maestrale.checkpoint.safetensors_room import open_safetensors
from maestrale.errors import CheckpointError


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_tensors_are_views_that_equal_what_the_library_wrote(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.standard_normal((3, 5), np.float32),
        "b": rng.integers(0, 9, (2, 2, 2)),
        "c": rng.standard_normal(7).astype(np.float16),
        "d": np.zeros((0, 4), np.float32),
        "e": np.array(3.5),
    }
    path = tmp_path / "x.safetensors"
    path.write_bytes(save(arrays, {"format": "np"}))
    file = open_safetensors(path)
    assert set(file.entries) == set(arrays)
    for name, array in arrays.items():
        tensor = file.tensor(name)
        np.testing.assert_array_equal(tensor.array, array)
        assert tensor.shape == array.shape
        assert not tensor.data.flags.owndata


def test_a_view_is_writable_and_writing_reaches_no_disk(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(save({"a": np.ones(5000, np.float32)}))
    before = path.read_bytes()
    file = open_safetensors(path)
    tensor = file.tensor("a")
    tensor.array[:] = 7
    assert path.read_bytes() == before
    file.release("a")  # whole pages fall back to the file
    assert (file.tensor("a").array == 1).sum() >= 5000 - 2 * 4096 // 4


def test_an_odd_address_gives_a_copy_that_arithmetic_can_use(raw_file):
    values = np.arange(2, dtype=np.float32)
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    file = open_safetensors(raw_file(header + b" " * ((1 - len(header)) % 4), values.tobytes()))
    assert file.entries["a"].start % 4
    assert file.tensor("a").array.flags.aligned
    np.testing.assert_array_equal(file.tensor("a").array, values)


@pytest.mark.parametrize("size", [1, 7])
def test_fault_1_under_eight_bytes(tmp_path, refused, size):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"\0" * size)
    with refused(CheckpointError, 3, path, f"{size} bytes", "at least 8"):
        open_safetensors(path)


def test_fault_1_empty(tmp_path, refused):
    path = tmp_path / "x.safetensors"
    path.touch()
    with refused(CheckpointError, 3, path, "empty"):
        open_safetensors(path)


def test_fault_2_header_over_its_limit_or_over_the_file(tmp_path, refused):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with refused(CheckpointError, 3, path, "at most 100,000,000"):
        open_safetensors(path)
    path.write_bytes(struct.pack("<Q", 1000) + b"{}")
    with refused(CheckpointError, 3, path, "1,000 bytes", "only 2"):
        open_safetensors(path)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"\xff\xfe{}", "not UTF-8"),
        (b"{'a': 1}", "not JSON"),
        (b"[]", "expected a JSON object"),
        (b'{"a":' * 5000, "deep"),
        (b'{"a": 1}', "expected dtype, shape and data_offsets"),
        (b'{"__metadata__": {"a": 1}}', "__metadata__"),
    ],
)
def test_fault_3_header_that_is_no_header(raw_file, refused, header, words):
    path = raw_file(header)
    with refused(CheckpointError, 3, path, words):
        open_safetensors(path)


def test_fault_4_truncated_says_expected_and_actual_bytes(raw_file, refused):
    path = raw_file({"a": entry()}, b"\0" * 5)
    size = path.stat().st_size
    with refused(CheckpointError, 3, path, "truncated", f"{size + 3:,}", f"{size:,}"):
        open_safetensors(path)


def test_fault_5_trailing_bytes(raw_file, refused):
    with refused(CheckpointError, 3, "3 trailing bytes"):
        open_safetensors(raw_file({"a": entry()}, b"\0" * 11))


def test_fault_6_overlap_and_hole_name_both_tensors(raw_file, refused):
    with refused(CheckpointError, 3, "'b' overlaps 'a'"):
        open_safetensors(raw_file({"a": entry(), "b": entry(offsets=(4, 12))}, b"\0" * 12))
    with refused(CheckpointError, 3, "'b' leaves a hole after 'a'"):
        open_safetensors(raw_file({"a": entry(), "b": entry(offsets=(12, 20))}, b"\0" * 20))
    with refused(CheckpointError, 3, "'a' leaves a hole after the header"):
        open_safetensors(raw_file({"a": entry(offsets=(8, 16))}, b"\0" * 16))


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((-1,), "negative"),
        ((-2, -1), "negative"),
        ((1 << 62, 1 << 62), "overflows"),
        ((1 << 63, 0), "overflows"),
        ((1,) * 100, "overflows"),
        ((2.0,), "whole numbers"),
        ((True,), "whole numbers"),
    ],
)
def test_fault_7_impossible_shape(raw_file, refused, shape, words):
    with refused(CheckpointError, 3, "'a'", words):
        open_safetensors(raw_file({"a": entry(shape=shape)}, b"\0" * 8))


@pytest.mark.parametrize("offsets", [(8, 0), (-8, 0), (0, 4), (0, 1 << 70), (0,), (0.0, 8.0)])
def test_offsets_that_do_not_hold_the_shape(raw_file, refused, offsets):
    with refused(CheckpointError, 3, "'a'", "data_offsets"):
        open_safetensors(raw_file({"a": entry(offsets=offsets)}, b"\0" * 8))


@pytest.mark.parametrize("dtype", ["Q4", "f32", "", 7, None])
def test_fault_8_unknown_dtype_is_named(raw_file, refused, dtype):
    with refused(CheckpointError, 3, "'a'", f"unknown dtype {str(dtype)!r}"):
        open_safetensors(raw_file({"a": entry(dtype)}, b"\0" * 8))


def test_fault_9_duplicate_key(raw_file, refused):
    one = b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
    with refused(CheckpointError, 3, "duplicate key 'a'"):
        open_safetensors(raw_file(b"{" + one + b"," + one + b"}", b"\0" * 8))


def test_a_name_with_a_newline_keeps_the_message_on_one_line(raw_file, refused):
    with refused(CheckpointError, 3, r"a\nb"):
        open_safetensors(raw_file({"a\nb": entry("X")}, b"\0" * 8))


def test_fault_28_absent_folder_pipe(tmp_path, refused):
    with refused(CheckpointError, 3, "x.safetensors", "No such file"):
        open_safetensors(tmp_path / "x.safetensors")
    with refused(CheckpointError, 3, tmp_path, "is a folder"):
        open_safetensors(tmp_path)
    os.mkfifo(tmp_path / "pipe.safetensors")
    with refused(CheckpointError, 3, "not a regular file"):
        open_safetensors(tmp_path / "pipe.safetensors")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_fault_28_no_permission(raw_file, refused):
    path = raw_file({"a": entry()}, b"\0" * 8)
    path.chmod(0)
    with refused(CheckpointError, 3, path, "Permission denied"):
        open_safetensors(path)


def test_fault_29_a_file_that_changes_or_goes_is_not_read_on(raw_file, refused):
    path = raw_file({"a": entry()}, b"\0" * 8)
    file = open_safetensors(path)
    file.tensor("a")
    with open(path, "r+b") as other:
        other.truncate(10)
    with refused(CheckpointError, 3, path, "changed while it was read"):
        file.tensor("a")
    path.unlink()
    with refused(CheckpointError, 3, path, "changed while it was read"):
        file.mapped.verify_unchanged()


GOOD = save({"a": np.zeros((2, 3), np.float32), "b": np.ones(4, np.int64)}, {"format": "pt"})
EDIT = st.tuples(st.integers(0, len(GOOD) - 1), st.binary(max_size=4), st.integers(0, 4))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(EDIT, min_size=1, max_size=4))
def test_a_mutated_file_opens_or_is_refused_and_nothing_else(tmp_path, edits):
    data = GOOD
    for place, piece, removed in edits:
        data = data[:place] + piece + data[place + removed :]
    if len(data) >= 8 and data[1:8] != GOOD[1:8]:
        data = GOOD[:8] + data[8:]  # keep the header reachable
    check_opens_or_refused(tmp_path / "x.safetensors", data)


NUMBERS = st.integers(-2, 12) | st.integers() | st.floats() | st.none() | st.booleans()
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*STORAGE, "F4", "", 3]),
        "shape": st.lists(NUMBERS, max_size=3) | NUMBERS,
        "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2) | NUMBERS,
    }
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.text(max_size=3), ENTRY | NUMBERS, max_size=3), st.binary(max_size=24))
def test_a_made_up_header_opens_or_is_refused_and_nothing_else(raw_file, header, data):
    check_opens_or_refused(raw := raw_file(header, data), raw.read_bytes())


def check_opens_or_refused(path, data):
    path.write_bytes(data)
    try:
        file = open_safetensors(path)
    except CheckpointError as error:
        refusal = str(error)
    else:
        refusal = str(path)
        for name, entry in file.entries.items():
            assert file.tensor(name).array.shape == entry.shape
    assert refusal.startswith(str(path))
    assert "\n" not in refusal
