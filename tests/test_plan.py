"""The table of tensors against transformers' models and the published sizes."""

from dataclasses import replace

import pytest
import torch
from tiny import DENSE, MIXED, MIXTURE, TIED, WINDOWED, hf_model, native_weights

from maestrale.config import ModelConfig, MoeConfig
from maestrale.plan import axis_sizes, cache_bytes, count_parameters, explain_axis, tensor_plan

V01 = ModelConfig(
    dim=4096,
    n_layers=32,
    head_dim=128,
    hidden_dim=14336,
    n_heads=32,
    n_kv_heads=8,
    vocab_size=32000,
    norm_eps=1e-5,
    rope_theta=1e4,
    sliding_window=(4096,) * 32,
)
V03 = replace(V01, vocab_size=32768, rope_theta=1e6, sliding_window=(None,) * 32)
MIXTRAL = replace(V01, rope_theta=1e6, sliding_window=(None,) * 32, moe=MoeConfig(8, 2))


@pytest.mark.parametrize("config", [DENSE, WINDOWED, MIXED, MIXTURE, TIED])
def test_names_and_shapes_are_those_of_a_transformers_model(config):
    expected = {name: tuple(w.shape) for name, w in native_weights(hf_model(config), config).items()}
    assert {name: t.shape for name, t in tensor_plan(config).items()} == expected


@pytest.mark.parametrize("config", [DENSE, MIXTURE, TIED])
def test_parameters_are_counted_as_torch_counts_them(config):
    assert count_parameters(config)[0] == sum(w.numel() for w in hf_model(config).parameters())


@pytest.mark.parametrize(
    ("config", "total", "active"),
    [
        (V01, 7_241_732_096, 7_241_732_096),
        (V03, 7_248_023_552, 7_248_023_552),
        (MIXTRAL, 46_702_792_704, 12_879_925_248),
    ],
)
def test_parameter_counts_are_the_published_ones(config, total, active):
    assert count_parameters(config) == (total, active)


def test_cache_bytes_are_the_known_ones():
    full = replace(V01, sliding_window=(None,) * 32)
    assert cache_bytes(full, 1, 2) == 131_072
    assert cache_bytes(full, 32_768, 2) == 4 << 30
    assert cache_bytes(V01, 32_768, 2) == 512 << 20
    assert cache_bytes(V01, 100, 2) == 100 * 131_072
    half = replace(V01, sliding_window=(None, 4096) * 16)
    assert cache_bytes(half, 32_768, 2) == (2 << 30) + (256 << 20)


@pytest.mark.parametrize("config", [DENSE, MIXTURE, V01])
def test_every_axis_has_a_size_and_an_explanation_that_tells_it(config):
    sizes = axis_sizes(config)
    for tensor in tensor_plan(config).values():
        assert tensor.shape == tuple(sizes[axis] for axis in tensor.axes)
        assert tensor.size == torch.Size(tensor.shape).numel()
        for axis, extent in zip(tensor.axes, tensor.shape, strict=True):
            numbers = [int(word) for word in explain_axis(config, axis).replace(",", "").split() if word.isdigit()]
            assert torch.Size(numbers).numel() == extent


def test_tied_embeddings_have_no_output_of_their_own():
    assert "output.weight" in tensor_plan(DENSE)
    assert "output.weight" not in tensor_plan(TIED)
