"""Documents end to end in sequences of one length, nothing between them but their own boundaries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IGNORED = -100  # the label of a token that has no next one


@dataclass(frozen=True)
class Packed:
    """N sequences of L tokens, int32 [N, L] each; the last is filled up with padding.

    labels: the next token of the same document, `IGNORED` at its end and in padding. documents: the number of the
    document that a token belongs to, -1 for padding.
    """

    tokens: NDArray[np.int32]
    labels: NDArray[np.int32]
    documents: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.tokens)


def pack(documents: Iterable[Sequence[int]], seq_len: int) -> Packed:
    """Cuts the stream of documents (each with its BOS and EOS) every `seq_len` tokens.

    A document that goes on in the next sequence is continued there without a BOS, and the label of the last token
    here is the first token there, so no token goes unlearnt.
    """
    parts = [np.asarray(ids, np.int32) for ids in documents]
    stream = np.concatenate(parts)
    owner = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part) for part in parts])
    next_token = np.append(stream[1:], 0)
    labels = np.where(np.append(owner[1:], -1) == owner, next_token, IGNORED)
    padding = -len(stream) % seq_len

    def cut(values: NDArray, filler: int) -> NDArray[np.int32]:
        return np.append(values, np.full(padding, filler)).astype(np.int32).reshape(-1, seq_len)

    return Packed(cut(stream, 0), cut(labels, IGNORED), cut(owner, -1))


def batch_rows(n_sequences: int, batch_size: int, step: int, seed: int) -> NDArray[np.int64]:
    """The sequences [batch_size] that step `step` (from 0) learns from: every epoch in an order of its own.

    A function of its arguments alone, so a resumed run needs no more than its step to go on with the same data.
    """
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    rows = np.empty(batch_size, np.int64)
    for epoch in range(places[0] // n_sequences, places[-1] // n_sequences + 1):
        order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(n_sequences)
        inside = places // n_sequences == epoch
        rows[inside] = order[places[inside] % n_sequences]
    return rows
