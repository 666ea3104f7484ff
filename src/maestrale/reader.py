"""Reader: a model that does not write but reads: embeddings of texts, and classes where it was trained for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maestrale.errors import RequestError
from maestrale.llm import LLM

_TOGETHER = 64  # texts whose rows are held at once


class Reader:
    """A model folder, open to be read with.

    classes: score the classes of a folder that `finetune --task classify` wrote; else what its layers say of each
    token. options: those of LLM. Errors: LLM's; CheckpointError where the folder holds no classifier.
    """

    def __init__(self, path: str | Path | None = None, classes: bool = False, **options: Any):
        self._llm = LLM(path, classes=classes, **options)
        self.labels = self._llm.labels

    def embed(self, texts: Sequence[str | Sequence[int]]) -> list[NDArray[np.float32]]:
        """The mean over each text's tokens, begin-of-text included, of what the output layer would read: fp32 [dim].

        A token sees those before it and none after: these are embeddings of a causal model.
        """
        if self.labels:
            raise RequestError("this model was opened for its classes: open it with classes=False", "texts")
        *_, vectors = self._llm.embed(self._ids(texts))
        return vectors or []

    def scores(self, texts: Sequence[str | Sequence[int]]) -> list[NDArray[np.float32]]:
        """Float32 [classes] for each text, from its last token, before any softmax; in the order of `labels`."""
        if not self.labels:
            raise RequestError("this model was opened for embeddings: open it with classes=True", "texts")
        ids = self._ids(texts)
        parts = (ids[start : start + _TOGETHER] for start in range(0, len(ids), _TOGETHER))
        return [rows_TK[-1] for part in parts for rows_TK in self._llm.logits(part)]

    def classify(self, texts: Sequence[str | Sequence[int]]) -> list[dict[str, float]]:
        """For each text the probability of each label, the likeliest first."""
        found = []
        for scores in self.scores(texts):
            weights = np.exp((scores - scores.max()).astype(np.float64))
            shares = zip(self.labels, (weights / weights.sum()).tolist(), strict=True)
            found.append(dict(sorted(shares, key=lambda share: -share[1])))
        return found

    def _ids(self, texts: Sequence[str | Sequence[int]]) -> list[Sequence[int]]:
        return [self._llm.tokenizer.encode(text) if isinstance(text, str) else text for text in texts]
