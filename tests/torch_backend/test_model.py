"""The model's parts in half precision, where the order of casts shows: rules N3, N4 and N8 of docs/numerics.md."""

from dataclasses import replace

import pytest
import torch
from tiny import DENSE, MIXTURE, hf_model, native_weights
from transformers.models.mistral.modeling_mistral import MistralRMSNorm

from maestrale.config import ModelConfig
from maestrale.torch_backend.model import RMSNorm, Transformer, rope, rope_turns

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_is_transformers_to_the_last_bit(dtype):
    make = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(50, 96, generator=make)).to(dtype)
    ours, theirs = RMSNorm(96, 1e-5).to(dtype), MistralRMSNorm(96, 1e-5).to(dtype)
    for norm in (ours, theirs):
        norm.weight.data = (1 + torch.randn(96, generator=torch.Generator().manual_seed(1))).to(dtype)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_rope_turns_pairs_as_complex_numbers_and_rounds_once(dtype, theta):
    make, head_dim = torch.Generator().manual_seed(0), 16
    positions = torch.arange(100)
    x = torch.randn(100, 3, head_dim, generator=make).to(dtype)
    speeds = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    turns = torch.polar(torch.ones(1, dtype=torch.float64), positions[:, None] * speeds)
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    exact = torch.view_as_real(pairs * turns[:, None]).flatten(-2)
    got = rope(x, rope_turns(positions, head_dim, theta))
    assert got.dtype == dtype
    rounding = torch.finfo(dtype).eps / 2  # of a number to its nearest neighbour, relative
    assert ((got.double() - exact).abs() <= rounding * exact.abs() + 2e-5).all()


@pytest.mark.parametrize("config", [DENSE, MIXTURE], ids=["dense", "mixture"])
def test_logits_leave_in_fp32_and_only_wanted_rows_are_made(config):
    model = Transformer(config)
    model.load_state_dict(native_weights(hf_model(config), config))
    model.bfloat16()

    def blind(layer, q, k, v):  # each token sees itself alone
        return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)

    ids, positions = torch.arange(9), torch.arange(9)
    with torch.no_grad():
        whole = model(ids, positions, blind)
        for rows in ([], [8], [3, 0, 5]):
            part = model(ids, positions, blind, torch.tensor(rows, dtype=torch.int64))
            assert (part.dtype, part.shape) == (torch.float32, (len(rows), config.vocab_size))
            torch.testing.assert_close(part, whole[rows], atol=0.05, rtol=0)


def test_parameters_bear_the_names_of_the_checkpoint():
    config: ModelConfig = replace(MIXTURE, n_layers=1, sliding_window=(None,))
    assert set(Transformer(config).state_dict()) == set(native_weights(hf_model(config), config))
