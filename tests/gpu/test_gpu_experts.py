"""The grouped mixture against the mixture of record, and routing against its rule."""

import math
from functools import partial

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from maestrale.checkpoint.packed import dequantize, pack_int4, pack_int8
from maestrale.checkpoint.rounding import int4_codes, int8_codes
from maestrale.torch_backend.model import FeedForward
from maestrale.torch_backend.moe import MixtureOfExperts, route
from maestrale.torch_backend.triton.experts import experts, group, group_many
from maestrale.torch_backend.triton.packed import from_packed, to_fp8
from maestrale.torch_backend.triton.packed_experts import PackedStack


def mixture(n_experts, n_chosen, dim, hidden_dim, dtype):
    torch.manual_seed(dim)
    parts = (FeedForward(dim, hidden_dim) for _ in range(n_experts))
    return MixtureOfExperts(dim, n_chosen, parts).to(dtype).requires_grad_(False)


def stacked(layer, device):
    w13 = torch.stack([torch.stack([e.w1.weight, e.w3.weight]) for e in layer.experts])
    return w13.to(device), torch.stack([e.w2.weight for e in layer.experts]).to(device)


@pytest.mark.parametrize(
    ("n_tokens", "n_experts", "n_chosen", "dim", "hidden_dim", "dtype"),
    [
        (1, 4, 2, 32, 48, torch.float32),
        (7, 6, 2, 40, 33, torch.float32),
        (3, 4, 4, 32, 48, torch.float32),
        (20, 8, 1, 136, 40, torch.float32),
        (64, 8, 2, 32, 48, torch.bfloat16),
        (290, 5, 3, 16, 24, torch.float16),
    ],
)
def test_the_grouped_mixture_gives_the_answer_of_record(n_tokens, n_experts, n_chosen, dim, hidden_dim, dtype, device):
    layer = mixture(n_experts, n_chosen, dim, hidden_dim, dtype)
    x = torch.randn(n_tokens, dim).to(dtype)
    got = experts(x.to(device), *stacked(layer, device), group(layer.gate(x).to(device), n_chosen)).cpu()
    # Sums of products are rounded where the layers round, so half precision is off by a rounding of such values.
    error = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}[dtype]
    torch.testing.assert_close(got, layer(x), atol=error, rtol=error)


def packed_layer(format, values, device, dtype):
    """values [n, k], and what stands for them in `format`: the layer and the values it stands for."""
    if format == "fp8":
        layer = to_fp8(values.to(device, dtype))
        scales = values.to(dtype).float().abs().amax(1, keepdim=True) / 448
        return layer, (values.to(dtype).float() / scales).to(torch.float8_e4m3fn).float() * scales
    codes = int8_codes if format == "int8" else partial(int4_codes, group=32)
    packed = (pack_int8 if format == "int8" else pack_int4)(*codes(values.numpy()))
    return from_packed(packed, device, dtype), torch.from_numpy(dequantize(packed))


@pytest.mark.parametrize("format", ["int8", "int4", "fp8"])
@pytest.mark.parametrize(
    ("n_tokens", "n_experts", "n_chosen", "dim", "hidden_dim", "dtype"),
    [
        (1, 4, 2, 32, 64, torch.float32),
        (9, 6, 2, 96, 32, torch.float32),  # some experts have nobody
        (70, 2, 2, 64, 40, torch.float32),  # more than one tile of an expert; rows of outputs that fill no block
        (20, 3, 1, 64, 32, torch.float16),
    ],
)
def test_packed_experts_are_the_mixture_of_what_they_stand_for(
    format, n_tokens, n_experts, n_chosen, dim, hidden_dim, dtype, device
):
    hidden_dim = 64 if format == "int4" and hidden_dim % 32 else hidden_dim
    layer = mixture(n_experts, n_chosen, dim, hidden_dim, torch.float32)
    up, down = [], []
    for expert in layer.experts:
        for part, to in ((expert.w1, up), (expert.w3, up), (expert.w2, down)):
            packed, values = packed_layer(format, part.weight.detach(), device, dtype)
            to.append(packed)
            part.weight.copy_(values)
    x, scores = torch.randn(n_tokens, dim).to(dtype), torch.randn(n_tokens, n_experts)
    layer.gate.forward = lambda x_TD: scores
    got = experts(x.to(device), PackedStack(up), PackedStack(down), group(scores.to(device), n_chosen)).cpu()
    error = {torch.float32: 1e-5, torch.float16: 2**-9}[dtype]
    torch.testing.assert_close(got.float(), layer(x.float()), atol=error, rtol=error)


