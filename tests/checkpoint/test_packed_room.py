"""Damaged packed folders: each is refused in one line before any weight is read."""

import json
from contextlib import suppress

import numpy as np
import pytest
from safetensors.numpy import save_file

from maestrale.checkpoint.dtypes import STORAGE
from maestrale.checkpoint.packed import part_layout
from maestrale.checkpoint.quantize import Recipe, quantize
from maestrale.checkpoint.reader import check_finite, open_checkpoint
from maestrale.checkpoint.rounding import round_to_nearest
from maestrale.config import ModelConfig
from maestrale.errors import CheckpointError
from maestrale.plan import tensor_plan

WQ = "layers.0.attention.wq.weight"


@pytest.fixture
def packed_folder(tmp_path, params):
    """A packed folder by the safetensors library. `formats`: name → description; `change` may edit the arrays."""

    def make(formats=None, change=lambda arrays: None, metadata=None):
        folder, plan = tmp_path / "packed", tensor_plan(ModelConfig.from_mistral(params))
        formats = {WQ: {"format": "int4", "group": 32, "affine": False}} if formats is None else formats
        arrays = {name: np.zeros(tensor.shape, np.float32) for name, tensor in plan.items() if name not in formats}
        for name, value in formats.items():
            shape = plan[name].shape if name in plan else (16, 32)
            layout = part_layout(value["format"], shape, value.get("group", 0), value.get("affine", False))
            arrays |= {f"{name}.{part}": np.zeros(size, STORAGE[dtype]) for part, (dtype, size) in layout.items()}
        change(arrays)
        folder.mkdir(exist_ok=True)
        (folder / "params.json").write_text(json.dumps(params))
        described = {"maestrale.packed": json.dumps({"version": 1, "weights": formats})}
        save_file(arrays, folder / "packed.safetensors", described if metadata is None else metadata)
        return folder

    return make


@pytest.mark.parametrize("format", [{"format": "int8"}, {"format": "int4", "group": 32, "affine": True}])
def test_what_the_description_says_is_read(packed_folder, format):
    with open_checkpoint(packed_folder({WQ: format})) as checkpoint:
        weight = checkpoint.packed(WQ)
        assert (weight.format, weight.shape) == (format["format"], (32, 32))
        assert (weight.offsets is not None) == format.get("affine", False)
        assert checkpoint.packed("layers.1.attention.wq.weight") is None


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({}, ["no maestrale.packed"]),
        ({"maestrale.packed": "{"}, ["not JSON"]),
        ({"maestrale.packed": '{"version": 2, "weights": {}}'}, ["version '2'", "reads version 1"]),
        ({"maestrale.packed": '{"version": true, "weights": {}}'}, ["version 'True'"]),
        ({"maestrale.packed": '{"version": 1}'}, ["expected weights"]),
        ({"maestrale.packed": '{"version": 1, "weights": {"a": 3}}'}, ["expected weights"]),
        ({"maestrale.packed": '{"version": 1, "weights": {"a": {}, "a": {}}}'}, ["duplicate key 'a'"]),
        ({"maestrale.packed": '{"version": 1, "weights": {"a": {}}}'}, ["no place for", "'a'"]),
        ({"maestrale.packed": "[" * 1000}, ["nested"]),
    ],
)
def test_a_wrong_description_is_refused(packed_folder, refused, metadata, words):
    with refused(CheckpointError, 3, "packed.safetensors", "metadata", *words):
        open_checkpoint(packed_folder(metadata=metadata))


