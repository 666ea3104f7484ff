"""Attention kernels against the reference, and the reference against its formula with plain loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maestrale.torch_backend.ops import reference, sdpa
from maestrale.torch_backend.ops.groups import Group

KERNELS = {"sdpa": sdpa.attend}


@st.composite
def problems(draw):
    """(q_THC, k_SGC, v_SGC, groups) in fp32: chunks and decoding sequences, in a cache whose other slots hold NaN."""
    seed, window = draw(st.integers(0, 1 << 30)), draw(st.none() | st.integers(1, 9))
    n_kv_heads, repeat, head_dim = draw(st.integers(1, 4)), draw(st.integers(1, 4)), 2 * draw(st.integers(1, 10))
    # A group: (queries of each sequence, the position of each one's last query).
    chunks = draw(st.lists(st.tuples(st.integers(2, 8), st.integers(0, 20)), max_size=3))
    decodes = draw(st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=4), max_size=2))
    shapes = [(n, [n - 1 + before]) for n, before in chunks] + [(1, lasts) for lasts in decodes] or [(1, [0])]
    make = torch.Generator().manual_seed(seed)
    n_rows, n_slots = sum(n * len(lasts) for n, lasts in shapes), 400
    free, rows = torch.randperm(n_slots, generator=make), torch.randperm(n_rows, generator=make)
    if len(shapes) == 1:
        rows = torch.arange(n_rows)  # as Group promises
    groups = []
    k = torch.full((n_slots, n_kv_heads, head_dim), math.nan)
    v = k.clone()
    for n, lasts in shapes:
        firsts = [0 if window is None else max(0, last - n + 1 - window + 1) for last in lasts]
        width = max(last - first + 1 for first, last in zip(firsts, lasts, strict=True))
        keys, mask = torch.zeros(len(lasts), width, dtype=torch.int64), torch.full((len(lasts), n, width), -math.inf)
        for b, (first, last) in enumerate(zip(firsts, lasts, strict=True)):
            kept = last - first + 1
            keys[b, :kept], free = free[:kept], free[kept:]
            keys[b, kept:] = keys[b, kept - 1]
            for i in range(n):
                query = last - n + 1 + i
                for j in range(kept):
                    if first + j <= query and (window is None or first + j > query - window):
                        mask[b, i, j] = 0
            k[keys[b]] = torch.randn(width, n_kv_heads, head_dim, generator=make)
            v[keys[b]] = torch.randn(width, n_kv_heads, head_dim, generator=make)
        groups.append(Group(rows[: n * len(lasts)].view(len(lasts), n), keys, mask))
        rows = rows[n * len(lasts) :]
    q = torch.randn(n_rows, n_kv_heads * repeat, head_dim, generator=make)
    return q, k, v, groups


def cast(problem, dtype):
    q, k, v, groups = problem
    return (
        *(x.to(dtype) for x in (q, k, v)),
        [Group(group.rows_BN, group.keys_BS, group.mask_BNS.to(dtype)) for group in groups],
    )


def by_the_formula(q, k, v, groups):
    """softmax(q k^T / sqrt(C)) v in double precision, a query and a head at a time, over the keys it sees alone."""
    y = torch.full(q.shape, math.nan, dtype=torch.float64)
    q, k, v = q.double(), k.double(), v.double()
    for group in groups:
        for b in range(group.rows_BN.shape[0]):
            for i, row in enumerate(group.rows_BN[b].tolist()):
                seen = group.keys_BS[b][group.mask_BNS[b, i] == 0]
                for head in range(q.shape[1]):
                    kv = head // (q.shape[1] // k.shape[1])
                    weights = torch.softmax(k[seen, kv] @ q[row, head] / math.sqrt(q.shape[2]), 0)
                    y[row, head] = weights @ v[seen, kv]
    return y


@settings(max_examples=40)
@given(problems())
def test_the_reference_is_the_formula(problem):
    torch.testing.assert_close(reference.attend(*problem).double(), by_the_formula(*problem), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", KERNELS)
@settings(max_examples=150)
@given(problems())
def test_a_kernel_gives_the_references_answer_in_fp32(name, problem):
    torch.testing.assert_close(KERNELS[name](*problem), reference.attend(*problem), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("dtype", "steps"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@settings(max_examples=60)
@given(problem=problems())
def test_a_kernel_is_off_by_a_rounding_or_two_in_half_precision(name, dtype, steps, problem):
    problem = cast(problem, dtype)
    expected, got = reference.attend(*problem), KERNELS[name](*problem)
    assert got.dtype == dtype
    # A weighted mean of values, each below about 4: weights and result are rounded once each.
    torch.testing.assert_close(got.float(), expected.float(), atol=8 * steps, rtol=4 * steps)
