"""The mixture's feed-forward in four kernels: route, the two products over tokens grouped by expert, and the sum.

`_route` sorts nothing: a token meets an expert at most once, so where a token stands among an expert's is a running
count down one column. A tile is up to ROWS tokens of one expert; an expert that nobody chose has none, and its weights
are never read. Nothing is added atomically: each (token, expert) has a row of its own, and `_sum` adds a token's rows
in the order of their experts (N5).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from maestrale.torch_backend.triton.ahead import LAUNCH, begin, wait
from maestrale.torch_backend.triton.dot import dot

if TYPE_CHECKING:
    from maestrale.torch_backend.triton.packed_experts import PackedStack

ROUTED = 256  # tokens that one program routes; more are routed by the same formula in torch


@triton.jit
def _route(
    scores, tokens, weights, places, counts, T, E,
    K: tl.constexpr, TOKENS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """One program. scores [T, E] → what `group` says."""
    begin()
    wait()
    t, e = tl.arange(0, TOKENS), tl.arange(0, EXPERTS)
    real = (t < T)[:, None] & (e < E)[None, :]
    score = tl.load(scores + t[:, None] * E + e[None, :], mask=real, other=-float("inf")).to(tl.float32)
    # Whatever the scores, NaN too, K different experts are chosen: nobody else may be hit by one token's damage.
    order = tl.where(score > -3e38, score, tl.where(real, -3e38, -float("inf")))
    chosen = tl.zeros([TOKENS, EXPERTS], tl.int32)
    for _ in tl.static_range(K):  # N5: of equal scores the lower expert
        best = tl.argmax(tl.where(chosen > 0, -float("inf"), order), 1, tie_break_left=True)
        chosen = tl.where(real & (e[None, :] == best[:, None]), 1, chosen)
    peak = tl.where(t < T, tl.max(order, 1), 0.0)
    power = tl.where(chosen > 0, tl.exp(score - peak[:, None]), 0.0)
    weight = power / tl.where(t < T, tl.sum(power, 1), 1.0)[:, None]
    count = tl.sum(chosen, 0)
    place = tl.cumsum(chosen, 0) - 1 + (tl.cumsum(count, 0) - count)[None, :]
    nth = tl.cumsum(chosen, 1) - 1
    tl.store(tokens + place, tl.broadcast_to(t[:, None], [TOKENS, EXPERTS]), mask=chosen > 0)
    tl.store(weights + place, weight, mask=chosen > 0)
    tl.store(places + t[:, None] * K + nth, place, mask=chosen > 0)
    tl.store(counts + e, count, mask=e < E)


@triton.jit
def tile_of(counts, E, EXPERTS: tl.constexpr, ROWS: tl.constexpr):
    """The expert of this program's tile, its first pair and the pair after its last; an expert of E where there is no
    such tile."""
    e = tl.arange(0, EXPERTS)
    count = tl.load(counts + e, mask=e < E, other=0)
    n_tiles = (count + ROWS - 1) // ROWS
    ends = tl.cumsum(n_tiles, 0)
    tile = tl.program_id(1)
    expert = tl.sum((ends <= tile).to(tl.int32), 0)
    before = tl.sum(tl.where(e < expert, count, 0), 0)
    tiles_before = tl.sum(tl.where(e < expert, n_tiles, 0), 0)
    first = before + (tile - tiles_before) * ROWS
    last = before + tl.sum(tl.where(e == expert, count, 0), 0)
    expert = tl.where(tile < tl.sum(n_tiles, 0), expert, E)
    return expert, first, last


@triton.jit
def gated(one, three, dtype: tl.constexpr):
    """silu(one) * three of fp32 sums, rounded where the layers' own outputs would be."""
    one, three = one.to(dtype).to(tl.float32), three.to(dtype).to(tl.float32)
    return ((one / (1 + tl.exp(-one))).to(dtype).to(tl.float32) * three).to(dtype)


@triton.jit
def weighed(sums, weight, dtype: tl.constexpr):
    """Likewise the sums [ROWS, OUT] times the router's weight [ROWS]."""
    return (sums.to(dtype).to(tl.float32) * weight.to(dtype).to(tl.float32)[:, None]).to(dtype)


