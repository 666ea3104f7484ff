"""How one token is chosen from one row of logits. The order of the steps is fixed here.

1. The row of raw logits. What is reported as a token's logprob is the natural-log softmax of this row, so it does
   not depend on any parameter (`token_logprob`). NaN or +inf refuses the request; -inf is a token that cannot come.
2. `logit_bias` is added.
3. Penalties. Repetition, over every token of the prompt and of the generated text: a positive logit is divided by
   it, a negative one multiplied (Keskar et al. 2019, section 4.1, in the form that leaves the sign alone). Then
   presence (once) and frequency (once for each time), over generated tokens only, are subtracted.
4. End-of-sequence ids are -inf while fewer than `min_tokens` tokens have been generated, and always so are tokens that
   a constraint does not allow. (Where the likeliest are asked for one by one, the others need no mask.)
5. Temperature 0: the largest logit, the lowest id on ties. Else the logits are divided by the temperature.
6. top-k: exactly the k largest stay, the lowest ids on ties.
7. top-p, over the survivors renormalised: in falling order, a token goes if the mass before it is over top_p.
8. min-p, over the survivors renormalised: a token goes if it is below min_p times the largest.
9. One uniform number in [0, 1) picks from the survivors by inverse CDF, in order of their ids. It is a function of
   (seed, sample, index) alone, so a sequence's tokens do not depend on what else is in the batch.

Everything after step 1 is in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from maestrale.errors import CheckpointError
from maestrale.sampling.mask import Mask
from maestrale.sampling.params import SamplingParams

_MASK, _HALF = 2**64 - 1, 2**32 - 1
_MANY = 64  # numbers from which numpy is the faster
_BLOCK = 256  # weights that are summed at once


class History:
    """Which tokens a sequence holds, kept up as it grows, for the penalties.

    seen: bool [vocab], tokens of the prompt or generated. counts: int64 [vocab], how often each was generated.
    """

    def __init__(self, prompt_ids: Sequence[int], vocab_size: int):
        self.seen = np.zeros(vocab_size, np.bool_)
        self.seen[np.asarray(prompt_ids, np.int64)] = True
        self.counts = np.zeros(vocab_size, np.int64)

    def append(self, token: int) -> None:
        self.seen[token] = True
        self.counts[token] += 1


class Allowed(Protocol):
    """The tokens that may come next. To ask for one of them is cheap, for all is not."""

    def only(self) -> int | None:
        """The one that must come, where that is known without asking for all."""
        ...

    def __contains__(self, token: int) -> bool: ...

    @property
    def ready(self) -> bool:
        """Whether all of them have been worked out."""
        ...

    def mask(self) -> Mask:
        """All of them."""
        ...


def history_for(params: SamplingParams, prompt_ids: Sequence[int], vocab_size: int) -> History | None:
    """A History where `params` has a penalty on, else None: what `sample` takes."""
    return History(prompt_ids, vocab_size) if _penalises(params) else None


def sample(
    logits: NDArray[np.float32],
    params: SamplingParams,
    seed: int,
    sample_index: int,
    index: int,
    eos_ids: Iterable[int] = (),
    history: History | None = None,
    allowed: Allowed | None = None,
) -> int:
    """The next token of one sequence, from its row of logits.

    logits: float32 [vocab], left as it is. seed: the request's, or one the engine chose where `params.seed` is None.
    sample_index: which of the request's n. index: how many tokens this sample has generated so far.
    eos_ids: ids that `min_tokens` holds back. history: from `history_for`, needed where a penalty is on.
    allowed: the tokens that a constraint allows; None where there is none.
    Raises CheckpointError where the logits hold NaN or +inf, or where no token is possible.
    """
    x: NDArray = logits
    if params.logit_bias:
        x = x.astype(np.float64)
        for token, bias in params.logit_bias.items():
            x[token] += bias
    if _penalises(params):
        if history is None:
            raise ValueError("penalties need a history: see history_for")
        x = _penalised(x.astype(np.float64), params, history)
    if index < params.min_tokens:
        x = x.astype(np.float64)
        x[list(eos_ids)] = -np.inf
    best, ids = int(x.argmax()), None
    _check_peak(x[best])
    if allowed is not None:
        if (only := allowed.only()) is not None:
            _check_peak(x[only])
            return only
        if params.temperature == 0:
            return _likeliest(x, best, allowed)
        ids, x, best = _best_of(x, best, allowed)
    if params.temperature != 0:
        best = _draw(x, float(x[best]), params, uniform(seed, sample_index, index))
    return best if ids is None else int(ids[best])


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Natural-log probabilities along the last axis: float32 [..., vocab] → float32 [..., vocab].

    Raises CheckpointError where a row holds NaN or +inf, or nothing above -inf.
    """
    peaks = logits.max(axis=-1, keepdims=True)
    if not np.isfinite(peaks).all():
        _check_peak(float(peaks[~np.isfinite(peaks)][0]))
    shifted = logits - peaks
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)).astype(np.float32)


