"""What is learnt: sequences, and the loss of some of them. Language, preferences and classes differ in nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, logsigmoid

from maestrale.text.samples import Labelled, Pair
from maestrale.torch_backend.lora import adapter_off
from maestrale.torch_backend.model import Transformer
from maestrale.torch_backend.train.loss import packed_hidden, packed_loss, token_losses
from maestrale.torch_backend.train.packing import IGNORED, Packed


class Objective(Protocol):
    """N things to learn from, chosen by their numbers `rows`."""

    def __len__(self) -> int: ...

    def weight(self, rows: np.ndarray) -> float:
        """What the sum of their losses is divided by to be a mean."""

    def loss(self, model: Transformer, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """(the sum of their losses, fp32; which of the rows that the model saw are no padding, bool [T])."""

    def digest(self) -> str:
        """Tells data apart."""


@dataclass(frozen=True)
class Language:
    """Each next token of packed sequences, by its weight; the mean is over the weights."""

    data: Packed

    def __len__(self) -> int:
        return len(self.data)

    def weight(self, rows: np.ndarray) -> float:
        return float(self.data.weights[rows].sum())

    def loss(self, model: Transformer, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, labels, documents, weights = tensors(self.data, rows)
        return packed_loss(model, tokens, labels, documents, weights), documents.flatten() >= 0

    def digest(self) -> str:
        return self.data.digest()


@dataclass(frozen=True)
class Preferences:
    """Direct preference optimisation (arXiv 2305.18290, equation 7): the model without its adapter is the reference."""

    pairs: Sequence[Pair]
    beta: float

    def __len__(self) -> int:
        return len(self.pairs)

    def weight(self, rows: np.ndarray) -> float:
        return float(len(rows))

    def loss(self, model: Transformer, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        samples = [s for row in rows for s in (self.pairs[row].chosen, self.pairs[row].rejected)]
        tokens, labels = padded([s.ids for s in samples], [s.weights for s in samples])
        documents = torch.where(
            tokens.new_tensor([[len(s.ids)] for s in samples]) > torch.arange(tokens.shape[1]), 0, -1
        )

        def logprobs() -> torch.Tensor:
            losses_T = token_losses(packed_hidden(model, tokens, documents), model.output, labels.flatten())
            return -losses_T.view(labels.shape).sum(1).view(-1, 2)  # chosen, rejected

        with torch.no_grad(), adapter_off(model):
            given = logprobs()
        gain = logprobs() - given
        return -logsigmoid(self.beta * (gain[:, 0] - gain[:, 1])).sum(), documents.flatten() >= 0

    def digest(self) -> str:
        parts = [part for pair in self.pairs for s in (pair.chosen, pair.rejected) for part in (s.ids, s.weights)]
        return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


@dataclass(frozen=True)
class Classes:
    """The class of a text, by scores of its last token. The model has a layer `score` for them."""

    samples: Sequence[Labelled]
    labels: Sequence[str]

    def __len__(self) -> int:
        return len(self.samples)

    def weight(self, rows: np.ndarray) -> float:
        return float(len(rows))

    def scores(self, model: Transformer, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """(scores fp32 [B, classes], which rows are no padding)."""
        ids = [self.samples[row].ids for row in rows]
        tokens, _ = padded(ids, ids)
        lengths = torch.tensor([len(part) for part in ids])
        documents = torch.where(lengths[:, None] > torch.arange(tokens.shape[1]), 0, -1)
        x_BLD = packed_hidden(model, tokens, documents).unflatten(0, tokens.shape)
        score: nn.Module = model.get_submodule("score")
        return score(x_BLD[torch.arange(len(ids)), lengths - 1]).float(), documents.flatten() >= 0

    def loss(self, model: Transformer, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        scores, real = self.scores(model, rows)
        wanted = torch.tensor([self.labels.index(self.samples[row].label) for row in rows])
        return cross_entropy(scores, wanted, reduction="sum"), real

    def digest(self) -> str:
        parts = [part for sample in self.samples for part in (sample.ids.tobytes(), sample.label.encode())]
        return hashlib.sha256(b"\0".join(parts)).hexdigest()


def tensors(data: Packed, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(tokens, labels, documents) [B, L] int64 of some sequences, and their weights in fp32."""
    tokens, labels, documents = (
        torch.from_numpy(values[rows].astype(np.int64)) for values in (data.tokens, data.labels, data.documents)
    )
    return tokens, labels, documents, torch.from_numpy(data.weights[rows])


def padded(ids: Sequence[np.ndarray], weights: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, labels) [B, L] int64 of sequences one below the other, filled up on the right."""
    shape = (len(ids), max(len(part) for part in ids))
    tokens, labels = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORED)
    for row, (part, weight) in enumerate(zip(ids, weights, strict=True)):
        tokens[row, : len(part)] = torch.from_numpy(part.astype(np.int64))
        labels[row, : len(part) - 1] = torch.from_numpy(np.where(weight[1:] > 0, part[1:], IGNORED).astype(np.int64))
    return tokens, labels
