import collections
import fractions
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from maestrale.errors import CheckpointError
from maestrale.sampling import policy
from maestrale.sampling.mask import Mask
from maestrale.sampling.params import SamplingParams
from maestrale.sampling.policy import History, history_for, sample, token_logprob, uniform, uniforms


def some_logits(size, seed=0, scale=2.0):
    return (scale * np.random.default_rng(seed).standard_normal(size)).astype(np.float32)


def probabilities_of_transformers(logits, params, ids=(0,)):
    """The library's own processors, in its order, in float64."""
    x = torch.tensor(logits, dtype=torch.float64)[None]
    steps = []
    if params.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    steps.append(TemperatureLogitsWarper(float(params.temperature)))
    if params.top_k:
        steps.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        steps.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0:
        steps.append(MinPLogitsWarper(params.min_p))
    for step in steps:
        x = step(torch.tensor([list(ids)]), x)
    return x.softmax(-1)[0].numpy()


GRID = [
    {"temperature": t, **kept}
    for t in (0.3, 1.0, 1.7)
    for kept in (
        {},
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 1000},
        {"top_p": 0.1},
        {"top_p": 0.9},
        {"top_p": 0.9999},
        {"min_p": 0.05},
        {"top_k": 20, "top_p": 0.8},
        {"top_k": 50, "top_p": 0.95, "min_p": 0.1},
        {"repetition_penalty": 1.3, "top_p": 0.7},
        {"repetition_penalty": 0.5, "top_k": 9, "min_p": 0.02},
    )
]


@pytest.mark.parametrize("options", GRID, ids=str)
def test_draws_follow_the_probabilities_of_transformers(options, monkeypatch):
    params = SamplingParams(**options)
    ids = [3, 5, 5, 190]
    for seed in range(3):
        logits = some_logits(200, seed)
        expected = probabilities_of_transformers(logits, params, ids).cumsum()
        for u in np.random.default_rng(seed).random(60):
            monkeypatch.setattr(policy, "uniform", lambda *_, u=u: float(u))
            token = sample(logits, params, 0, 0, 3, history=history_for(params, ids, 200))
            assert token == np.searchsorted(expected, u, side="right")


@pytest.mark.parametrize("vocab_size", [1, 255, 256, 257, 2000])
def test_a_draw_is_the_first_token_at_which_the_running_sum_exceeds_the_number(vocab_size, monkeypatch):
    draw = np.random.default_rng(vocab_size)
    logits = draw.standard_normal(vocab_size).astype(np.float32) * 4
    logits[draw.random(vocab_size) < 0.3] = logits[700:1300] = -np.inf  # whole blocks among them
    logits[-1] = 1
    weights = [math.exp(x - 1) for x in logits.tolist()]
    sums = list(itertools.accumulate(map(fractions.Fraction, weights)))  # without rounding
    for u in [0.0, 2.0**-53, 1 - 2.0**-53, *draw.random(300).tolist()]:
        monkeypatch.setattr(policy, "uniform", lambda *_, u=u: u)
        expected = next(i for i, upto in enumerate(sums) if upto > fractions.Fraction(u) * sums[-1])
        assert sample(logits, SamplingParams(temperature=1), 0, 0, 0) == expected


def chi_square_fits(counts, expected):
    """Within 5 standard deviations of the statistic's mean, its degrees of freedom."""
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = len(expected) - 1
    return ((counts - expected) ** 2 / expected).sum() < freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.6, "top_k": 8, "top_p": 0.9}], ids=str)
@pytest.mark.parametrize("vary", ["seed", "sample", "index"])
def test_draws_are_distributed_right_along_every_argument(options, vary):
    params, logits, n = SamplingParams(**options), some_logits(12, 4, 1.0), 4000
    place = {"seed": 0, "sample": 1, "index": 2}[vary]
    drawn = [sample(logits, params, *(i if k == place else 9 for k in range(3))) for i in range(n)]
    expected = probabilities_of_transformers(logits, params) * n
    counts = np.bincount(drawn, minlength=12)
    assert not counts[expected == 0].any()
    assert chi_square_fits(counts, expected)


