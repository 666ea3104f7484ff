"""A corpus of twenty words, and one thread so that sums have one order."""

from __future__ import annotations

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


_WORDS = [
    "the",
    "wolf",
    "fox",
    "king",
    "queen",
    "said",
    "went",
    "home",
    "saw",
    "little",
    "old",
    "forest",
    "and",
    "then",
    "but",
]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder with two books and heldout.txt, documents separated by two empty lines."""
    folder = tmp_path_factory.mktemp("corpus")
    generator = np.random.default_rng(0)

    def paragraph() -> str:
        return " ".join(generator.choice(_WORDS, 20)).capitalize() + "."

    for name in ("one.txt", "two.txt", "heldout.txt"):
        documents = ["\n\n".join(paragraph() for _ in range(3)) for _ in range(12)]
        (folder / name).write_text("\n\n\n".join(documents) + "\n", encoding="utf-8")
    return folder
