"""Beam search's bookkeeping for one request: which beams go on, which have finished, and when to stop.

The rules, which are those of Hugging Face's `generate` with `early_stopping=False`:

1. A beam's sum is the sum of its tokens' logprobs. A finished beam's score is sum / length ** length_penalty, where
   the length counts generated tokens, the end of sequence among them.
2. Each step ranks all one-token continuations of the live beams by their sums and keeps the best
   max(2, 1 + number of end-of-sequence ids) * width of them, so that `width` of them can always go on.
3. A continuation that ends (an end of sequence, or the last token that max_tokens allows) is finished if it ranks
   among the first `width`; ranked lower it is lost. The best `width` finished ones by score are kept.
4. The best `width` continuations that do not end are the next live beams.
5. The search is done at max_tokens, or once `width` beams are finished and the best live sum, divided by its present
   length ** length_penalty, is not above the worst finished score. (Above 0, a penalty may let a longer beam
   overtake later; the rule does not wait for that.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from maestrale.sampling.policy import largest


@dataclass(frozen=True)
class Hypothesis:
    """One finished beam. token_ids: without the end of sequence. finished: whether it reached one.

    score: sum of natural logprobs, the end of sequence's included, divided by length ** length_penalty.
    """

    token_ids: tuple[int, ...]
    score: float
    finished: bool


class BeamSearch:
    """`advance` takes the live beams' logprobs and says which row each next live beam continues, and with what.

    eos_ids: ids that end a sequence; none where a request ignores them. min_tokens: none of them before so many.
    A vocabulary smaller than 2 * width starts with fewer than `width` beams.
    """

    def __init__(
        self,
        width: int,
        max_tokens: int,
        eos_ids: Iterable[int] = (),
        length_penalty: float = 1.0,
        min_tokens: int = 0,
    ):
        self._width, self._max_tokens, self._min_tokens = width, max_tokens, min_tokens
        self._eos_ids = sorted(set(eos_ids))
        self._length_penalty = length_penalty
        self._length = 0
        self._live: list[tuple[int, ...]] = [()]
        self._sums = np.zeros(1)
        self._done = max_tokens == 0
        self._finished = [Hypothesis((), 0.0, False)] if self._done else []

    @property
    def done(self) -> bool:
        return self._done

    def results(self) -> list[Hypothesis]:
        """The finished beams so far, the best first, at most `width`."""
        return list(self._finished)

    def advance(self, logprobs: NDArray[np.float32]) -> list[tuple[int, int]]:
        """One step: float32 [live, vocab], from `log_softmax` → (parent row, token) of each next live beam.

        The first call has one row, the prompt's; each later one has a row for each pair of the last answer, in
        order. The answer has at most `width` pairs, the best first, and none once the search is done.
        """
        if self._done or logprobs.ndim != 2 or len(logprobs) != len(self._live):
            raise ValueError(f"expected {0 if self._done else len(self._live)} rows, got logprobs of {logprobs.shape}")
        sums = self._sums[:, None] + logprobs
        if self._length < self._min_tokens:
            sums[:, self._eos_ids] = -np.inf
        sums = sums.ravel()
        self._length += 1
        penalty = float(self._length) ** self._length_penalty
        last = self._length == self._max_tokens
        live: list[tuple[int, int]] = []
        live_sums: list[float] = []
        for rank, place in enumerate(largest(sums, max(2, 1 + len(self._eos_ids)) * self._width).tolist()):
            total = float(sums[place])
            if total == -np.inf:
                break
            parent, token = divmod(place, logprobs.shape[1])
            ends = token in self._eos_ids
            if (ends or last) and rank < self._width:
                ids = self._live[parent] if ends else (*self._live[parent], token)
                self._finished.append(Hypothesis(ids, total / penalty, ends))
            elif not ends and not last and len(live) < self._width:
                live.append((parent, token))
                live_sums.append(total)
        self._finished.sort(key=lambda hypothesis: -hypothesis.score)  # stable: the earlier stays first on ties
        del self._finished[self._width :]
        full = len(self._finished) == self._width
        self._done = not live or (full and live_sums[0] / penalty <= self._finished[-1].score)
        if self._done:
            return []
        self._live = [(*self._live[parent], token) for parent, token in live]
        self._sums = np.array(live_sums)
        return live
