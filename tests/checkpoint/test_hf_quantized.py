"""Quantized Hugging Face folders, built here by their published layouts, against (code - zero) * scale."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from maestrale.checkpoint.dtypes import StoredTensor, cast
from maestrale.checkpoint.packed import dequantize
from maestrale.checkpoint.reader import open_checkpoint
from maestrale.config import ModelConfig
from maestrale.errors import CheckpointError, ConfigError
from maestrale.plan import tensor_plan

CONFIG = {
    "model_type": "mistral", "hidden_size": 128, "num_hidden_layers": 1, "head_dim": 16, "intermediate_size": 256,
    "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 64, "rms_norm_eps": 1e-5, "sliding_window": None,
    "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip
LINEAR = {
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}  # fmt: skip
PLAIN = {
    "tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head",
    "layers.0.attention_norm": "model.layers.0.input_layernorm",
    "layers.0.ffn_norm": "model.layers.0.post_attention_layernorm",
}  # fmt: skip
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}


def compressed(form, bits, symmetric=True, group=None, **more):
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group" if group else "channel"}
    weights |= ({"group_size": group} if group else {}) | more
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": ["lm_head"]}


def words(numbers):
    """[..., places] small numbers → int32 [...]: the first in the lowest bits."""
    bits = 32 // numbers.shape[-1]
    total = sum(numbers[..., i].astype(np.uint64) << np.uint64(bits * i) for i in range(numbers.shape[-1]))
    return np.ascontiguousarray(total.astype(np.uint32)).view(np.int32)


def gptq(codes, zeros, scales, v2=False, order=None):
    """codes [n, k]; zeros, scales [n, groups]; order: the group of each input."""
    n, k = codes.shape
    stored = zeros if v2 else (zeros.astype(int) - 1) & 15
    return {
        "qweight": words(codes.T.reshape(k // 8, 8, n).swapaxes(1, 2)),
        "qzeros": words(stored.T.reshape(-1, n // 8, 8)),
        "scales": np.ascontiguousarray(scales.T),
        "g_idx": (np.arange(k) * scales.shape[1] // k if order is None else order).astype(np.int32),
    }


def awq(codes, zeros, scales):
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def packed(numbers):
        return words(numbers.T.reshape(numbers.shape[1], -1, 8)[..., order])

    return {"qweight": packed(codes), "qzeros": packed(zeros), "scales": np.ascontiguousarray(scales.T)}


def pack_quantized(codes, zeros, scales, bits=4, affine=False):
    n, k = codes.shape
    parts = {"weight_packed": words(codes.reshape(n, -1, 32 // bits)), "weight_scale": scales}
    if affine:
        parts["weight_zero_point"] = words(zeros.reshape(n // 8, 8, -1).swapaxes(1, 2))
    return parts | {"weight_shape": np.array([n, k])}


def interleaved(values, head_dim=16):
    """Rows of q and k from halves to pairs, as docs/numerics.md has it (N4)."""
    n, k = values.shape
    return values.reshape(-1, 2, head_dim // 2, k).transpose(0, 2, 1, 3).reshape(n, k)


@pytest.fixture
def folder(tmp_path):
    """A folder whose linear layers are `make(codes, zeros, scales)`; gives its path and the values of each weight."""

    def build(quantization, make, group, *, dtype=np.float16, zero=None, order=None, top=16, config=CONFIG):
        rng = np.random.default_rng(0)
        plan = tensor_plan(ModelConfig.from_hf(config))
        arrays = {
            f"{theirs}.weight": rng.standard_normal(plan[f"{ours}.weight"].shape, np.float32)
            for ours, theirs in PLAIN.items()
        }
        expected = {}
        for ours, theirs in LINEAR.items():
            n, k = plan[f"layers.0.{ours}.weight"].shape
            size = group or k
            codes = rng.integers(0, top, (n, k)).astype(np.uint8)
            zeros = rng.integers(0, 16, (n, k // size)) if zero is None else np.full((n, k // size), zero)
            scales = rng.uniform(0.01, 0.1, (n, k // size)).astype(np.float16).astype(dtype)
            index = np.arange(k) // size if order is None else order(k, size)
            values = (codes.astype(np.float32) - zeros[:, index]) * scales.astype(np.float32)[:, index]
            values = values.astype(np.float32)
            expected[f"layers.0.{ours}.weight"] = interleaved(values) if ours[-2:] in ("wq", "wk") else values
            parts = make(codes, zeros.astype(np.uint8), scales)
            if order is not None:
                parts["g_idx"] = index.astype(np.int32)
            arrays |= {f"model.layers.0.{theirs}.{part}": array for part, array in parts.items()}
        (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
        save_file(arrays, tmp_path / "model.safetensors")
        return tmp_path, expected

    return build


CASES = {  # → quantization_config, how a layer is stored, its group, the zero (None: any), whether it is symmetric
    "gptq symmetric": (GPTQ, gptq, 32, 8),
    "gptq affine": (GPTQ | {"sym": False}, gptq, 32, None),
    "gptq v2": (GPTQ | {"checkpoint_format": "gptq_v2"}, lambda *parts: gptq(*parts, v2=True), 32, None),
    "gptq a scale a row": (GPTQ | {"group_size": -1}, gptq, 0, 8),
    "awq": (AWQ, awq, 64, None),
    "awq symmetric": (AWQ | {"zero_point": False}, awq, 64, 8),
    "pack-quantized": (compressed("pack-quantized", 4, group=32), pack_quantized, 32, 8),
    "pack-quantized affine": (
        compressed("pack-quantized", 4, False, 128), lambda *parts: pack_quantized(*parts, affine=True), 128, None,
    ),
    "pack-quantized a scale a row": (compressed("pack-quantized", 4), pack_quantized, 0, 8),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_int4_weights_are_taken_over_without_rounding(folder, case):
    quantization, make, group, zero = CASES[case]
    path, expected = folder(quantization, make, group, zero=zero)
    with open_checkpoint(path) as checkpoint:
        assert (checkpoint.layout, checkpoint.dtype) == ("hf", "BF16")
        for name, values in expected.items():
            weight = checkpoint.packed(name)
            assert checkpoint.is_packed(name)
            assert (weight.format, weight.offsets is None) == ("int4", zero == 8)
            assert weight.group == (group or 128)
            np.testing.assert_array_equal(dequantize(weight), values)
            np.testing.assert_array_equal(checkpoint.tensor(name).array, values)
            assert checkpoint.storage(name)[0].startswith("int4 (")
            assert 4 < checkpoint.storage(name)[1] < 5.3
        assert checkpoint.packed("output.weight") is None


@pytest.mark.parametrize("form", ["int-quantized", "pack-quantized"])
def test_int8_weights_are_taken_over_without_rounding(folder, form):
    def make(codes, zeros, scales):
        if form == "int-quantized":
            return {"weight": (codes.astype(int) - 128).astype(np.int8), "weight_scale": scales}
        return pack_quantized(codes, zeros, scales, bits=8)

    path, expected = folder(compressed(form, 8), make, 0, zero=128, top=256, dtype=np.float32)
    with open_checkpoint(path) as checkpoint:
        for name, values in expected.items():
            assert checkpoint.packed(name).format == "int8"
            np.testing.assert_array_equal(dequantize(checkpoint.packed(name)), values)


def test_reordered_inputs_keep_their_groups_scales_as_plain_values(folder):
    def order(k, group):
        return np.random.default_rng(5).permutation(np.arange(k) // group)

    path, expected = folder(GPTQ | {"desc_act": True}, gptq, 32, order=order)
    with open_checkpoint(path) as checkpoint:
        for name, values in expected.items():
            assert not checkpoint.is_packed(name)
            np.testing.assert_array_equal(checkpoint.tensor(name).array, values)


def test_groups_that_packing_does_not_have_become_plain_values(folder):
    path, expected = folder(GPTQ | {"group_size": 16}, gptq, 16)
    with open_checkpoint(path) as checkpoint:
        for name, values in expected.items():
            assert checkpoint.packed(name) is None
            np.testing.assert_array_equal(checkpoint.tensor(name).array, values)


@pytest.mark.parametrize(("scale", "fits"), [(2.0**-6, True), (1.5 * 2.0**-24, False), (2.0**17, False)])
def test_bfloat16_scales_are_packed_where_float16_holds_them(folder, scale, fits):
    path, expected = folder(compressed("pack-quantized", 4, group=32), pack_quantized, 32, zero=8)
    data = path / "model.safetensors"
    rewrite_scales_as_bf16(data, load_file(data), scale)
    with open_checkpoint(path) as checkpoint:
        for name, values in expected.items():
            assert (checkpoint.packed(name) is not None) == fits
            read = checkpoint.tensor(name).array
            assert read.shape == values.shape
            steps = read / np.float32(scale)
            assert (steps == np.rint(steps)).all()
            assert steps.min() >= -8
            assert steps.max() <= 7
            assert np.unique(steps).size == 16


def rewrite_scales_as_bf16(path, arrays, scale):
    """The library's numpy side has no bfloat16, so the file is put together by the format's description."""
    header, body = {}, b""
    for name, array in arrays.items():
        stored = StoredTensor.from_array(
            array, {"i": f"I{8 * array.itemsize}", "f": f"F{8 * array.itemsize}"}[array.dtype.kind]
        )
        if name.endswith("weight_scale"):
            wide = np.full(array.shape, scale, np.float32)
            stored = cast(StoredTensor.from_array(wide, "F32"), "BF16")
        content = stored.data.tobytes()
        header[name] = {
            "dtype": stored.dtype,
            "shape": list(stored.shape),
            "data_offsets": [len(body), len(body) + len(content)],
        }
        body += content
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (3, ["expected an object"]),
        ({"quant_method": "bitsandbytes"}, ["quant_method = 'bitsandbytes'", "gptq, awq or compressed-tensors"]),
        (GPTQ | {"bits": 8}, ["bits = 8", "expected 4"]),
        (GPTQ | {"bits": "4"}, ["bits = 4"]),
        (GPTQ | {"group_size": 0}, ["group_size = 0"]),
        (GPTQ | {"group_size": "32"}, ["group_size = 32"]),
        (GPTQ | {"checkpoint_format": "marlin"}, ["'marlin'"]),
        (AWQ | {"version": "gemv"}, ["'gemv'"]),
        (compressed("float-quantized", 8), ["format = 'float-quantized'"]),
        (compressed("pack-quantized", 3, group=32), ["3 bits"]),
        (compressed("int-quantized", 8, False), ["symmetric = False"]),
        (compressed("int-quantized", 8, type="float"), ["type int"]),
        (compressed("int-quantized", 8) | {"config_groups": {}}, ["config_groups"]),
        (compressed("int-quantized", 8) | {"config_groups": {"a": 3}}, ["config_groups"]),
    ],
)
def test_schemes_that_are_not_read_are_named(folder, refused, value, words):
    path, _ = folder(value, gptq, 32)
    with refused(ConfigError, 3, "config.json: quantization_config", *words):
        open_checkpoint(path)


def test_damaged_parts_are_refused(folder, refused):
    path, _ = folder(GPTQ | {"group_size": 64}, gptq, 32)
    with refused(CheckpointError, 3, "self_attn.q_proj.scales", "(2, 128)", "(4, 128)"):
        open_checkpoint(path)
    path, _ = folder(GPTQ | {"group_size": 96}, gptq, 32)
    with refused(CheckpointError, 3, "self_attn.q_proj", "groups of 96"):
        open_checkpoint(path)
    path, _ = folder(GPTQ | {"desc_act": True}, gptq, 32)
    arrays = load_file(path / "model.safetensors")
    arrays["model.layers.0.self_attn.q_proj.g_idx"] += 1
    save_file(arrays, path / "model.safetensors")
    with open_checkpoint(path) as checkpoint, refused(CheckpointError, 3, "q_proj: g_idx", "1 to 4", "expected 0 to 3"):
        checkpoint.tensor("layers.0.attention.wq.weight")
