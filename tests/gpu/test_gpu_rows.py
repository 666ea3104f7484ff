"""Norm, RoPE with the cache's write, and SiLU's product against the model's own operations."""

import numpy as np
import pytest
import torch
from torch.nn.functional import silu

pytest.importorskip("triton", reason="triton is not installed")

from maestrale.batch import slots
from maestrale.torch_backend.model import RMSNorm, rope, rope_turns
from maestrale.torch_backend.triton.rows import norm, silu_product, turn_and_keep

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# A rounding or two of a value of that size; the sums below it are added in another order. Triton's interpreter cuts
# bfloat16 off where a GPU rounds.
STEP = {torch.float32: 1e-6, torch.bfloat16: 2**-6, torch.float16: 2**-10}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [32, 100])
def test_the_norm_with_and_without_a_residual_is_the_models(dtype, width, device):
    torch.manual_seed(width)
    layer = RMSNorm(width, 1e-5).to(dtype).requires_grad_(False)
    layer.weight.copy_(torch.rand(width) + 0.5)
    x, added = torch.randn(5, width).to(dtype), torch.randn(5, width).to(dtype)
    for extra in (None, added):
        sums, y = norm(x.to(device), layer.weight.to(device), 1e-5, None if extra is None else extra.to(device))
        expected = x if extra is None else x + extra
        torch.testing.assert_close(sums.cpu(), expected, atol=0, rtol=STEP[dtype] if dtype == torch.bfloat16 else 0)
        torch.testing.assert_close(y.cpu(), layer(expected), atol=STEP[dtype], rtol=STEP[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("H", "G", "C"), [(4, 2, 8), (3, 1, 12), (18, 2, 8)])
def test_queries_are_turned_and_keys_and_values_kept_where_the_law_says(dtype, H, G, C, device):
    torch.manual_seed(C)
    positions, sequences = np.array([3, 37, 38, -1, 0]), np.array([0, 1, 1, 2, 2])
    table = np.array([[4, 1], [0, 3], [2, 5]])
    qkv = torch.randn(5, (H + 2 * G) * C).to(dtype)
    pools = torch.full((2, 6 * 16, G, C), 7.0).to(dtype)
    turns = rope_turns(torch.from_numpy(positions), C, 1e4)
    expected_q, expected_k = (rope(part.unflatten(-1, (-1, C)), turns) for part in qkv.split([H * C, 2 * G * C], 1))
    expected = pools.clone()
    there = positions >= 0
    where = torch.from_numpy(slots(table, sequences[there], positions[there], 16, 2))
    expected[0, where] = expected_k[there, :G]
    expected[1, where] = qkv.unflatten(-1, (-1, C))[there, H + G :]

    def put(array):
        return torch.from_numpy(array).int().to(device)

    on_device = pools.to(device)
    q = turn_and_keep(
        qkv.to(device),
        *on_device,
        turns.real.contiguous().to(device),
        turns.imag.contiguous().to(device),
        put(positions),
        put(sequences),
        put(table),
        16,
    ).cpu()
    torch.testing.assert_close(q[there], expected_q[there], atol=STEP[dtype], rtol=STEP[dtype])
    torch.testing.assert_close(on_device.cpu(), expected, atol=STEP[dtype], rtol=STEP[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_fp8_cache_keeps_what_torch_would_round_and_saturates(dtype, device):
    torch.manual_seed(1)
    H, G, C, T = 2, 2, 8, 6
    qkv = (torch.randn(T, (H + 2 * G) * C) * 10.0 ** torch.arange(-3, 3)[:, None]).to(dtype)
    qkv[5, -1], qkv[5, -2] = 3000.0, -460.0
    pools = torch.zeros(2, 32, G, C, dtype=torch.float8_e4m3fn)
    cos, sin = torch.ones(T, C // 2), torch.zeros(T, C // 2)  # no turn: what is kept is what came
    every = torch.arange(T, dtype=torch.int32)
    table = torch.tensor([[1, 0]], dtype=torch.int32)
    on_device = pools.to(device)
    parts = [part.to(device) for part in (cos, sin, every, every * 0, table)]
    turn_and_keep(qkv.to(device), *on_device, *parts, 16)
    got = on_device.cpu().float()[:, 16 : 16 + T]
    expected = qkv.float().clamp(-448, 448).to(torch.float8_e4m3fn).float()
    torch.testing.assert_close(got[0], expected[:, H * C : (H + G) * C].unflatten(1, (G, C)), atol=0, rtol=0)
    torch.testing.assert_close(got[1], expected[:, (H + G) * C :].unflatten(1, (G, C)), atol=0, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silus_product_is_the_models(dtype, device):
    both = 3 * torch.randn(3, 2 * 70).to(dtype)
    expected = silu(both[:, :70]) * both[:, 70:]
    torch.testing.assert_close(silu_product(both.to(device)).cpu(), expected, atol=STEP[dtype], rtol=4 * STEP[dtype])
