"""What a model said again in its own texts is found, and unlearnt by the formula of the paper, token by token."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny_training import random_documents, tiny_config, tiny_mixture, tiny_settings

from maestrale.errors import UsageError
from maestrale.torch_backend.train.finetune_settings import FinetuneSettings
from maestrale.torch_backend.train.loss import packed_attend, packed_positions
from maestrale.torch_backend.train.objective import Language, tensors
from maestrale.torch_backend.train.packing import IGNORED, pack
from maestrale.torch_backend.train.step import evaluate, learn, new_model, new_optimizer
from maestrale.torch_backend.train.unlikely import Unlikely, language, said_again

LOOP = [1, 20, 21, *[30, 31, 32, 33, 34] * 4, 40, 2]


def test_what_ends_an_n_gram_that_stood_there_is_marked():
    """By a search through the text before each token, document by document."""
    documents = [LOOP, [1, 50, 51, 52, 53, 54, 50, 51, 52, 53, 2], LOOP[:9], [1, 7, 7, 7, 7, 7, 7, 2]]
    packed = pack(documents, 32)
    marked = said_again(packed)
    expected = []
    for document in documents:
        grams = [tuple(document[i - 3 : i + 1]) for i in range(len(document))]
        expected += [document[i] if i >= 4 and grams[i] in grams[3:i] else IGNORED for i in range(1, len(document))]
        expected.append(IGNORED)  # nothing comes after a document's end
    starts = {32, 64}  # what an n-gram over a border of sequences repeats is not looked for
    for i, (label, want) in enumerate(zip(marked.labels.flatten().tolist(), expected, strict=False)):
        assert label == want or any(start - 4 < i < start + 3 for start in starts)
    assert sum(label != IGNORED for label in expected) == 15
    assert ((marked.labels != IGNORED) == (marked.weights == 1)).all()
    assert (marked.tokens == packed.tokens).all()


def test_one_document_repeats_nothing_of_another():
    marked = said_again(pack([[1, *range(10, 20), 2], [1, *range(10, 20), 2]], 24))
    assert (marked.labels == IGNORED).all()


@pytest.mark.parametrize("config", [tiny_config(), tiny_mixture()], ids=["dense", "mixture"])
def test_the_loss_is_the_papers(config):
    """By a loop over tokens, from the logits."""
    model = new_model(config, seed=1)
    data, own = pack(random_documents(20, 40), 32), pack([LOOP, LOOP], 32)
    objective = language(data, own, 0.5)
    assert isinstance(objective, Unlikely)
    rows = np.array([3, 0, 1, 2])
    with torch.no_grad():
        found, real = objective.loss(model, rows)
        expected, labels = 0.0, 0
        for packed, again in ((data, False), (said_again(own), True)):
            tokens, _, documents, _ = tensors(packed, np.arange(2))
            attend = packed_attend(documents, config.sliding_window)
            logits = model(tokens.flatten(), packed_positions(documents), attend)
            logprobs = logits.double().log_softmax(-1)
            for i, label in enumerate(packed.labels.flatten()):
                if label != IGNORED:
                    logprob = logprobs[i, label].item()
                    expected -= math.log(1 - math.exp(logprob)) if again else logprob
                    labels += 1
    assert found.item() == pytest.approx(expected, rel=1e-5)
    assert objective.weight(rows) == labels
    assert len(real) == 4 * 32


def test_the_share_of_own_sequences_is_what_was_asked():
    objective = language(pack(random_documents(*[32] * 30), 32), pack([LOOP], 32), 0.25)
    assert len(objective) == 40


@pytest.mark.parametrize("rows", [[0, 1], [30, 35]], ids=["only learnt", "only unlearnt"])
def test_a_batch_may_hold_one_kind_alone(rows):
    objective = language(pack(random_documents(*[32] * 30), 32), pack([LOOP], 32), 0.25)
    loss, real = objective.loss(new_model(tiny_config(), seed=1), np.array(rows))
    assert loss.isfinite()
    assert len(real) == 64


def test_a_model_unlearns_what_it_said_again_and_still_learns():
    """After some steps the loop's tokens are less likely than before, those of the data likelier."""
    settings = tiny_settings(seq_len=32, bf16=False, lr=1e-2, batch_size=4, micro_batch=4)
    data, own = pack(random_documents(*[32] * 4), 32), pack([LOOP], 32)
    model = new_model(settings.model, seed=1)
    optimizer = new_optimizer(model, settings)
    for _ in range(30):  # a model that goes round
        learn(model, optimizer, Language(own), np.zeros(4, np.int64), settings)
    looping, texts, everything = Language(said_again(own)), Language(data), np.arange(4)
    before = evaluate(model, looping, np.array([0]), settings)[0], evaluate(model, texts, everything, settings)[0]
    objective = language(data, own, 0.5)
    for _ in range(30):
        learn(model, optimizer, objective, np.arange(8), settings)
    after = evaluate(model, looping, np.array([0]), settings)[0], evaluate(model, texts, everything, settings)[0]
    assert after[0] > before[0] + 15  # nats, over the 16 tokens or so that are said again
    assert after[1] < before[1]


def test_impossible_shares_are_refused():
    with pytest.raises(UsageError, match=r"own_share = 1\.0: expected a number above 0 and below 1"):
        FinetuneSettings(model="m", train="t", out="o", own_share=1.0)
    with pytest.raises(UsageError, match="own = 'x': task dpo learns no text"):
        FinetuneSettings(model="m", train="t", out="o", task="dpo", own="x")
