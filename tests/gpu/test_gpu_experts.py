"""The grouped mixture against the mixture of record, and routing against its rule."""

import math

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from maestrale.torch_backend.model import FeedForward
from maestrale.torch_backend.moe import MixtureOfExperts, route
from maestrale.torch_backend.triton.experts import experts, group, group_many


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
