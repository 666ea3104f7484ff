"""Routing: ties, weights, and which expert reads which token."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maestrale.torch_backend.moe import MixtureOfExperts, route


@given(st.lists(st.lists(st.integers(-3, 3), min_size=6, max_size=6), min_size=1, max_size=9), st.integers(1, 6))
def test_of_equal_scores_the_lower_expert_wins(scores, n_chosen):
    for dtype in (torch.float32, torch.bfloat16):
        weights, experts = route(torch.tensor(scores, dtype=dtype), n_chosen)
        for row, chosen in zip(scores, experts.tolist(), strict=True):
            assert chosen == sorted(range(6), key=lambda e: (-row[e], e))[:n_chosen]
        assert weights.dtype == torch.float32
        torch.testing.assert_close(weights.sum(-1), torch.ones(len(scores)))


@pytest.mark.parametrize("n_tokens", [0, 1, 7])
@pytest.mark.parametrize("n_chosen", [1, 2, 4])
def test_each_token_is_read_by_its_experts_alone_and_weighted_by_softmax_of_all_renormalised(n_tokens, n_chosen):
    torch.manual_seed(n_tokens)
    read = []

    class Expert(torch.nn.Linear):
        def forward(self, x):
            read.append((self, len(x)))
            return super().forward(x)

    layer = MixtureOfExperts(8, n_chosen, (Expert(8, 8, bias=False) for _ in range(4)))
    x = torch.randn(n_tokens, 8)
    with torch.no_grad():
        y, probabilities = layer(x), torch.softmax(layer.gate(x), -1)
        assert sum(count for _, count in read) == n_tokens * n_chosen
        assert all(count for _, count in read), "an expert that nobody chose is not called"
        assert [e for e, _ in read] == [e for e in layer.experts if e in [r for r, _ in read]], "ascending order"
        kept = torch.zeros_like(probabilities)
        for t in range(n_tokens):
            top = probabilities[t].topk(n_chosen)
            kept[t, top.indices] = top.values / top.values.sum()
        expected = sum((kept[:, e : e + 1] * (x @ expert.weight.T) for e, expert in enumerate(layer.experts)))
    torch.testing.assert_close(y, expected)