def philox_first_word(key, counter):
    """Philox4x64-10 from the paper (Salmon et al. 2011, section 3.3), one block's first word."""
    mask = 2**64 - 1
    k0, k1 = key & mask, key >> 64
    c = [counter >> (64 * i) & mask for i in range(4)]
    for _ in range(10):
        left, right = c[0] * 0xD2E7470EE14C6C93, c[2] * 0xCA5A826395121157
        c = [right >> 64 ^ c[1] ^ k0, right & mask, left >> 64 ^ c[3] ^ k1, left & mask]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
    return c[0]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 1234567])
@pytest.mark.parametrize(("sample_index", "index"), [(0, 0), (0, 1), (127, 0), (3, 32000)])
def test_the_uniform_number_is_philox_of_seed_sample_and_index(seed, sample_index, index):
    # The generator counts up once before its first block.
    word = philox_first_word(sample_index << 64 | seed % 2**64, (index << 64) + 1)
    assert uniform(seed, sample_index, index) == (word >> 11) / 2**53


def test_uniform_numbers_differ_by_each_argument_and_do_not_remember():
    arguments = [(s, k, i) for s in (-1, 0, 1, 2) for k in range(4) for i in range(8)]
    numbers = [uniform(*a) for a in arguments]
    assert len(set(numbers)) == len(arguments)
    assert [uniform(*a) for a in reversed(arguments)] == numbers[::-1]


def test_a_seeded_draw_does_not_depend_on_what_was_drawn_between():
    params = SamplingParams(top_p=0.95)
    rows = [some_logits(100, i) for i in range(10)]
    alone = [sample(row, params, 7, 0, i) for i, row in enumerate(rows)]
    mixed = []
    for i, row in enumerate(rows):
        sample(some_logits(100, 99), SamplingParams(), 3, 1, i)
        mixed.append(sample(np.stack([row, row * 0])[0], params, 7, 0, i))
    assert mixed == alone


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 10.0])
@pytest.mark.parametrize("top_p", [1e-6, 0.5, 0.9, 0.999999])
def test_the_nucleus_of_a_large_vocabulary_is_that_of_a_full_sort(scale, top_p):
    p = np.exp(some_logits(32000, 1, scale).astype(np.float64))
    order = np.argsort(-p, kind="stable")
    before = p[order].cumsum() - p[order]
    expected = order[before <= top_p * p.sum()]
    assert policy._nucleus(p, top_p).tolist() == sorted(expected.tolist())


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 9])
def test_ties_go_to_the_lower_index(count):
    x = np.array([1, 3, 2, 3, 2, 2, -np.inf], np.float32)
    expected = sorted(range(7), key=lambda i: (-x[i], i))[:count]
    assert policy.largest(x, count).tolist() == expected


def test_top_k_keeps_exactly_k_of_equal_logits():
    params = SamplingParams(top_k=3)
    drawn = {sample(np.zeros(50, np.float32), params, i, 0, 0) for i in range(200)}
    assert drawn == {0, 1, 2}


def test_temperature_zero_is_the_largest_logit_and_the_lowest_id_on_ties():
    logits = np.array([0, 5, 1, 5, 5], np.float32)
    assert sample(logits, SamplingParams(temperature=0), 1, 0, 0) == 1
    assert sample(logits, SamplingParams(temperature=0, top_k=2, top_p=0.1, min_p=1), 1, 0, 0) == 1


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-10])
def test_a_tiny_temperature_is_greedy_and_does_not_overflow(temperature):
    logits = some_logits(1000) * 1e30
    for i in range(20):
        assert sample(logits, SamplingParams(temperature=temperature), i, 0, 0) == logits.argmax()


def test_a_token_at_minus_infinity_is_never_drawn():
    logits = np.full(40, -np.inf, np.float32)
    logits[[7, 30]] = 1
    for params in (SamplingParams(), SamplingParams(top_k=10), SamplingParams(top_p=0.99), SamplingParams(min_p=0.1)):
        assert {sample(logits, params, i, 0, 0) for i in range(60)} == {7, 30}


