"""Tokens drawn by torch over many rows, against the policy row by row: the same token, ties included."""

import math

import numpy as np
import pytest
import torch

from maestrale.batch import Draws
from maestrale.errors import CheckpointError, RequestError
from maestrale.sampling.params import SamplingParams
from maestrale.sampling.policy import sample, uniform
from maestrale.torch_backend import draw as module
from maestrale.torch_backend.draw import Drawer, draw

KEPT = [
    {},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 5000},
    {"top_p": 0.001},
    {"top_p": 0.3},
    {"top_p": 0.95},
    {"top_p": 1 - 1e-12},
    {"min_p": 0.02},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.8},
    {"top_k": 50, "top_p": 0.95, "min_p": 0.1},
    {"logit_bias": {3: 100.0, 40: -100.0}},
    {"logit_bias": {7: 2.5}, "top_p": 0.5},
    {"min_tokens": 5, "max_tokens": 9},
    {"min_tokens": 5, "max_tokens": 9, "logit_bias": {2: 50.0}},
]
EOS = 2


def draws_of(asked, seed, index):
    """What the engine would say of rows with these parameters, written out here once more."""
    rows, biases = [], []
    for i, params in enumerate(asked):
        rows.append(
            [params.temperature, uniform(seed, i, index), params.top_k, params.top_p, params.min_p]
            if params is not None
            else [math.nan] * 5
        )
        if params is not None:
            biases += [(i, token, bias) for token, bias in (params.logit_bias or {}).items()]
            biases += [(i, EOS, -math.inf)] if index < params.min_tokens else []
    return Draws(np.array(rows, np.float64), np.array(biases, np.float64).reshape(-1, 3))


def expected(x, asked, seed, index):
    tokens = []
    for i, (row, params) in enumerate(zip(x, asked, strict=True)):
        try:
            tokens.append(-1 if params is None else sample(row, params, seed, i, index, (EOS,)))
        except RequestError:
            tokens.append(-1)
    return tokens


def rows_of_logits(kind, count, vocab_size, seed):
    x = np.random.default_rng(seed).standard_normal((count, vocab_size), np.float32) * 3
    return {
        "spread": x,
        "tied": np.round(x),
        "half precision": torch.from_numpy(x).bfloat16().float().numpy(),
        "steep": x * 40,
        "flat": np.zeros_like(x),
    }[kind]


@pytest.mark.parametrize("kind", ["spread", "tied", "half precision", "steep", "flat"])
@pytest.mark.parametrize("together", [1, 1 << 23], ids=["a row at a time", "all at once"])
def test_the_token_is_the_policys(kind, together, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", together)
    asked = [SamplingParams(temperature=t, **kept) for t in (0, 0.001, 0.7, 1.0, 2.0) for kept in KEPT]
    asked[5:5] = [None]
    for seed in range(4):
        x = rows_of_logits(kind, len(asked), 777, seed)
        got = draw(torch.from_numpy(x), draws_of(asked, seed, index=seed * 3)).numpy()
        assert got.dtype == np.int64
        assert got.tolist() == expected(x, asked, seed, index=seed * 3)


def test_over_many_draws_each_token_comes_as_often_as_its_probability_says():
    p = np.array([0.5, 0.2, 0.15, 0.1, 0.05])
    count = 20_000
    x = torch.from_numpy(np.log(p).astype(np.float32)).expand(count, -1)
    rows = np.column_stack(
        [np.ones(count), (np.arange(count) + 0.5) / count, np.zeros(count), np.full(count, 0.9), np.zeros(count)]
    )
    found = np.bincount(draw(x, Draws(rows, np.empty((0, 3)))).numpy(), minlength=5) / count
    # In falling order the fourth has 0.85 before it and stays; the fifth has 0.95 and goes.
    np.testing.assert_allclose(found, np.array([0.5, 0.2, 0.15, 0.1, 0]) / 0.95, atol=1e-4)


@pytest.mark.parametrize("temperature", [0, 1])
def test_rows_that_nothing_can_be_drawn_of_are_left_to_the_policy_to_refuse(temperature):
    x = np.zeros((5, 6), np.float32)
    x[0, 3], x[1, 2], x[2], x[3, :5] = math.nan, math.inf, -math.inf, -math.inf
    asked = [SamplingParams(temperature=temperature)] * 5
    assert draw(torch.from_numpy(x), draws_of(asked, 0, 0))[:4].tolist() == [-1, -1, -1, 5]
    with pytest.raises(CheckpointError, match="nan"):
        sample(x[0], asked[0], 0, 0, 0)


def test_rows_come_to_the_host_as_they_are_asked_for():
    x = torch.randn(4, 9)
    output = Drawer().answer(x, draws_of([None, SamplingParams(temperature=0), None, None], 0, 0))()
    assert output.tokens.tolist() == [-1, int(x[1].argmax()), -1, -1]
    np.testing.assert_array_equal(output.logits[2], x[2].numpy())
    np.testing.assert_array_equal(output.logits[1:3], x[1:3].numpy())
    whole = Drawer().answer(x, None)()
    assert whole.tokens is None
    np.testing.assert_array_equal(whole.logits, x.numpy())


def test_a_step_goes_on_from_the_tokens_of_the_one_before_it():
    drawer, x = Drawer(), torch.randn(3, 9)
    x[1] = math.nan
    drawer.answer(x, draws_of([SamplingParams(temperature=0)] * 3, 0, 0))
    ids = torch.tensor([7, 0, 5, 0, 0])
    assert drawer.follow(ids, None).tolist() == [7, 0, 5, 0, 0]
    found = drawer.follow(ids, np.array([[1, 2], [3, 0], [4, 1]]))
    assert found.tolist() == [7, int(x[2].argmax()), 5, int(x[0].argmax()), 0]
