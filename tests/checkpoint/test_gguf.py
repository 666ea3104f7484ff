"""GGUF files against the format's own package (gguf), and damaged ones."""

import struct
import time
from contextlib import suppress
from pathlib import Path

import gguf as library
import numpy as np
import pytest

from maestrale.checkpoint.convert import convert
from maestrale.checkpoint.gguf_blocks import BLOCKS, read_blocks, write_blocks
from maestrale.checkpoint.gguf_room import open_gguf
from maestrale.checkpoint.packed import PackedWeight, dequantize, unpack
from maestrale.checkpoint.quantize import Recipe, quantize
from maestrale.checkpoint.reader import open_checkpoint
from maestrale.checkpoint.rounding import round_to_nearest
from maestrale.errors import CheckpointError, ConfigError, MaestraleError

Q = library.GGMLQuantizationType
NAMES = {  # written out once more, from the tables of llama.cpp
    "tok_embeddings": "token_embd", "norm": "output_norm", "output": "output",
    "attention_norm": "attn_norm", "attention.wq": "attn_q", "attention.wk": "attn_k", "attention.wv": "attn_v",
    "attention.wo": "attn_output", "ffn_norm": "ffn_norm", "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down", "feed_forward.w3": "ffn_up", "feed_forward.gate": "ffn_gate_inp",
}  # fmt: skip
KEYS = {
    "embedding_length": "dim", "block_count": "n_layers", "feed_forward_length": "hidden_dim",
    "attention.head_count": "n_heads", "attention.head_count_kv": "n_kv_heads", "attention.key_length": "head_dim",
    "rope.dimension_count": "head_dim",
}  # fmt: skip
SIZES = {"dim": 256, "hidden_dim": 512, "n_layers": 1, "head_dim": 64}  # K blocks hold 256 inputs


def stored_name(name):
    words = name.removesuffix(".weight").split(".")
    if words[0] != "layers":
        return f"{NAMES[words[0]]}.weight"
    return f"blk.{words[1]}.{NAMES['.'.join(words[2:])]}.weight"


def write_with_library(path, params, arrays, **changes):
    """arrays: stored name → float32 array, or (raw blocks, type)."""
    writer = library.GGUFWriter(path, "llama")
    for key, ours in KEYS.items():
        writer.add_uint32(f"llama.{key}", params[ours])
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", params["norm_eps"])
    writer.add_float32("llama.rope.freq_base", params["rope_theta"])
    if "moe" in params:
        writer.add_uint32("llama.expert_count", params["moe"]["num_experts"])
        writer.add_uint32("llama.expert_used_count", params["moe"]["num_experts_per_tok"])
    for key, value in changes.items():
        {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}[
            type(value)
        ](key, value)
    for name, array in arrays.items():
        if isinstance(array, tuple):
            writer.add_tensor(name, array[0], raw_dtype=array[1])
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_blocks(kind, shape, seed=0):
    """Blocks of any bytes whose scales are finite, [n, bytes of a row]."""
    rng = np.random.default_rng(seed)
    n, count, width = shape[0], shape[1] // BLOCKS[kind][0], BLOCKS[kind][1]
    blocks = rng.integers(0, 256, (n, count, width)).astype(np.uint8)
    halves = rng.uniform(-1, 1, (n, count, 2)).astype("<f2").view(np.uint8)
    if kind == "Q6_K":
        blocks[..., -2:] = halves[..., :2]
    else:
        blocks[..., : 4 if kind in ("Q4_1", "Q4_K", "Q5_K") else 2] = halves[
            ..., : 4 if kind in ("Q4_1", "Q4_K", "Q5_K") else 2
        ]
    return blocks.reshape(n, -1)


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_of_any_bytes_give_the_librarys_values_to_the_last_bit(kind):
    raw = random_blocks(kind, (33, 512))
    found = read_blocks(kind, raw.reshape(33, -1, BLOCKS[kind][1]))
    values = dequantize(found) if isinstance(found, PackedWeight) else found
    np.testing.assert_array_equal(values, library.quants.dequantize(raw, getattr(Q, kind)))
    assert isinstance(found, PackedWeight) == (kind in ("Q4_0", "Q4_1"))


