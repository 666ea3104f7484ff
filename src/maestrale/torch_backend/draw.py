"""Tokens drawn where the logits are: sampling/policy.py once more, in torch's operations over many rows at once.

Steps 2 and 4 to 9 of its order, in float64 as there; the uniform numbers come with the batch. It takes the same token,
ties included, but that sums are added in another order: where a token's edge lies within a rounding of float64 of the
number drawn, one draw in about 10^12, it may take the neighbour.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from maestrale.batch import Draws, StepOutput
from maestrale.torch_backend.staging import put

_BLOCK = 1 << 23  # logits that are drawn from together: some temporaries of 64 MiB


class DeviceRows:
    """Rows of logits that come to the host when they are asked for."""

    def __init__(self, logits_NV: torch.Tensor):
        self._logits_NV = logits_NV

    def __getitem__(self, rows: Any, /) -> NDArray[np.float32]:
        return to_host(self._logits_NV[rows])


class Drawer:
    """Answers steps, and keeps the tokens of the last one where they were drawn, for the next step to go on from."""

    def __init__(self) -> None:
        self._tokens_N = torch.empty(0, dtype=torch.int64)

    def follow(self, ids_T: torch.Tensor, follows: NDArray[np.int64] | None) -> torch.Tensor:
        """Token ids, into which it writes those that follow the last step (Batch.follows). Where nothing could be drawn
        it is token 0: that request fails when the step is read."""
        if follows is not None:
            place, row = put(follows.T, ids_T.device)
            ids_T.index_copy_(0, place, self._tokens_N[row].clamp(min=0).to(ids_T.dtype))
        return ids_T

    def answer(
        self, logits_NV: torch.Tensor, draws: Draws | None, experts: NDArray[np.int16] | None = None
    ) -> Callable[[], StepOutput]:
        """What waits for a step's output: all rows of logits, or the tokens drawn of them."""
        if draws is None:
            return partial(StepOutput, to_host(logits_NV), experts)
        self._tokens_N = draw(logits_NV, draws)
        tokens = to_host_later(self._tokens_N)
        return lambda: StepOutput(DeviceRows(logits_NV), experts, tokens())


def draw(logits_NV: torch.Tensor, draws: Draws) -> torch.Tensor:
    """A token of each row, int64 [N]; -1 of those that are not to be drawn from, or cannot be: NaN, +inf, all -inf.
    The host does not wait for it."""
    temperature, device = draws.rows[:, 0], logits_NV.device
    tokens_N = torch.full((len(temperature),), -1, device=device)
    biased = np.isin(np.arange(len(temperature)), draws.biases[:, 0])
    if (plain := ~np.isnan(temperature) & (temperature == 0) & ~biased).any():
        peak_N, best_N = logits_NV.max(-1)  # of equal ones the first
        drawn_N = peak_N.isfinite() if plain.all() else put(plain, device) & peak_N.isfinite()
        tokens_N = torch.where(drawn_N, best_N, -1)
    rest = np.flatnonzero(~np.isnan(temperature) & ~plain)
    together = max(1, _BLOCK // logits_NV.shape[1])
    for start in range(0, len(rest), together):
        rows = rest[start : start + together]
        rows_N = put(rows, device)
        x_NV = logits_NV[rows_N].double()
        biases = draws.biases[np.isin(draws.biases[:, 0], rows)]
        if len(biases):
            at = np.stack([np.searchsorted(rows, biases[:, 0]), biases[:, 1].astype(np.int64)])
            x_NV.index_put_(tuple(put(at, device)), put(biases[:, 2], device), accumulate=True)
        tokens_N.index_copy_(0, rows_N, _choose(x_NV, draws.rows[rows]))
    return tokens_N


def _choose(x_NV: torch.Tensor, rows: NDArray[np.float64]) -> torch.Tensor:
    """rows: as Draws has them. A nucleus is found after one sort, of exact ranks after another: of equal ones the lower
    id is first, as both are stable."""
    temperature, number, top_k, top_p, min_p = put(rows.T, x_NV.device).unsqueeze(-1)
    peak_N1, best_N1 = x_NV.max(-1, keepdim=True)
    p_NV = ((x_NV - peak_N1) / torch.where(temperature > 0, temperature, 1)).exp()
    if rows[:, 2].any():
        nth_V = torch.arange(x_NV.shape[1], device=x_NV.device)
        order_NV = x_NV.argsort(dim=-1, descending=True, stable=True)
        p_NV = _keep(p_NV, order_NV, (nth_V < top_k) | (top_k == 0))
    if (rows[:, 3] < 1).any():
        falling_NV, order_NV = p_NV.sort(dim=-1, descending=True, stable=True)
        kept_NV = torch.ones_like(falling_NV, dtype=torch.bool)
        kept_NV[:, 1:] = falling_NV.cumsum(-1)[:, :-1] <= top_p * p_NV.sum(-1, keepdim=True)
        p_NV = _keep(p_NV, order_NV, kept_NV | (top_p >= 1))
    p_NV = p_NV * (p_NV >= min_p)
    cdf_NV = p_NV.cumsum(-1)
    total_N1 = cdf_NV[:, -1:]
    # Rounding may put the target on the total itself: then the last id of any weight is meant.
    hit_NV = (p_NV > 0) & ((cdf_NV > number * total_N1) | (cdf_NV >= total_N1))
    drawn_N1 = torch.where(hit_NV.any(-1, keepdim=True), hit_NV.byte().argmax(-1, keepdim=True), best_N1)
    return torch.where(peak_N1.isfinite(), torch.where(temperature > 0, drawn_N1, best_N1), -1).squeeze(-1)


def _keep(p_NV: torch.Tensor, order_NV: torch.Tensor, kept_NV: torch.Tensor) -> torch.Tensor:
    """p, and 0 for tokens that are not kept; order: the tokens that `kept` speaks of."""
    return p_NV * torch.empty_like(kept_NV).scatter_(1, order_NV, kept_NV)


def to_host(x: torch.Tensor) -> NDArray[Any]:
    return to_host_later(x)()


def to_host_later(x: torch.Tensor) -> Callable[[], NDArray[Any]]:
    """What waits until the values are on the host; they set out now."""
    if x.device.type == "cpu":
        return x.numpy
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)  # torch keeps such memory and hands it out again
    host.copy_(x, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(x.device))

    def wait() -> NDArray[Any]:
        arrived.synchronize()
        return host.numpy()

    return wait