def test_a_description_that_is_no_unicode_is_refused(packed_folder, refused):
    file = packed_folder(metadata={"maestrale.packed": "??????"}) / "packed.safetensors"
    file.write_bytes(file.read_bytes().replace(b"??????", rb"\ud800", 1))  # half of a surrogate pair
    with refused(CheckpointError, 3, "packed.safetensors", "metadata", "not UTF-8 at byte 0"):
        open_checkpoint(file.parent)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"format": "int3"}, ["format 'int3'", "int8 or int4"]),
        ({}, ["format 'None'"]),
        ({"format": "int4"}, ["group 0"]),
        ({"format": "int4", "group": 16}, ["group 16", "32, 64, 128"]),
        ({"format": "int4", "group": "32"}, ["group 32"]),
        ({"format": "int4", "group": True}, ["group True"]),
        ({"format": "int4", "group": 64}, ["groups of 64 do not divide its 32 inputs"]),
        ({"format": "int4", "group": 32, "affine": 1}, ["affine 1"]),
        ({"format": "int8", "group": 32}, ["neither for int8"]),
    ],
)
def test_a_wrong_format_is_named_with_its_weight(packed_folder, refused, value, words):
    metadata = {"maestrale.packed": json.dumps({"version": 1, "weights": {WQ: value}})}
    with refused(CheckpointError, 3, WQ, *words):
        open_checkpoint(packed_folder(metadata=metadata))


def test_norms_embeddings_and_routers_are_not_quantized(packed_folder, refused):
    metadata = {
        "maestrale.packed": json.dumps({"version": 1, "weights": {"tok_embeddings.weight": {"format": "int8"}}})
    }
    with refused(CheckpointError, 3, "tok_embeddings.weight", "no linear layer"):
        open_checkpoint(packed_folder(metadata=metadata))


def test_missing_wrong_and_unexpected_parts_are_named(packed_folder, refused):
    with refused(CheckpointError, 3, "missing", f"{WQ}.scales"):
        open_checkpoint(packed_folder(change=lambda a: a.pop(f"{WQ}.scales")))
    with refused(CheckpointError, 3, f"{WQ}.data", "expected U8 (2, 4, 16, 4)", "got I8"):
        open_checkpoint(packed_folder(change=lambda a: a.update({f"{WQ}.data": a[f"{WQ}.data"].astype(np.int8)})))
    with refused(CheckpointError, 3, f"{WQ}.data", "expected U8 (2, 4, 16, 4)", "got U8 (2, 4, 16, 5)"):
        open_checkpoint(packed_folder(change=lambda a: a.update({f"{WQ}.data": np.zeros((2, 4, 16, 5), np.uint8)})))
    with refused(CheckpointError, 3, "no place for", f"{WQ}.offsets"):
        open_checkpoint(packed_folder(change=lambda a: a.update({f"{WQ}.offsets": np.zeros(1, np.float32)})))


def test_fault_14_bad_scales_are_found(packed_folder):
    def spoil(arrays):
        arrays[f"{WQ}.scales"][0, 0, 3] = np.nan

    with open_checkpoint(packed_folder(change=spoil)) as checkpoint:
        assert check_finite(checkpoint) == [WQ]


def test_beside_a_native_file_the_packed_one_is_taken_with_a_warning(tmp_path, native_folder):
    source = native_folder()
    quantize(source, tmp_path / "packed", Recipe("int8"), round_to_nearest)
    (tmp_path / "packed" / "packed.safetensors").rename(source / "packed.safetensors")
    with pytest.warns(UserWarning, match=r"using packed.safetensors, ignoring consolidated.safetensors"):
        assert open_checkpoint(source).layout == "packed"


def test_a_changed_byte_of_the_header_is_refused_or_harmless(packed_folder):
    """Nothing but our own errors, whichever byte it is."""
    path, rng = packed_folder() / "packed.safetensors", np.random.default_rng(0)
    original = path.read_bytes()
    for place, byte in zip(rng.integers(0, 4000, 100), rng.integers(0, 256, 100), strict=True):
        data = bytearray(original)
        data[place] = byte
        path.write_bytes(data)
        with suppress(CheckpointError), open_checkpoint(path.parent) as checkpoint:
            for name in checkpoint.names():
                checkpoint.tensor(name)