@triton.jit
def _up(
    x, w13, h, tokens, counts, E, D, F,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr,
):  # fmt: skip
    """Program (outputs, tile): h [pairs, F] = silu(x w1^T) * (x w3^T). w13 [E, 2, F, D]."""
    begin()
    wait()
    expert, first, last = tile_of(counts, E, EXPERTS, ROWS)
    if expert < E:
        pair, f, d = first + tl.arange(0, ROWS), tl.program_id(0) * OUT + tl.arange(0, OUT), tl.arange(0, IN)
        token = tl.load(tokens + pair, mask=pair < last, other=0).to(tl.int64)
        at_x = x + token[:, None] * D + d[None, :]
        at_1 = w13 + expert.to(tl.int64) * 2 * F * D + f.to(tl.int64)[None, :] * D + d[:, None]
        at_3 = at_1 + F * D
        one = tl.zeros([ROWS, OUT], tl.float32)
        three = tl.zeros([ROWS, OUT], tl.float32)
        for start in range(0, D, IN):
            inside = d < D - start
            x_RD = tl.load(at_x + start, mask=(pair < last)[:, None] & inside[None, :], other=0.0)
            there = inside[:, None] & (f < F)[None, :]
            one += dot(x_RD, tl.load(at_1 + start, mask=there, other=0.0))
            three += dot(x_RD, tl.load(at_3 + start, mask=there, other=0.0))
        at_h = h + pair.to(tl.int64)[:, None] * F + f[None, :]
        tl.store(at_h, gated(one, three, h.dtype.element_ty), mask=(pair < last)[:, None] & (f < F)[None, :])


@triton.jit
def _down(
    h, w2, y, weights, counts, E, D, F,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr,
):  # fmt: skip
    """Program (outputs, tile): y [pairs, D] = weight * (h w2^T), rounded as the layer's and the product's would be."""
    begin()
    wait()
    expert, first, last = tile_of(counts, E, EXPERTS, ROWS)
    if expert < E:
        pair, d, f = first + tl.arange(0, ROWS), tl.program_id(0) * OUT + tl.arange(0, OUT), tl.arange(0, IN)
        at_h = h + pair.to(tl.int64)[:, None] * F + f[None, :]
        at_w = w2 + expert.to(tl.int64) * D * F + d.to(tl.int64)[None, :] * F + f[:, None]
        sums = tl.zeros([ROWS, OUT], tl.float32)
        for start in range(0, F, IN):
            inside = f < F - start
            h_RF = tl.load(at_h + start, mask=(pair < last)[:, None] & inside[None, :], other=0.0)
            sums += dot(h_RF, tl.load(at_w + start, mask=inside[:, None] & (d < D)[None, :], other=0.0))
        part = weighed(sums, tl.load(weights + pair, mask=pair < last, other=0.0), y.dtype.element_ty)
        at_y = y + pair.to(tl.int64)[:, None] * D + d[None, :]
        tl.store(at_y, part, mask=(pair < last)[:, None] & (d < D)[None, :])


@triton.jit
def _sum(pairs, places, y, D, K: tl.constexpr, WIDTH: tl.constexpr):
    """Program (token, outputs): the rows of a token's experts, added in ascending order of the experts."""
    begin()
    wait()
    t, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.float32)
    for k in tl.static_range(K):
        place = tl.load(places + t * K + k).to(tl.int64)
        part = tl.load(pairs + place * D + d, mask=d < D, other=0.0).to(tl.float32)
        total = (total + part).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + t * D + d, total.to(y.dtype.element_ty), mask=d < D)


Grouped = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def group(scores_TE: torch.Tensor, n_chosen: int) -> Grouped:
    """Router scores → (tokens, weights, places, counts), int32 and fp32: pairs of token and expert, expert after
    expert, tokens ascending.

    tokens, weights [T * K]: of each pair. places [T, K]: of a token's pairs, experts ascending. counts [E].
    """
    T, E = scores_TE.shape
    if T > ROUTED:
        return group_many(scores_TE, n_chosen)
    tokens = torch.empty(T * n_chosen, dtype=torch.int32, device=scores_TE.device)
    weights = torch.empty_like(tokens, dtype=torch.float32)
    places, counts = tokens.new_empty(T, n_chosen), tokens.new_empty(E)
    _route[(1,)](
        scores_TE, tokens, weights, places, counts, T, E,
        K=n_chosen, TOKENS=max(2, triton.next_power_of_2(T)), EXPERTS=max(2, triton.next_power_of_2(E)),
        **LAUNCH,
    )  # fmt: skip
    return tokens, weights, places, counts


