"""A set of tokens, made ready to be laid on rows of logits again and again."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class Mask:
    """bits: a bit for each token, the first in the lowest of a byte. False where the set is empty."""

    __slots__ = ("_others", "_tokens", "bits")

    def __init__(self, bits: bytes, vocab_size: int):
        self.bits = bits
        among = np.unpackbits(np.frombuffer(bits, np.uint8), count=vocab_size, bitorder="little").view(np.bool_)
        # What follows is the faster the fewer they are. (Of many of -inf exp would be slow.)
        most = 10 * int(np.count_nonzero(among)) > 9 * vocab_size
        self._tokens = None if most else np.flatnonzero(among)
        self._others = np.flatnonzero(~among) if most else None

    def __contains__(self, token: int) -> bool:
        return bool(self.bits[token >> 3] >> (token & 7) & 1)

    def __bool__(self) -> bool:
        return self._tokens is None or self._tokens.size > 0

    def survivors(self, x: NDArray) -> tuple[NDArray[np.int64] | None, NDArray]:
        """The tokens of the set, ascending, and their logits out of [vocab]; or, where nine of ten are in it, None and
        all logits, -inf for the others, which is sooner made."""
        if self._tokens is not None:
            return self._tokens, x.take(self._tokens)
        x = x.copy()
        x[self._others] = -np.inf
        return None, x