def test_packed_experts_that_nobody_chose_are_not_read(device):
    layer = mixture(4, 1, 32, 32, torch.float32)
    up, down = (
        [packed_layer("int8", weight.detach(), device, torch.float32)[0] for weight in weights]
        for weights in (
            [part.weight for expert in layer.experts for part in (expert.w1, expert.w3)],
            [expert.w2.weight for expert in layer.experts],
        )
    )
    scores = torch.full((5, 4), -1.0)
    scores[:, 2] = 3.0
    stacks, x = [PackedStack(up), PackedStack(down)], torch.randn(5, 32).to(device)
    before = experts(x, *stacks, group(scores.to(device), 1))
    for expert in (0, 1, 3):
        for part in (*up[2 * expert : 2 * expert + 2], down[expert]):
            part.scales.fill_(math.nan)  # a view of what is stacked
    assert torch.equal(experts(x, *stacks, group(scores.to(device), 1)), before)
    assert before.isfinite().all()


def test_experts_that_nobody_chose_are_not_read(device):
    layer = mixture(6, 2, 32, 40, torch.float32)
    scores = torch.full((9, 6), -5.0)
    scores[:, 2], scores[:, 4] = torch.arange(9.0), 1.0
    w13, w2 = stacked(layer, device)
    for expert in (0, 1, 3, 5):
        w13[expert], w2[expert] = math.nan, math.nan
    x = torch.randn(9, 32)
    y = experts(x.to(device), w13, w2, group(scores.to(device), 2)).cpu()
    share = torch.softmax(scores[:, [2, 4]], -1)
    torch.testing.assert_close(y, share[:, :1] * layer.experts[2](x) + share[:, 1:] * layer.experts[4](x))


@pytest.mark.parametrize("grouping", [group, group_many], ids=["one program", "torch"])
@pytest.mark.parametrize(("n_tokens", "n_experts", "n_chosen"), [(1, 8, 2), (5, 3, 3), (130, 8, 2), (17, 16, 4)])
def test_pairs_stand_expert_after_expert_with_the_weights_of_route(grouping, n_tokens, n_experts, n_chosen, device):
    scores = torch.randint(-3, 4, (n_tokens, n_experts)).float()  # many are equal: the lower expert wins
    tokens, weights, places, counts = (part.cpu() for part in grouping(scores.to(device), n_chosen))
    wanted_weights, wanted = route(scores, n_chosen)
    pairs = sorted(
        (e, t, w) for t in range(n_tokens) for e, w in zip(wanted[t].tolist(), wanted_weights[t].tolist(), strict=True)
    )
    assert tokens.tolist() == [t for _, t, _ in pairs]
    torch.testing.assert_close(weights, torch.tensor([w for *_, w in pairs]))
    assert counts.tolist() == [int((wanted == e).sum()) for e in range(n_experts)]
    for t, row in enumerate(places.tolist()):
        assert [pairs[place][:2] for place in row] == [(e, t) for e in sorted(wanted[t].tolist())]


def test_a_token_that_is_nan_spoils_no_other(device):
    layer = mixture(4, 2, 32, 40, torch.float32)
    x = torch.randn(5, 32)
    expected = layer(x)
    x[2] = math.nan
    y = experts(x.to(device), *stacked(layer, device), group(layer.gate(x).to(device), 2)).cpu()
    assert y[2].isnan().all()
    others = [0, 1, 3, 4]
    torch.testing.assert_close(y[others], expected[others], atol=1e-5, rtol=1e-5)
