"""Reader: a model that does not write but reads: embeddings of texts, and classes where it was trained for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maestrale.checkpoint.classifier import WEIGHTS, read_classifier
from maestrale.errors import CheckpointError, RequestError, UsageError
from maestrale.launch import model_folder
from maestrale.llm import LLM, NO_VECTORS
from maestrale.parallel.launcher import world


class Reader:
    """A model folder, open to be read with.

    classes: also the classes of a folder that `finetune --task classify` wrote. options: those of LLM. Errors: LLM's;
    CheckpointError where the folder holds no classifier.
    """

    def __init__(self, path: str | Path | None = None, classes: bool = False, **options: Any):
        if world()[1] > 1:
            raise UsageError(NO_VECTORS)
        classifier = read_classifier(model_folder(path)) if classes else None
        self._llm = LLM(path, **options)
        self.labels: tuple[str, ...] = ()
        if classifier is not None:
            self.labels, self._weight_KD = classifier.labels, classifier.weight
            if (width := self._weight_KD.shape[1]) != self._llm.config.dim:
                raise CheckpointError(f"{path}: {WEIGHTS}: expected rows of dim = {self._llm.config.dim}, got {width}")

    def embed(self, texts: str | Sequence[str | Sequence[int]]) -> list[NDArray[np.float32]]:
        """The mean over each text's tokens, begin-of-text included, of what the output layer would read: fp32 [dim].

        A token sees those before it and none after: these are embeddings of a causal model.
        """
        return self._vectors(texts, last=False)

    def scores(self, texts: str | Sequence[str | Sequence[int]]) -> list[NDArray[np.float32]]:
        """Float32 [classes] for each text, from its last token, before any softmax; in the order of `labels`."""
        if not self.labels:
            raise RequestError("this model was opened for embeddings: open it with classes=True", "texts")
        return [self._weight_KD @ vector_D for vector_D in self._vectors(texts, last=True)]

    def classify(self, texts: str | Sequence[str | Sequence[int]]) -> list[dict[str, float]]:
        """For each text the probability of each label, the likeliest first."""
        found = []
        for scores in self.scores(texts):
            weights = np.exp((scores - scores.max()).astype(np.float64))
            shares = zip(self.labels, (weights / weights.sum()).tolist(), strict=True)
            found.append(dict(sorted(shares, key=lambda share: -share[1])))
        return found

    def _vectors(self, texts: str | Sequence[str | Sequence[int]], last: bool) -> list[NDArray[np.float32]]:
        texts = [texts] if isinstance(texts, str) else texts  # one text is a list of one, as for LLM.generate
        ids = [self._llm.tokenizer.encode(text) if isinstance(text, str) else text for text in texts]
        *_, vectors = self._llm.embed(ids, last)
        return vectors or []