def token_logprob(logits: NDArray[np.float32], token: int, top: int) -> tuple[float, list[tuple[int, float]]]:
    """Natural-log probability of `token` under raw logits (float32 [vocab]), and the `top` likeliest (id, logprob).

    The likeliest come first, the lower id on ties. Raises CheckpointError where the logits hold NaN or +inf.
    """
    peak = float(logits.max())
    _check_peak(peak)
    shifted = logits.astype(np.float64)
    shifted -= peak
    log_total = np.log(np.exp(shifted).sum())
    ids = largest(shifted, top).tolist() if top else []
    return float(shifted[token] - log_total), [(i, float(shifted[i] - log_total)) for i in ids]


def uniform(seed: int, sample: int, index: int) -> float:
    """A number in [0, 1), uniform over its three arguments: Philox keyed by (seed, sample), counting by index.

    seed: int64. The 53 bits are the top of the generator's first word (Salmon et al. 2011, "Parallel random numbers").
    """
    return (_philox(index & _MASK, seed & _MASK, sample & _MASK, _wide) >> 11) * 2.0**-53


def uniforms(seeds: Sequence[int], samples: Sequence[int], indices: Sequence[int]) -> NDArray[np.float64]:
    """`uniform` of many: in numpy, where they are more than a few, at a fifth of the time (256)."""
    if len(seeds) < _MANY:
        return np.array([uniform(*one) for one in zip(seeds, samples, indices, strict=True)])
    s, n, i = (np.array(column, np.int64).view(np.uint64) for column in (seeds, samples, indices))
    return (_philox(i, s, n, _wide_arrays) >> 11) * 2.0**-53


def _philox(index: Any, k: Any, m: Any, wide: Callable[[Any, int], tuple[Any, Any]]) -> Any:
    """The first word of Philox-4x64-10, counter (1, index, 0, 0), key (k, m): ten rounds of two products. As
    np.random's, whose import takes longer than the first token of a small model. Of ints or of arrays of uint64, as
    `wide` is: two words' product, its high word first."""
    a, b, c, d = index * 0 + 1, index, index * 0, index * 0
    for _ in range(10):
        (p_high, p), (q_high, q) = wide(a, 0xD2E7470EE14C6C93), wide(c, 0xCA5A826395121157)
        a, b, c, d = q_high ^ b ^ k, q, p_high ^ d ^ m, p
        k, m = (k + 0x9E3779B97F4A7C15) & _MASK, (m + 0xBB67AE8584CAA73B) & _MASK
    return a


def _wide(a: int, b: int) -> tuple[int, int]:
    return (a * b) >> 64, (a * b) & _MASK