def test_q8_0_is_written_byte_for_byte_as_the_library_does():
    values = np.random.default_rng(0).standard_normal((20, 256)).astype(np.float32)
    values[3, :32] = 0
    np.testing.assert_array_equal(write_blocks("Q8_0", values).reshape(20, -1), library.quants.quantize(values, Q.Q8_0))


def test_q4_0_is_written_on_better_scales_than_the_librarys():
    values = np.random.default_rng(1).standard_normal((50, 256)).astype(np.float32)
    found = library.quants.dequantize(write_blocks("Q4_0", values).reshape(50, -1), Q.Q4_0)
    theirs = library.quants.dequantize(library.quants.quantize(values, Q.Q4_0), Q.Q4_0)
    assert np.square(found - values).sum() < 0.97 * np.square(theirs - values).sum()


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", *BLOCKS])
def test_a_file_that_the_library_wrote_gives_its_values_by_canonical_name(tmp_path, params, weights, kind):
    values, stored, expected = params | SIZES, {}, {}
    for name, array in weights(values).items():
        spelled = stored_name(name)
        if array.ndim == 1 or kind == "F32":
            stored[spelled], expected[name] = array, array
        elif kind == "F16":
            stored[spelled], expected[name] = array.astype(np.float16), array.astype(np.float16)
        else:
            raw = library.quants.quantize(array, Q.BF16) if kind == "BF16" else random_blocks(kind, array.shape)
            stored[spelled], expected[name] = (raw, getattr(Q, kind)), library.quants.dequantize(raw, getattr(Q, kind))
    path = write_with_library(tmp_path / "x.gguf", values, stored)
    for source in (path, tmp_path):
        with open_checkpoint(source) as checkpoint:
            assert (checkpoint.layout, checkpoint.config.dim, checkpoint.config.norm_eps) == ("gguf", 256, 1e-5)
            assert checkpoint.config.rope_theta == params["rope_theta"]
            for name in checkpoint.names():
                tensor = checkpoint.tensor(name)
                array = tensor.array
                if tensor.dtype == "BF16":
                    array = (array.astype(np.uint32) << 16).view(np.float32)
                np.testing.assert_array_equal(array, expected[name])
                packs = kind in ("Q4_0", "Q4_1") and array.ndim == 2 and "embeddings" not in name
                assert checkpoint.is_packed(name) == packs
                if packs:
                    weight = checkpoint.packed(name)
                    assert (weight.format, weight.group, weight.offsets is None) == ("int4", 32, kind == "Q4_0")
                    np.testing.assert_array_equal(dequantize(weight), expected[name])
            assert checkpoint.storage("layers.0.attention.wq.weight")[0] == kind


@pytest.mark.parametrize("form", ["stacked", "single", "Q4_0"])
def test_experts_are_found_stacked_or_one_by_one(tmp_path, moe_params, weights, form):
    arrays, stored = weights(moe_params), {}
    expected = dict(arrays)
    for name, array in arrays.items():
        if ".experts." not in name:
            stored[stored_name(name)] = array
    for matrix, spelled in (("w1", "ffn_gate"), ("w2", "ffn_down"), ("w3", "ffn_up")):
        for layer in range(2):
            names = [f"layers.{layer}.feed_forward.experts.{e}.{matrix}.weight" for e in range(4)]
            if form == "single":
                stored |= {f"blk.{layer}.{spelled}.{e}.weight": arrays[name] for e, name in enumerate(names)}
                continue
            stack = np.stack([arrays[name] for name in names])
            stored[f"blk.{layer}.{spelled}_exps.weight"] = stack
            if form == "Q4_0" and stack.shape[-1] % 32 == 0:
                raw = library.quants.quantize(stack, Q.Q4_0)
                stored[f"blk.{layer}.{spelled}_exps.weight"] = (raw, Q.Q4_0)
                expected |= dict(zip(names, library.quants.dequantize(raw, Q.Q4_0), strict=True))
    with open_checkpoint(write_with_library(tmp_path / "x.gguf", moe_params, stored)) as checkpoint:
        assert checkpoint.config.moe.num_experts_per_tok == 2
        for name in checkpoint.names():
            np.testing.assert_array_equal(checkpoint.tensor(name).array, expected[name])