def group_many(scores_TE: torch.Tensor, n_chosen: int) -> Grouped:
    """As `group`, by operations of torch."""
    sorted_TE, order_TE = scores_TE.sort(dim=-1, descending=True, stable=True)
    weight_TE = torch.zeros_like(scores_TE, dtype=torch.float32)
    weight_TE.scatter_(1, order_TE[:, :n_chosen], torch.softmax(sorted_TE[:, :n_chosen].float(), dim=-1))
    chosen_TE = torch.zeros_like(scores_TE, dtype=torch.int32).scatter_(1, order_TE[:, :n_chosen], 1)
    counts_E = chosen_TE.sum(0)
    place_TE = chosen_TE.cumsum(0) - 1 + (counts_E.cumsum(0) - counts_E)
    # Row by row the chosen experts ascend; a fixed number of them, so no size is asked of the device.
    experts_TK = order_TE[:, :n_chosen].sort(dim=-1).values
    places_TK = place_TE.gather(1, experts_TK)
    tokens_TK = torch.arange(len(scores_TE), device=scores_TE.device).unsqueeze(1).expand_as(places_TK)
    tokens, weights = torch.empty_like(places_TK).flatten(), torch.empty_like(places_TK, dtype=torch.float32).flatten()
    tokens.scatter_(0, places_TK.flatten(), tokens_TK.flatten())
    weights.scatter_(0, places_TK.flatten(), weight_TE.gather(1, experts_TK).flatten())
    return tokens.int(), weights, places_TK.int(), counts_E.int()


def experts(
    x_TD: torch.Tensor, w13: torch.Tensor | PackedStack, w2: torch.Tensor | PackedStack, grouped: Grouped
) -> torch.Tensor:
    """Σ over a token's experts of weight * w2(silu(w1 x) * w3 x), y_TD. w13 [E, 2, F, D], w2 [E, D, F], or packed."""
    tokens, weights, places, counts = grouped
    (T, D), E, pairs = x_TD.shape, len(counts), len(tokens)
    # As many rows as an expert may well have, so that its weights are read once; at least what a matrix unit takes.
    rows = max(16, triton.next_power_of_2(-(-2 * pairs // E)))
    if isinstance(w13, torch.Tensor):
        h = _whole_up(x_TD, w13, tokens, counts, rows)
    else:
        h = w13.up(x_TD, tokens, counts, rows)
    if isinstance(w2, torch.Tensor):
        y_pairs = _whole_down(h, w2, weights, counts, rows)
    else:
        y_pairs = w2.down(h, weights, counts, rows)
    y_TD, width = torch.empty_like(x_TD), min(1024, triton.next_power_of_2(D))
    _sum[(T, triton.cdiv(D, width))](y_pairs, places, y_TD, D, K=places.shape[1], WIDTH=width, **LAUNCH)
    return y_TD


def n_tiles(pairs: int, n_experts: int, rows: int) -> int:
    """At most: each expert has one that is not full."""
    return pairs // rows + min(n_experts, pairs)


def _launch(n_experts: int, rows: int) -> dict[str, Any]:
    few = rows <= 32
    shape = {"EXPERTS": max(2, triton.next_power_of_2(n_experts)), "ROWS": rows, "IN": 128 if few else 64}
    return shape | {"num_warps": 4 if few else 8, "num_stages": 4 if few else 3} | LAUNCH


def _whole_up(
    x_TD: torch.Tensor, w13: torch.Tensor, tokens: torch.Tensor, counts: torch.Tensor, rows: int
) -> torch.Tensor:
    (E, _, F, D), pairs, rows = w13.shape, len(tokens), min(rows, 128 if x_TD.element_size() == 2 else 32)
    h, out = x_TD.new_empty(pairs, F), 32 if rows <= 32 else 64
    grid = (triton.cdiv(F, out), n_tiles(pairs, E, rows))
    _up[grid](x_TD, w13, h, tokens, counts, E, D, F, OUT=out, **_launch(E, rows))
    return h


def _whole_down(
    h: torch.Tensor, w2: torch.Tensor, weights: torch.Tensor, counts: torch.Tensor, rows: int
) -> torch.Tensor:
    (E, D, F), pairs, rows = w2.shape, len(weights), min(rows, 128 if h.element_size() == 2 else 32)
    y_pairs, out = h.new_empty(pairs, D), 32 if rows <= 32 else 128
    grid = (triton.cdiv(D, out), n_tiles(pairs, E, rows))
    _down[grid](h, w2, y_pairs, weights, counts, E, D, F, OUT=out, **_launch(E, rows))
    return y_pairs
