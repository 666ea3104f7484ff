"""What the bundled models keep in int8 and int4, on stories that they were not trained on.

heldout_stories.txt: "The Inchcape Rock" (James Baldwin, Fifty Famous Stories Retold, 1896) and the beginning of a
chapter of The Wonderful Wizard of Oz (L. Frank Baum, 1900), both in the public domain, of the held-out split.
"""

from pathlib import Path

import numpy as np
import pytest

from maestrale import LLM
from maestrale.checkpoint.quantize import Recipe, quantize
from maestrale.checkpoint.rounding import round_to_nearest
from maestrale.launch import BUNDLED

TEXT = (Path(__file__).parent / "heldout_stories.txt").read_text()
PROMPTS, LENGTH = 20, 64


@pytest.fixture(scope="module", params=["stories", "stories-moe"])
def folder(request):
    return BUNDLED / request.param


def logits_of(folder, prompts):
    return LLM(folder, dtype="float32", backend="torch", max_len=LENGTH).logits(prompts)


def perplexity(logits, prompts):
    """exp of the mean of log Σ exp(logits) - logit of the token that follows."""
    nats = []
    for rows, ids in zip(logits, prompts, strict=True):
        rows = rows[:-1].astype(np.float64)
        nats.append(np.log(np.exp(rows).sum(axis=1)) - rows[np.arange(LENGTH - 1), ids[1:]])
    return np.exp(np.mean(nats))


@pytest.fixture(scope="module")
def stored(folder):
    """20 prompts of 64 tokens, and the stored model's logits."""
    tokenizer = LLM(folder, max_len=LENGTH).tokenizer
    ids = tokenizer.encode(TEXT, bos=False)
    step = LENGTH - 1
    assert len(ids) >= PROMPTS * step
    prompts = [[tokenizer.bos_id, *ids[i * step : (i + 1) * step]] for i in range(PROMPTS)]
    return prompts, logits_of(folder, prompts)


@pytest.mark.parametrize(("format", "agreement", "loss"), [("int8", 0.9, 0.01), ("int4", 0.75, 0.04)])
def test_greedy_choices_and_perplexity_stay_close(tmp_path, folder, stored, format, agreement, loss):
    prompts, wanted = stored
    quantize(folder, tmp_path / "packed", Recipe(format), round_to_nearest)
    found = logits_of(tmp_path / "packed", prompts)
    same = [(a.argmax(axis=1) == b.argmax(axis=1)).mean() for a, b in zip(wanted, found, strict=True)]
    assert np.mean(same) >= agreement
    assert perplexity(found, prompts) <= (1 + loss) * perplexity(wanted, prompts)
    assert any(not np.array_equal(a, b) for a, b in zip(wanted, found, strict=True))
