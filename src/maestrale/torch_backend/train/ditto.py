"""What keeps greedy text out of circles: sequences that are stuck in a sentence, learnt the other way round.

DITTO (Xu et al., Learning to Break the Loop, arXiv 2206.02369, section 3): a model makes a sentence the likelier the
more often it stood there, so it is shown sentences that are repeated to the end, and learns to make the n-th one only
`decay` times as probable, token by token, as the one before: -log(1 - |P(x_n) - decay * P*(x_(n-1))|), P* fixed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from maestrale.torch_backend.model import Transformer
from maestrale.torch_backend.train.loss import packed_hidden, token_losses
from maestrale.torch_backend.train.objective import Language, Objective, tensors
from maestrale.torch_backend.train.packing import Packed

_SENTENCES = 3  # that are repeated together, at most
_SHORTEST, _LONGEST = 4, 96  # tokens of them
_LEAST = 1e-5  # of what the logarithm is taken of: its gradient stays finite


@dataclass(frozen=True)
class Ditto:
    """data: sequences, those that get stuck among them. periods: int32 [N, L], for a label that repeats an earlier one
    how many tokens back that stands, 0 for every other label, which is learnt as ever."""

    data: Packed
    periods: NDArray[np.int32]
    decay: float

    def __len__(self) -> int:
        return len(self.data)

    def weight(self, rows: np.ndarray) -> float:
        return float(self.data.weights[rows].sum())

    def loss(self, model: Transformer, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, labels, documents, weights = tensors(self.data, rows)
        losses_T = token_losses(packed_hidden(model, tokens, documents), model.output, labels.flatten())
        losses = ditto_losses(losses_T.view(labels.shape), torch.from_numpy(self.periods[rows]), self.decay)
        return (losses * weights).sum(), documents.flatten() >= 0

    def digest(self) -> str:
        return self.data.digest()


def ditto_losses(losses_BL: torch.Tensor, periods_BL: torch.Tensor, decay: float) -> torch.Tensor:
    """Of each label's -log p its own loss: the same where its period is 0, else what the module says."""
    p = torch.exp(-losses_BL)
    places = torch.arange(losses_BL.shape[1]) - periods_BL
    before = p.detach().gather(1, places)
    kept = (1 - (p - decay * before).abs()).clamp(min=_LEAST)
    return torch.where(periods_BL > 0, -kept.log(), losses_BL)


def language(data: Packed, shows: Callable[[int], str], share: float, decay: float, seed: int) -> Objective:
    """The objective of packed sequences; with a `share` above 0, that share of all sequences gets stuck.

    shows: a token's text, by which it may end a sentence.
    """
    if share == 0:
        return Language(data)
    ends = np.zeros(int(data.tokens.max()) + 1, bool)
    for token in np.unique(data.tokens):
        ends[token] = shows(int(token)).endswith((".", "!", "?", '"', "”", "\n"))
    return Ditto(*get_stuck(data, ends, share, seed), decay)


def get_stuck(data: Packed, ends: NDArray[np.bool_], share: float, seed: int) -> tuple[Packed, NDArray[np.int32]]:
    """(the sequences, and copies that get stuck, `share` of all; the periods of their labels, as Ditto has them).

    A copy is what it was up to the end of a sentence, or of a few, and those again and again from there on. ends: of
    each token id, whether a sentence may end with it.
    """
    draw = np.random.Generator(np.random.PCG64(seed))
    tokens, labels, documents, weights = (
        [values] for values in (data.tokens, data.labels, data.documents, data.weights)
    )
    periods = [np.zeros(data.tokens.shape, np.int32)]
    wanted, length = round(len(data) * share / (1 - share)), data.tokens.shape[1]
    for row in draw.permutation(np.arange(wanted) % len(data)):
        passages = _passages(data.tokens[row], data.weights[row], ends)
        if not passages:
            continue
        start, end = passages[draw.integers(len(passages))]
        again = start + (np.arange(end, length + 1) - start) % (end - start)  # where each token from `end` on stood
        text = np.append(data.tokens[row, :end], data.tokens[row, again])
        where = np.arange(length) >= end - 1  # labels that repeat
        tokens.append(text[None, :length])
        labels.append(np.where(where, text[1:], data.labels[row])[None])
        documents.append(np.append(data.documents[row, :end], np.full(length - end, data.documents[row, start]))[None])
        weights.append(np.where(where, np.float32(1), data.weights[row])[None])
        periods.append(np.where(where, end - start, 0)[None].astype(np.int32))
    parts = (np.concatenate(part) for part in (tokens, labels, documents, weights))
    return Packed(*(part.astype(old.dtype) for part, old in zip(parts, vars(data).values(), strict=True))), (
        np.concatenate(periods)
    )


def _passages(tokens_L: NDArray, weights_L: NDArray, ends: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """[start, end) of each sentence, and of a few in a row, that is learnt and fits at least twice more."""
    borders = 1 + np.flatnonzero(ends[tokens_L[:-1]] & ~ends[tokens_L[1:]])
    found = []
    for i, start in enumerate(borders):
        for end in borders[i + 1 : i + 1 + _SENTENCES]:
            size = end - start
            fits = _SHORTEST <= size <= _LONGEST and end + 2 * size <= len(tokens_L)
            if fits and (weights_L[start - 1 : end - 1] > 0).all():
                found.append((int(start), int(end)))
    return found
