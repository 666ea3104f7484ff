"""Products of a few rows, with what is done before and after them, against the model's own operations."""

import numpy as np
import pytest
import torch
from torch.nn.functional import silu

pytest.importorskip("triton", reason="triton is not installed")

from maestrale.batch import slots
from maestrale.checkpoint.packed import pack_int4, pack_int8
from maestrale.torch_backend.model import RMSNorm, rope, rope_turns
from maestrale.torch_backend.triton.few import FEW, fits, gated_product, product, turned_product
from maestrale.torch_backend.triton.packed import from_packed, joined, to_fp8

# Some roundings; the interpreter cuts bfloat16 off. fp32: as int4's codes are multiplied (few_sums.py).
ALLOWED = {torch.float32: 3e-4, torch.bfloat16: 2**-4.5, torch.float16: 2**-8}
EPS = 1e-5


def packed_weight(form, n, k, device, dtype, seed):
    """The layer and the values that it stands for."""
    rng = np.random.default_rng(seed)
    if form == "int8":
        packed = pack_int8(rng.integers(-127, 128, (n, k)).astype(np.int8), rng.uniform(0.001, 0.01, n))
    elif form == "fp8":
        layer = to_fp8(torch.from_numpy(rng.standard_normal((n, k), np.float32)).to(device))
        return layer, layer.unpack(torch.float32).cpu()
    else:
        group = 64 if k % 64 == 0 else 32
        scales = rng.uniform(-0.1, 0.1, (n, k // group)).astype(np.float16)
        offsets = rng.uniform(-0.3, 0.3, scales.shape).astype(np.float32) if form == "affine" else None
        packed = pack_int4(rng.integers(0, 16, (n, k)).astype(np.uint8), scales, offsets)
    layer = from_packed(packed, device, dtype)
    return layer, layer.unpack(torch.float32).cpu()


def weight(form, shapes, k, device, dtype=torch.float32):
    """Of one or several layers that lie together, and the values."""
    if form == "whole":
        values = torch.randn(sum(shapes), k).to(dtype)
        return values.to(device), values.float()
    layers, values = zip(*(packed_weight(form, n, k, device, dtype, i) for i, n in enumerate(shapes)), strict=True)
    return layers[0] if len(layers) == 1 else joined(layers), torch.cat(values)


def close(got, expected, dtype):
    """Within roundings of the row's largest value."""
    off = (got.cpu().float() - expected.float()).abs().amax(-1) / expected.float().abs().amax(-1)
    assert off.max() <= ALLOWED[dtype], off


@pytest.mark.parametrize("form", ["whole", "fp8", "int8", "int4", "affine"])
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 37, 192), (3, 16, 2208)])
def test_a_few_rows_times_a_weight(form, rows, n, k, device, monkeypatch):
    torch.manual_seed(k)
    w, values = weight(form, [n], k, device)
    x, residual = torch.randn(rows, k), torch.randn(rows, n)
    norm = RMSNorm(k, EPS).requires_grad_(False)
    norm.weight.copy_(torch.rand(k) + 0.5)
    assert fits(x, w)
    expected = x.double() @ values.double().T
    close(product(x.to(device), w), expected, torch.float32)
    got = product(x.to(device), w, norm.weight.to(device), EPS, residual.to(device))
    close(got, residual.double() + norm(x).double() @ values.double().T, torch.float32)


def test_inputs_that_do_not_fit_at_once_are_read_part_by_part(device):
    torch.manual_seed(1)
    w, x = torch.randn(5, 4500), torch.randn(2, 4500)
    norm = RMSNorm(4500, EPS).requires_grad_(False)
    got = product(x.to(device), w.to(device), norm.weight.to(device), EPS)
    close(got, norm(x).double() @ w.double().T, torch.float32)


@pytest.mark.parametrize("form", ["whole", "fp8", "int8", "int4"])
@pytest.mark.parametrize("dtype", ALLOWED)
@pytest.mark.parametrize("rows", [1, FEW])
def test_the_gated_product_rounds_where_the_model_does(form, dtype, rows, device):
    torch.manual_seed(2)
    k, f = 96, 48
    w13, values = weight(form, [f, f], k, device, dtype)
    norm = RMSNorm(k, EPS).requires_grad_(False).to(dtype)
    norm.weight.copy_(torch.rand(k) + 0.5)
    x = torch.randn(rows, k).to(dtype)
    both = (norm(x).float() @ values.T).to(dtype)
    close(gated_product(x.to(device), w13, norm.weight.to(device), EPS), silu(both[:, :f]) * both[:, f:], dtype)


@pytest.mark.parametrize("form", ["whole", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("H", "G", "C"), [(4, 2, 8), (3, 1, 16)])
def test_queries_are_turned_and_keys_and_values_kept_where_the_law_says(form, dtype, H, G, C, device):
    torch.manual_seed(C)
    k, positions, sequences = 64, np.array([37, -1, 3]), np.array([1, 2, 0])
    table = np.array([[4, 1], [0, 3], [2, 5]])
    wqkv, values = weight(form, [H * C, G * C, G * C] if form == "whole" else [(H + 2 * G) * C], k, device, dtype)
    norm = RMSNorm(k, EPS).requires_grad_(False).to(dtype)
    x = torch.randn(3, k).to(dtype)
    qkv = (norm(x).float() @ values.T).to(dtype)
    turns = rope_turns(torch.from_numpy(positions), C, 1e4)
    expected_q, expected_k = (rope(part.unflatten(-1, (-1, C)), turns) for part in qkv.split([H * C, 2 * G * C], 1))
    pools = torch.full((2, 6 * 16, G, C), 7.0).to(dtype)
    expected, there = pools.clone(), positions >= 0
    where = torch.from_numpy(slots(table, sequences[there], positions[there], 16, 2))
    expected[0, where] = expected_k[there, :G]
    expected[1, where] = qkv.unflatten(-1, (-1, C))[there, H + G :]
    on_device = pools.to(device)
    ints = [torch.from_numpy(array).int().to(device) for array in (positions, sequences, table)]
    cos, sin = turns.real.contiguous().to(device), turns.imag.contiguous().to(device)
    q = turned_product(x.to(device), wqkv, norm.weight.to(device), EPS, *on_device, cos, sin, *ints, 16)
    close(q[there].flatten(1), expected_q[there].flatten(1), dtype)
    close(on_device.flatten(2).flatten(0, 1), expected.flatten(2).flatten(0, 1), dtype)