def _wide_arrays(a: NDArray[np.uint64], b: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """By halves: no sum of them passes 64 bits."""
    low, high, b_low, b_high = a & _HALF, a >> 32, b & _HALF, b >> 32
    middle = high * b_low + (low * b_low >> 32)
    other = low * b_high + (middle & _HALF)
    return high * b_high + (middle >> 32) + (other >> 32), a * b


def largest(x: NDArray, count: int) -> NDArray[np.int64]:
    """Indices of the `count` largest of a vector, the largest first, the lower index on ties."""
    ids = _largest_ascending(x, count)
    return ids[np.argsort(-x[ids], kind="stable")]


def _largest_ascending(x: NDArray, count: int) -> NDArray[np.int64]:
    if count >= x.size:
        return np.arange(x.size)
    return _from_threshold(x, np.partition(x, x.size - count)[x.size - count], count)


def _from_threshold(x: NDArray, threshold: float, count: int) -> NDArray[np.int64]:
    """Ascending indices of the `count` largest, whose smallest value is `threshold`; the lower index on ties."""
    ids = np.flatnonzero(x >= threshold)
    if ids.size == count:
        return ids
    ties = np.flatnonzero(x[ids] == threshold)
    return np.delete(ids, ties[count - ids.size :])


_TRIES = 8  # tokens asked for one by one, at 5 us each, before all are worked out, at 10 to 100


def _likeliest(x: NDArray, best: int, allowed: Allowed) -> int:
    """The token of the largest logit that is allowed, the lowest id on ties. best: that of the largest of all."""
    if best in allowed:
        return best
    x = x.copy()
    for _ in range(0 if allowed.ready else _TRIES - 1):
        x[best] = -np.inf
        best = int(x.argmax())
        _check_peak(x[best])
        if best in allowed:
            return best
    ids, x, best = _best_of(x, best, allowed)
    return best if ids is None else int(ids[best])


def _best_of(x: NDArray, best: int, allowed: Allowed) -> tuple[NDArray[np.int64] | None, NDArray, int]:
    """The survivors of `Mask`, and where the largest logit lies among them. best: where it lies among all."""
    mask = allowed.mask()
    ids, x = mask.survivors(x)
    if ids is None and best in mask:
        return ids, x, best
    best = int(x.argmax()) if x.size else 0
    _check_peak(x[best] if x.size else -np.inf)
    return ids, x, best


def _penalises(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0


def _penalised(x: NDArray[np.float64], params: SamplingParams, history: History) -> NDArray[np.float64]:
    if params.repetition_penalty != 1:
        with np.errstate(over="ignore"):  # a penalty next to 0
            seen = x[history.seen]
            x[history.seen] = np.where(seen > 0, seen / params.repetition_penalty, seen * params.repetition_penalty)
    x -= params.presence_penalty * (history.counts > 0)
    x -= params.frequency_penalty * history.counts
    return x


def _draw(x: NDArray, peak: float, params: SamplingParams, number: float) -> int:
    """Steps 5 to 9 at a temperature above 0. `ids` are the survivors, None while all survive; `p` their weights."""
    ids = _largest_ascending(x, params.top_k) if params.top_k else None
    p = (x if ids is None else x[ids]).astype(np.float64)
    p -= peak  # first, so that a tiny temperature cannot give NaN
    with np.errstate(over="ignore"):
        p /= params.temperature
    np.exp(p, out=p)
    if params.top_p < 1:
        kept = _nucleus(p, params.top_p)
        ids, p = (kept if ids is None else ids[kept]), p[kept]
    if params.min_p > 0:
        kept = np.flatnonzero(p >= params.min_p)  # the largest weight is exp(0) = 1
        ids, p = (kept if ids is None else ids[kept]), p[kept]
    place = _place(p, number)
    return place if ids is None else int(ids[place])


def _place(p: NDArray[np.float64], number: float) -> int:
    """Where the weights up to and with it first exceed the share `number` of all: first the block, then the place in
    it, since one running sum over all takes ten times as long."""
    ends = np.add.reduceat(p, np.arange(0, p.size, _BLOCK)).cumsum()
    target = number * ends[-1]
    block = _first_above(ends, target)
    cdf = p[block * _BLOCK : (block + 1) * _BLOCK].cumsum()
    return block * _BLOCK + _first_above(cdf, target - ends[block - 1] if block else target)


def _first_above(cdf: NDArray[np.float64], target: float) -> int:
    """Rounding may put the target on the total itself, or above: then the last place of any weight is meant."""
    return int(min(np.searchsorted(cdf, target, side="right"), np.searchsorted(cdf, cdf[-1])))


def _nucleus(p: NDArray[np.float64], top_p: float) -> NDArray[np.int64]:
    """Ascending indices of the weights before which no more than `top_p` of the mass lies, in falling order."""
    total = p.sum()
    # All weights below (1 - top_p) / size together weigh less than 1 - top_p, so none survives: no need to sort them.
    values = np.sort(p[p >= 0.99 * (1 - top_p) * total / p.size])[::-1]
    count = 1 + int(np.searchsorted(values.cumsum()[:-1], top_p * total, side="right"))
    return _from_threshold(p, values[count - 1], count)


def _check_peak(peak: float) -> None:
    if not math.isfinite(peak):
        what = "no token is possible: all are -inf" if peak == -np.inf else f"they hold {peak}"
        raise CheckpointError(
            f"logits: expected finite numbers or -inf, but {what}; the model or its weights are damaged"
        )
