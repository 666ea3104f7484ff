"""Documents end to end in sequences of one length, nothing between them but their own boundaries."""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from maestrale.text.samples import Sample

IGNORED = -100  # the label of a token that has no next one


@dataclass(frozen=True)
class Packed:
    """N sequences of L tokens, [N, L] each; the last is filled up with padding.

    labels: int32, the next token of the same document, `IGNORED` at its end and in padding. documents: int32, the
    number of the document that a token belongs to, -1 for padding. weights: float32, how much a label counts.
    """

    tokens: NDArray[np.int32]
    labels: NDArray[np.int32]
    documents: NDArray[np.int32]
    weights: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.tokens)

    def digest(self) -> str:
        """Tells data apart: equal for equal tokens and weights."""
        return hashlib.sha256(self.tokens.tobytes() + self.weights.tobytes()).hexdigest()


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

    cut_labels = cut(labels, IGNORED)
    return Packed(cut(stream, 0), cut_labels, cut(owner, -1), (cut_labels != IGNORED).astype(np.float32))


@dataclass(frozen=True)
class TooLong:
    """How many samples were over the length: texts were cut into pieces that fit, chats were left out."""

    cut: int
    left_out: int


def pack_samples(samples: Sequence[Sample], seq_len: int) -> tuple[Packed, TooLong]:
    """Samples into sequences, none of them over a border: the longest first, each into the fullest that has room.

    A text over `seq_len` is cut, and the label of a piece's last token is the first one of the next, so that all of
    it is learnt.
    """
    long = [sample for sample in samples if len(sample.ids) > seq_len]
    left_out = sum(sample.whole for sample in long)
    pieces = [piece for sample in samples for piece in _pieces(sample, seq_len)]
    order = sorted(range(len(pieces)), key=lambda i: -len(pieces[i][0]))  # stable: equal lengths keep their order
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room, bin), sorted
    for i in order:
        length = len(pieces[i][0])
        if (fullest := bisect_left(rooms, (length, 0))) < len(rooms):
            room, number = rooms.pop(fullest)
        else:
            room, number = seq_len, len(bins)
            bins.append([])
        bins[number].append(i)
        insort(rooms, (room - length, number))
    shape = (len(bins), seq_len)
    tokens, labels = np.zeros(shape, np.int32), np.full(shape, IGNORED, np.int32)
    documents, weights = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
    for row, members in enumerate(bins):
        start = 0
        for number, i in enumerate(members):
            ids, next_ids, next_weights = pieces[i]
            place = (row, slice(start, start + len(ids)))
            tokens[place], documents[place], weights[place] = ids, number, next_weights
            labels[place] = np.where(next_weights > 0, next_ids, IGNORED)
            start += len(ids)
    return Packed(tokens, labels, documents, weights), TooLong(len(long) - left_out, left_out)


def _pieces(sample: Sample, seq_len: int) -> Iterator[tuple[NDArray, NDArray, NDArray]]:
    """(ids, the ids after them, their weights) of what is put into sequences: a sample, or its parts."""
    if sample.whole and len(sample.ids) > seq_len:
        return
    next_ids, next_weights = np.append(sample.ids[1:], 0), np.append(sample.weights[1:], 0)
    for start in range(0, len(sample.ids), seq_len):
        part = slice(start, start + seq_len)
        yield sample.ids[part], next_ids[part], next_weights[part]


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
