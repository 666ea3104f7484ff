"""What keeps greedy text out of circles: texts that a model wrote itself, of which it unlearns what it said again.

Sequence-level unlikelihood (Welleck et al., Neural Text Generation with Unlikelihood Training, arXiv 1908.04319,
section 5.2): in a model's own continuation a token that ends an n-gram which stood there before costs -log(1 - p).
They are written before the run, not within it; ordinary sequences are learnt beside them, so that the model stays one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from maestrale.torch_backend.model import Transformer
from maestrale.torch_backend.train.loss import packed_hidden, token_losses
from maestrale.torch_backend.train.objective import Language, Objective, tensors
from maestrale.torch_backend.train.packing import IGNORED, Packed

_N = 4  # tokens of an n-gram
_LEAST = 1e-5  # of 1 - p: its logarithm's gradient stays finite


@dataclass(frozen=True)
class Unlikely:
    """Sequences to learn and, `share` of all, sequences of the model's own, whose labels are to be unlearnt."""

    data: Packed
    own: Packed
    share: float

    def __len__(self) -> int:
        return len(self.data) + round(len(self.data) * self.share / (1 - self.share))

    def weight(self, rows: np.ndarray) -> float:
        learnt, own = self._parts(rows)
        return float(self.data.weights[learnt].sum() + self.own.weights[own].sum())

    def loss(self, model: Transformer, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        learnt, own = self._parts(rows)
        pairs = zip(tensors(self.data, learnt), tensors(self.own, own), strict=True)
        tokens, labels, documents, weights = (torch.cat(pair) for pair in pairs)
        losses = token_losses(packed_hidden(model, tokens, documents), model.output, labels.flatten())
        first = len(learnt) * tokens.shape[1]
        unlearnt = -(-torch.expm1(-losses[first:])).clamp(min=_LEAST).log()
        return (torch.cat((losses[:first], unlearnt)) * weights.flatten()).sum(), documents.flatten() >= 0

    def digest(self) -> str:
        return hashlib.sha256(f"{self.data.digest()} {self.own.digest()} {self.share}".encode()).hexdigest()

    def _parts(self, rows: np.ndarray) -> tuple[NDArray, NDArray]:
        """(rows of data, rows of own)"""
        return rows[rows < len(self.data)], (rows[rows >= len(self.data)] - len(self.data)) % len(self.own)


def language(data: Packed, own: Packed | None, share: float) -> Objective:
    """The objective of packed sequences, and of a model's own ones where there are any."""
    return Language(data) if own is None else Unlikely(data, said_again(own), share)


def said_again(own: Packed) -> Packed:
    """The same with no label but those that end an n-gram which stood in their document before."""
    labels = np.stack([_again(*row) for row in zip(own.tokens, own.labels, own.documents, own.weights, strict=True)])
    return replace(own, labels=labels, weights=(labels != IGNORED).astype(np.float32))


def _again(
    tokens_L: NDArray[np.int32], labels_L: NDArray[np.int32], documents_L: NDArray[np.int32], weights_L: NDArray
) -> NDArray[np.int32]:
    kept = np.full_like(labels_L, IGNORED)
    seen: set[tuple[int, Sequence[int]]] = set()
    for i in range(_N - 2, len(labels_L)):
        start = i - _N + 2
        gram = (int(documents_L[i]), (*tokens_L[start : i + 1].tolist(), int(labels_L[i])))
        if labels_L[i] == IGNORED or documents_L[start] != documents_L[i]:
            continue
        if gram in seen and weights_L[i] > 0:
            kept[i] = labels_L[i]
        seen.add(gram)
    return kept