@pytest.fixture
def plain_file(tmp_path, params, weights):
    """A file of float32 tensors by the library, with changed header values."""

    def make(change=lambda stored: None, **changes) -> Path:
        stored = {stored_name(name): array for name, array in weights(params).items()}
        change(stored)
        return write_with_library(tmp_path / "x.gguf", params, stored, **changes)

    return make


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, ["rope.scaling", "not supported"]),
        ({"llama.attention.value_length": 16}, ["attention.value_length = 16", "8"]),
        ({"llama.attention.sliding_window": [1, 2]}, ["sliding_window differs between layers"]),
        ({"llama.vocab_size": 0}, ["vocab_size = 0"]),
    ],
)
def test_a_model_that_cannot_run_here_is_refused_by_key(plain_file, refused, changes, words):
    with refused(ConfigError, 3, "x.gguf", *words):
        open_checkpoint(plain_file(**changes))


def test_a_part_of_several_is_refused_with_the_remedy(plain_file, refused):
    with refused(CheckpointError, 3, "one of 3 parts", "llama-gguf-split --merge"):
        open_checkpoint(plain_file(**{"split.count": 3}))


def test_missing_wrong_and_unexpected_tensors_are_named(plain_file, refused):
    with refused(CheckpointError, 3, "missing", "blk.1.attn_k.weight"):
        open_checkpoint(plain_file(lambda stored: stored.pop("blk.1.attn_k.weight")))
    with refused(CheckpointError, 3, "blk.0.attn_k.weight", "expected (16, 32), got (8, 32)", "n_kv_heads = 2"):
        open_checkpoint(plain_file(lambda s: s.update({"blk.0.attn_k.weight": np.zeros((8, 32), np.float32)})))
    with refused(CheckpointError, 3, "no place for", "rope_freqs.weight"):
        open_checkpoint(plain_file(lambda stored: stored.update({"rope_freqs.weight": np.ones(4, np.float32)})))


def test_without_an_output_tensor_embeddings_are_tied(plain_file):
    with open_checkpoint(plain_file(lambda stored: stored.pop("output.weight"))) as checkpoint:
        assert checkpoint.config.tied_embeddings


def test_several_files_in_a_folder_must_be_chosen_from(plain_file, tmp_path, refused):
    path = plain_file()
    (tmp_path / "y.gguf").write_bytes(path.read_bytes())
    with refused(CheckpointError, 3, "x.gguf, y.gguf", "name the one"):
        open_checkpoint(tmp_path)
    with open_checkpoint(tmp_path / "y.gguf") as checkpoint:
        assert checkpoint.layout == "gguf"


def header(*parts) -> bytes:
    return b"".join(part if isinstance(part, bytes) else struct.pack("<Q", part) for part in parts)