def test_an_extreme_uniform_number_still_draws_a_possible_token(monkeypatch):
    logits = np.array([-np.inf, 0.1, 0.7, -np.inf], np.float32)
    for u, token in ((0.0, 1), (1 - 2.0**-53, 2), (1.0, 2)):
        monkeypatch.setattr(policy, "uniform", lambda *_, u=u: u)
        assert sample(logits, SamplingParams(), 0, 0, 0) == token


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_not_numbers_refuse_the_request(value, temperature):
    logits = some_logits(50)
    logits[13] = value
    for call in (
        lambda: sample(logits, SamplingParams(temperature=temperature, top_p=0.9), 0, 0, 0),
        lambda: sample(logits, SamplingParams(logit_bias={13: 1.0}), 0, 0, 0),
        lambda: token_logprob(logits, 1, 3),
        lambda: policy.log_softmax(np.stack([some_logits(50), logits])),
    ):
        with pytest.raises(CheckpointError, match=f"they hold {value}"):
            call()
    with pytest.raises(CheckpointError, match="no token is possible"):
        sample(np.full(5, -np.inf, np.float32), SamplingParams(), 0, 0, 0)


def test_logit_bias_is_added():
    logits = np.array([1, 2, 3, 4], np.float32)
    assert sample(logits, SamplingParams(temperature=0, logit_bias={0: 3.5, 3: -0.5}), 0, 0, 0) == 0
    assert sample(logits, SamplingParams(temperature=0, logit_bias={0: 2.5, 3: -0.5}), 0, 0, 0) == 0
    assert sample(logits, SamplingParams(temperature=0, logit_bias={0: 2.4, 3: -0.5}), 0, 0, 0) == 3


def penalised_by_formula(logits, params, prompt, generated):
    x = [float(v) for v in logits]
    for token, bias in (params.logit_bias or {}).items():
        x[token] += bias
    for token in {*prompt, *generated}:
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    for token, count in collections.Counter(generated).items():
        x[token] -= params.presence_penalty + params.frequency_penalty * count
    return x


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.5},
        {"repetition_penalty": 0.7},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.4},
        {"frequency_penalty": -0.4, "presence_penalty": -1.0},
        {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.2, "logit_bias": {1: 2.0, 4: -3.0}},
    ],
    ids=str,
)
def test_penalties_follow_their_formula_as_the_text_grows(options):
    params = SamplingParams(temperature=0, **options)
    prompt, generated = [0, 3, 3, 7], []
    history = history_for(params, prompt, 10)
    for step in range(40):
        logits = some_logits(10, step, 1.0)
        expected = penalised_by_formula(logits, params, prompt, generated)
        token = sample(logits, params, 0, 0, step, history=history)
        assert token == int(np.argmax(expected))
        generated.append(token)
        history.append(token)


def test_a_history_is_kept_only_where_a_penalty_is_on():
    assert history_for(SamplingParams(logit_bias={1: 1}, min_tokens=3), [1], 10) is None
    assert isinstance(history_for(SamplingParams(presence_penalty=1), [], 10), History)
    with pytest.raises(ValueError, match="history"):
        sample(some_logits(10), SamplingParams(presence_penalty=1), 0, 0, 0)


def test_no_end_of_sequence_before_min_tokens():
    logits = np.array([0, 1, 9, 8], np.float32)
    params = SamplingParams(temperature=0, min_tokens=2)
    assert [sample(logits, params, 0, 0, i, eos_ids=(2, 3)) for i in range(4)] == [1, 1, 2, 2]
    assert [sample(logits, SamplingParams(min_tokens=2), 5, 0, i, eos_ids={2, 3}) < 2 for i in range(2)] == [True] * 2


def test_the_callers_logits_are_left_as_they_are():
    logits = some_logits(100)
    before = logits.copy()
    logits.setflags(write=False)
    params = SamplingParams(50, 0.7, 20, 0.9, 0.01, logit_bias={1: 1}, repetition_penalty=1.2, min_tokens=5)
    sample(logits, params, 0, 0, 0, eos_ids=[2], history=History([1], 100))
    token_logprob(logits, 0, 5)
    policy.log_softmax(logits)
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize("scale", [0.1, 5.0, 1000.0])
def test_logprobs_are_those_of_the_raw_logits(scale):
    logits = some_logits(500, 3, scale)
    reference = torch.tensor(logits, dtype=torch.float64).log_softmax(-1)
    own, top = token_logprob(logits, 17, 20)
    assert own == pytest.approx(reference[17].item(), abs=1e-9)
    values, ids = reference.topk(20)
    assert [i for i, _ in top] == ids.tolist()
    assert [v for _, v in top] == pytest.approx(values.tolist(), abs=1e-9)
    assert token_logprob(logits, 17, 0) == (own, [])
    assert len(token_logprob(logits[:5], 0, 20)[1]) == 5
    rows = policy.log_softmax(np.stack([logits, logits[::-1]]))
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows[0], reference, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(rows[1], reference.numpy()[::-1], rtol=1e-6, atol=1e-5)


