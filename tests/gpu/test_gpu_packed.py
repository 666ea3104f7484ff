"""Products with packed weights against products with the values that checkpoint/packed.py says they stand for."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from maestrale.checkpoint.packed import dequantize, pack_int4, pack_int8
from maestrale.torch_backend.triton import packed
from maestrale.torch_backend.triton.packed import from_packed, joined, to_fp8


def weight(format, n, k, seed=0):
    rng = np.random.default_rng(seed)
    if format == "int8":
        return pack_int8(rng.integers(-127, 128, (n, k)).astype(np.int8), rng.uniform(0.001, 0.01, n))
    group = 64 if k % 64 == 0 else 32
    codes = rng.integers(0, 16, (n, k)).astype(np.uint8)
    scales = rng.uniform(-0.1, 0.1, (n, k // group)).astype(np.float16)
    offsets = rng.uniform(-0.3, 0.3, scales.shape).astype(np.float32) if format == "affine" else None
    return pack_int4(codes, scales, offsets)


@pytest.mark.parametrize("format", ["int8", "int4", "affine"])
@pytest.mark.parametrize(("n", "k", "rows"), [(48, 64, 1), (37, 96, 5), (16, 320, 20)])
def test_a_few_rows_times_a_packed_weight(format, n, k, rows, device):
    packed_weight = weight(format, n, k)
    x = torch.randn(rows, k)
    expected = x.double() @ torch.from_numpy(dequantize(packed_weight)).double().T
    got = from_packed(packed_weight, device, torch.float32)(x.to(device)).cpu()
    torch.testing.assert_close(got.double(), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("format", ["int8", "int4", "affine"])
def test_many_rows_meet_the_unpacked_values(format, device, monkeypatch):
    monkeypatch.setattr(packed, "FEW", 2)
    packed_weight = weight(format, 37, 96)
    layer, values = from_packed(packed_weight, device, torch.float32), torch.from_numpy(dequantize(packed_weight))
    torch.testing.assert_close(layer.weight.cpu(), values, atol=0, rtol=2**-22)
    x = torch.randn(2, 3, 96)
    torch.testing.assert_close(layer(x.to(device)).cpu(), x @ values.T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rows", [1, 20])
def test_fp8_is_within_a_rounding_of_its_three_bits(rows, device, monkeypatch):
    torch.manual_seed(0)
    values = torch.randn(40, 200)
    values[7] = 0
    layer = to_fp8(values.to(device))
    # Normal numbers of three bits are off by at most 2**-4 of themselves, the smallest by half a step of 2**-9.
    bound = torch.maximum(values.abs() * 2**-4, values.abs().amax(1, keepdim=True) / 448 * 2**-10)
    assert ((layer.weight.cpu() - values).abs() <= bound * 1.001).all()
    x = torch.randn(rows, 200)
    torch.testing.assert_close(layer(x.to(device)).cpu(), x @ layer.weight.cpu().T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("format", ["int8", "int4", "affine"])
def test_layers_that_read_the_same_rows_are_one(format, device):
    weights = [weight(format, n, 64, seed) for seed, n in enumerate((32, 16, 21))]
    layers = [from_packed(part, device, torch.float32) for part in weights]
    whole, x = joined(layers), torch.randn(3, 64)
    expected = torch.cat([x @ torch.from_numpy(dequantize(part)).T for part in weights], 1)
    torch.testing.assert_close(whole(x.to(device)).cpu(), expected, atol=1e-4, rtol=1e-4)
    assert joined(layers[::-1]) is None, "21 outputs fill no whole block"
    assert joined([layers[0], to_fp8(torch.ones(4, 64, device=device))]) is None