START = b"GGUF" + struct.pack("<I", 3)
KEY = header(3, b"key")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"GG", ["the magic takes 4 bytes"]),
        (b"GGML" + bytes(40), ["begins with b'GGML'"]),
        (b"GGUF" + struct.pack("<I", 1) + bytes(40), ["version 1", "expected 2 or 3"]),
        (b"GGUF" + struct.pack(">I", 3) + bytes(40), ["version 50331648"]),
        (START, ["number of tensors", "only 0 more"]),
        (header(START, 1 << 60, 0) + bytes(25), ["number of tensors is 1,152,921,504,606,846,976"]),
        (header(START, 0, 1 << 60) + bytes(25), ["number of header values"]),
        (header(START, 0, 1, 1 << 62) + bytes(5), ["length of a header key"]),
        (header(START, 0, 1, KEY, struct.pack("<I", 8), 1 << 40) + bytes(5), ["length of header value 'key'"]),
        (header(START, 0, 1, KEY, struct.pack("<II", 9, 8), 1 << 40) + bytes(5), ["length of header value 'key'"]),
        (header(START, 0, 1, KEY, struct.pack("<II", 9, 10), 1 << 61) + bytes(5), ["length of header value 'key'"]),
        (header(START, 0, 1, KEY, struct.pack("<II", 9, 9), 1) + bytes(5), ["array of the type 9"]),
        (header(START, 0, 1, KEY, struct.pack("<I", 13)) + bytes(5), ["unknown type 13"]),
        (header(START, 0, 1, 3, b"\xff\xff\xff", struct.pack("<I", 4)) + bytes(5), ["not UTF-8"]),
        (header(START, 0, 2, *(KEY, struct.pack("<II", 4, 1)) * 2), ["'key' stands twice"]),
    ],
)  # fmt: skip
def test_faults_23_24_a_damaged_header_is_refused_at_once(tmp_path, refused, content, words):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    start = time.process_time()
    with refused(CheckpointError, 3, path, *words):
        open_gguf(path)
    assert time.process_time() - start < 1


@pytest.mark.parametrize("alignment", [0, 4, 33, 1 << 21])
def test_fault_23_an_impossible_alignment(tmp_path, refused, alignment):
    path = tmp_path / "x.gguf"
    key = b"general.alignment"
    path.write_bytes(header(START, 0, 1, len(key), key, struct.pack("<II", 4, alignment)))
    with refused(CheckpointError, 3, f"general.alignment = {alignment}", "multiple of 8"):
        open_gguf(path)


def tensor(dims, kind=0, offset=0, name=b"a") -> bytes:
    return header(len(name), name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ([tensor([1] * 5)], ["5 dimensions"]),
        ([tensor([])], ["0 dimensions"]),
        ([tensor([1 << 32, 1 << 32])], ["impossible shape"]),
        ([tensor([0])], ["impossible shape"]),
        ([tensor([8], kind=3000)], ["type 3000", "Q4_0"]),
        ([tensor([33], kind=2)], ["rows of 33", "blocks of 32"]),
        ([tensor([1 << 30])], ["truncated", "the file has"]),
        ([tensor([8], offset=8)], ["no multiple of 32"]),
        ([tensor([8], offset=1 << 63)], ["truncated"]),
        ([tensor([16]), tensor([8], offset=32, name=b"b")], ["'b' overlaps 'a'"]),
        ([tensor([8]), tensor([8], offset=32)], ["'a' stands twice"]),
    ],
)
def test_fault_25_damaged_tensors_are_named(tmp_path, refused, tensors, words):
    path = tmp_path / "x.gguf"
    path.write_bytes(header(START, len(tensors), 0, *tensors) + bytes(200))
    with refused(CheckpointError, 3, path, *words):
        open_gguf(path)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_changed_byte_is_refused_or_harmless(plain_file):
    path, rng = plain_file(), np.random.default_rng(0)
    original = path.read_bytes()
    for place, byte in zip(rng.integers(0, 3000, 200), rng.integers(0, 256, 200), strict=True):
        data = bytearray(original)
        data[place] = byte
        path.write_bytes(data)
        with suppress(MaestraleError), open_checkpoint(path) as checkpoint:
            for name in checkpoint.names():
                checkpoint.tensor(name)


def test_a_gguf_file_is_converted_and_quantized_like_a_folder(tmp_path, plain_file, params, weights):
    path, arrays = plain_file(), weights(params)
    convert(path, tmp_path / "native")
    quantize(path, tmp_path / "packed", Recipe("int8"), round_to_nearest)
    with open_checkpoint(tmp_path / "native") as native, open_checkpoint(tmp_path / "packed") as packed:
        for name, array in arrays.items():
            np.testing.assert_array_equal(native.tensor(name).array, array)
        weight = packed.packed("output.weight")
        expected = round_to_nearest("w", native.tensor("output.weight"), "int8")
        np.testing.assert_array_equal(unpack(weight)[0], unpack(expected)[0])