# Constraints


class Only(list):
    """The ids that are allowed, of `size`. tells: whether it knows without being asked for all if there is but one."""

    tells, ready, size = False, False, 40

    def only(self):
        return self[0] if self.tells and len(self) == 1 else None

    def mask(self):
        return Mask(np.packbits(np.isin(np.arange(self.size), self), bitorder="little").tobytes(), self.size)


@given(
    logits=st.lists(st.sampled_from([-np.inf, -3.0, 0.0, 0.5, 1.0, 2.0]), min_size=7, max_size=7),
    allowed=st.lists(st.booleans(), min_size=7, max_size=7),
    temperature=st.sampled_from([0, 0.7, 2]),
    seed=st.integers(0, 5),
    tells=st.booleans(),
    ready=st.booleans(),
)
def test_what_is_not_allowed_is_as_if_its_logit_were_minus_infinity(logits, allowed, temperature, seed, tells, ready):
    row, may = np.array(logits, np.float32), Only(i for i in range(7) if allowed[i])
    may.tells, may.ready, may.size = tells, ready, 7
    params = SamplingParams(temperature=temperature, logit_bias={1: 3.0}, top_k=2, repetition_penalty=1.3)
    lowered = np.array([x if ok else -np.inf for x, ok in zip(logits, allowed, strict=True)], np.float32)
    if not np.isfinite(lowered).any():
        with pytest.raises(CheckpointError):
            sample(row, params, seed, 0, 0, (), history_for(params, [2], 7), may)
        return
    token = sample(row, params, seed, 0, 0, (), history_for(params, [2], 7), may)
    assert token == sample(lowered, params, seed, 0, 0, (), history_for(params, [2], 7))
    assert allowed[token]


@pytest.mark.parametrize("allowed", [range(40), range(1, 40), range(3, 40), range(5, 40), [7]])
def test_however_many_are_allowed_the_draw_is_among_them(allowed):
    row = np.linspace(4, 0, 40, dtype=np.float32)
    lowered = np.where(np.isin(np.arange(40), allowed), row, -np.inf).astype(np.float32)
    for params in (SamplingParams(temperature=t, top_k=k, top_p=p) for t in (0, 1.5) for k in (0, 5) for p in (0.7, 1)):
        for seed in range(20):
            assert sample(row, params, seed, 0, 0, (), None, Only(allowed)) == sample(lowered, params, seed, 0, 0)


def test_a_logit_that_is_no_number_is_told_under_a_constraint_too():
    row = np.array([0, np.nan, 1], np.float32)
    with pytest.raises(CheckpointError, match="nan"):
        sample(row, SamplingParams(temperature=0), 0, 0, 0, allowed=Only([0, 2]))


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**31), st.integers(0, 2**40))
def test_numbers_are_those_of_numpys_philox(seed, sample, index):
    generator = np.random.Philox(counter=index << 64, key=sample << 64 | seed % 2**64)
    assert uniform(seed, sample, index) == (int(generator.random_raw()) >> 11) * 2.0**-53


@pytest.mark.parametrize("count", [3, 200])
def test_numbers_of_many_are_those_of_numpys_philox_too(count):
    rng = np.random.default_rng(count)
    seeds, samples = rng.integers(-(2**63), 2**63, count), rng.integers(0, 128, count)
    indices = rng.integers(0, 2**31, count)
    expected = []
    for seed, sample_index, index in zip(seeds.tolist(), samples.tolist(), indices.tolist(), strict=True):
        generator = np.random.Philox(key=(sample_index << 64) + seed % 2**64, counter=index << 64)
        expected.append((int(generator.random_raw()) >> 11) * 2.0**-53)
    assert uniforms(seeds.tolist(), samples.tolist(), indices.tolist()).tolist() == expected
