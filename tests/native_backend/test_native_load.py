"""Folders into the native model: float ones packed on the way, packed ones as they lie; which backend takes what."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import DENSE, MIXTURE, TIED, make_folder, tokens

from maestrale import LLM, choices, launch
from maestrale.batch import CacheLayout
from maestrale.checkpoint.gguf_writer import convert_to_gguf
from maestrale.checkpoint.quantize import Recipe, quantize
from maestrale.checkpoint.reader import open_checkpoint
from maestrale.choices import Options, cache_element, nearest_rounding
from maestrale.engine.layout import sequence_bytes
from maestrale.errors import UsageError
from maestrale.native_backend.load import make_model

WIDE = {
    "dense": replace(DENSE, dim=64, hidden_dim=96, head_dim=16),
    "mixture": replace(MIXTURE, dim=64, hidden_dim=96, head_dim=16),
    "tied": replace(TIED, dim=64, hidden_dim=96, head_dim=16),
}


def logits(folder, **options):
    return LLM(folder, backend="native", max_len=64, **options).logits([tokens(40)])[0]


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("name", WIDE)
def test_a_quantized_folder_is_the_float_one_quantized_while_loading_to_the_last_bit(name, weights, tmp_path):
    source = make_folder(tmp_path / "source", WIDE[name], dtype=torch.bfloat16)
    quantize(source, tmp_path / "packed", Recipe(weights), nearest_rounding())
    assert np.array_equal(logits(tmp_path / "packed"), logits(source, weights=weights))


@pytest.mark.parametrize(("weights", "limit"), [("bf16", 0.02), ("int8", 0.03), ("int4", 0.2)])
def test_fewer_bits_stray_from_fp32_by_what_rounding_does(weights, limit, tmp_path):
    folder = make_folder(tmp_path, WIDE["dense"])
    full = logits(folder, dtype="float32")
    strays = np.abs(logits(folder, weights=weights) - full).mean() / full.std()
    assert limit / 40 < strays < limit


@pytest.mark.parametrize("name", WIDE)
def test_an_int8_cache_strays_by_what_rounding_keys_and_values_does(name, tmp_path):
    folder = make_folder(tmp_path, WIDE[name])
    full = logits(folder, dtype="float32")
    strays = np.abs(logits(folder, dtype="float32", cache="int8") - full).mean() / full.std()
    assert 1e-4 < strays < 0.02


def test_pages_of_an_int8_cache_take_what_the_accounting_says(tmp_path):
    """head_dim + 4 bytes for each key and value of a head, where head_dim is a multiple of 16; bf16: 2 head_dim."""
    folder = make_folder(tmp_path, WIDE["dense"])
    with open_checkpoint(folder) as checkpoint:
        config = checkpoint.config
        for cache, element in (("f32", 4), ("bf16", 2), ("int8", cache_element(config, "BF16", "int8"))):
            layout = CacheLayout(16, 64, 64, (None,), (4,), (4,))
            model = make_model(config, layout, cache=cache, threads=1)
            expected = sequence_bytes(replace(config, sliding_window=(None,) * config.n_layers), 64, 64, element)
            assert 4 * model.page_bytes(config.n_layers) == expected
    assert cache_element(config, "BF16", "int8") == 1 + 4 / 16


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_what_torch_reads_from_the_same_file(stored, tmp_path):
    folder = make_folder(tmp_path, WIDE["mixture"], dtype=stored)
    theirs = LLM(folder, dtype="float32", backend="torch", max_len=64).logits([tokens(40)])[0]
    assert np.abs(logits(folder, dtype="float32") - theirs).max() < 1e-5


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ("native", "cpu", "F32")),
        ({"dtype": "bfloat16"}, ("native", "cpu", "BF16")),
        ({"weights": "int4"}, ("native", "cpu", "BF16")),
        ({"weights": "int8", "dtype": "float32"}, ("native", "cpu", "F32")),
        ({"dtype": "float32", "cache": "int8"}, ("native", "cpu", "F32")),
        ({"dtype": "float16"}, ("torch", "cpu", "F16")),
        ({"backend": "torch"}, ("torch", "cpu", "F32")),
        ({"backend": "torch", "weights": "bf16"}, ("torch", "cpu", "BF16")),
    ],
)
def test_auto_takes_native_but_for_what_torch_alone_can_do(options, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(choices, "_may_have_gpu", lambda: False)
    made = launch.launch(make_folder(tmp_path, WIDE["dense"]), Options(max_len=32, **options))
    assert (made.backend, made.device, made.dtype) == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backend": "native", "dtype": "float16"}, "dtype float16: the native backend runs .* take backend torch"),
        ({"backend": "native", "device": "cuda"}, "device cuda: the native backend runs on the CPU"),
        ({"backend": "torch", "weights": "int4"}, "the torch backend does not quantize; take backend native"),
        ({"tensor_parallel": -1}, "tensor_parallel = -1: expected a whole number from 1 to 65536"),
        ({"backend": "torch", "cache": "int8"}, "cache int8: the torch backend does not quantize; take backend native"),
        ({"cache": "int4"}, "cache 'int4': expected auto, int8 or fp8"),
        ({"threads": 0}, "threads = 0: expected a whole number from 1 to 1024"),
    ],
)
def test_what_a_backend_cannot_do_is_refused_with_the_remedy(options, words, tmp_path):
    with pytest.raises(UsageError, match=words):
        launch.launch(make_folder(tmp_path, DENSE), Options(max_len=32, **options))


def test_a_folder_is_not_quantized_twice(tmp_path):
    quantize(make_folder(tmp_path / "source", WIDE["dense"]), tmp_path / "packed", Recipe("int8"), nearest_rounding())
    with pytest.raises(UsageError, match="holds int8 already: leave weights out"):
        launch.launch(tmp_path / "packed", Options(max_len=32, weights="int4"))


@pytest.mark.filterwarnings("ignore:llama.cpp has no window")
def test_the_bits_that_a_folder_has_already_may_be_asked_for(tmp_path):
    convert_to_gguf(launch.BUNDLED / "stories", tmp_path / "x.gguf", "q4_0")
    np.testing.assert_array_equal(logits(tmp_path / "x.gguf", weights="int4"), logits(tmp_path / "x.gguf"))
    with pytest.raises(UsageError, match="holds int4 already"):
        launch.launch(tmp_path / "x.gguf", Options(max_len=32, weights="int8", backend="native"))


def test_an_environment_variable_that_is_no_number_of_threads_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("MAESTRALE_THREADS", "many")
    with pytest.raises(UsageError, match="MAESTRALE_THREADS=many: expected a whole number"):
        launch.launch(make_folder(tmp_path, DENSE), Options(max_len=32))


def test_an_instruction_set_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("MAESTRALE_ISA", "abacus")
    with pytest.raises(UsageError, match="MAESTRALE_ISA: expected one of"):
        launch.launch(make_folder(tmp_path, DENSE), Options(max_len=32, backend="native"))


def test_without_kernels_and_without_torch_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("maestrale.native_backend.kernels.native", None)
    monkeypatch.setattr("maestrale.native_backend.kernels._why", "nothing there", raising=False)
    monkeypatch.setattr(choices, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"kernels are not built .*; or run  pip install 'maestrale\[torch\]'"):
        launch.launch(make_folder(tmp_path, DENSE), Options(max_len=32))
