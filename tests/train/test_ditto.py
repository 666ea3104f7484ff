"""Sequences that get stuck in a sentence, and what is learnt from them, against the formula token by token."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny_training import random_documents, tiny_config, tiny_mixture

from maestrale.errors import UsageError
from maestrale.torch_backend.train.ditto import Ditto, get_stuck, language
from maestrale.torch_backend.train.finetune_settings import FinetuneSettings
from maestrale.torch_backend.train.loss import packed_attend, packed_positions
from maestrale.torch_backend.train.objective import Language, tensors
from maestrale.torch_backend.train.packing import IGNORED, Packed, pack
from maestrale.torch_backend.train.step import new_model

END = 5  # the token that ends a sentence


def story(sentences: int, words: int) -> list[int]:
    draw = np.random.default_rng(3)
    return [1, *(t for _ in range(sentences) for t in [*draw.integers(10, 300, words).tolist(), END]), 2]


def ends() -> np.ndarray:
    return np.arange(320) == END


def stuck(seq_len: int = 64, share: float = 0.5) -> tuple[Packed, Packed, np.ndarray]:
    data = pack([story(5, 6), story(4, 5), story(9, 4)], seq_len)
    return data, *get_stuck(data, ends(), share, seed=0)


def test_a_stuck_sequence_repeats_whole_sentences_to_its_end():
    data, made, periods = stuck()
    assert (made.tokens[: len(data)] == data.tokens).all()
    assert not periods[: len(data)].any()
    assert len(made) == 2 * len(data)
    for row in range(len(data), len(made)):
        places = np.flatnonzero(periods[row])
        (period,) = set(periods[row][places].tolist())
        assert places.tolist() == list(range(places[0], 64))
        end = places[0] + 1
        passage = made.tokens[row, end - period : end].tolist()
        assert made.tokens[row, end - period - 1] == END
        assert passage[-1] == END
        rest = made.tokens[row, end:].tolist()
        assert rest == (passage * 64)[: len(rest)]
        assert any((made.tokens[row, :end] == old[:end]).all() for old in data.tokens)


def test_labels_of_a_stuck_sequence_are_its_next_tokens_in_one_document():
    data, made, periods = stuck()
    for row in range(len(data), len(made)):
        first = np.flatnonzero(periods[row])[0]
        assert (made.labels[row, first:-1] == made.tokens[row, first + 1 :]).all()
        assert made.labels[row, -1] == made.labels[row, -1 - periods[row, -1]]
        assert (made.weights[row, first:] == 1).all()
        assert len(set(made.documents[row, first:].tolist())) == 1


def test_the_share_of_stuck_sequences_is_what_was_asked():
    data = pack([story(40, 6) for _ in range(20)], 64)
    made, periods = get_stuck(data, ends(), 0.25, seed=0)
    assert (periods.any(axis=1)).mean() == pytest.approx(0.25, abs=0.01)
    assert len(made) - len(data) == periods.any(axis=1).sum()


def test_what_is_not_learnt_is_not_repeated():
    data = pack([story(15, 6)], 107)
    prompt = Packed(data.tokens, data.labels, data.documents, data.weights * (np.arange(107) >= 30))
    made, periods = get_stuck(prompt, ends(), 0.9, seed=0)
    assert len(made) == 10
    for row in range(1, len(made)):
        first = np.flatnonzero(periods[row])[0]
        assert first + 1 - periods[row, first] > 30


def test_sequences_without_a_sentence_do_not_get_stuck():
    data = pack(random_documents(40, 30), 32)
    made, periods = get_stuck(data, np.zeros(320, bool), 0.5, seed=0)
    assert len(made) == len(data)
    assert not periods.any()


@pytest.mark.parametrize("config", [tiny_config(), tiny_mixture()], ids=["dense", "mixture"])
def test_the_loss_is_the_papers(config):
    """By a loop over tokens, from the logits."""
    model = new_model(config, seed=1)
    _, made, periods = stuck()
    objective = Ditto(made, periods, decay=0.4)
    rows = np.arange(len(made))
    with torch.no_grad():
        found, real = objective.loss(model, rows)
        tokens, _, documents, _ = tensors(made, rows)
        logits = model(
            tokens.flatten(), packed_positions(documents), packed_attend(documents, model.config.sliding_window)
        )
        logprobs = logits.double().log_softmax(-1).view(*tokens.shape, -1).numpy()
    assert (real == (documents.flatten() >= 0)).all()
    expected = 0.0
    for row in rows:
        p = [0.0 if t == IGNORED else math.exp(logprobs[row, i, t]) for i, t in enumerate(made.labels[row])]
        for i, label in enumerate(made.labels[row]):
            if periods[row, i]:
                expected -= math.log(1 - abs(p[i] - 0.4 * p[i - periods[row, i]]))
            elif label != IGNORED:
                expected -= math.log(p[i])
    assert found.item() == pytest.approx(expected, rel=1e-5)
    assert objective.weight(rows) == (made.labels != IGNORED).sum()


def test_the_gradient_leaves_the_earlier_repetition_alone():
    """d/dp of -log(1 - |p - c|) is sign(p - c) / (1 - |p - c|), with c a constant."""
    from maestrale.torch_backend.train.ditto import ditto_losses

    losses = torch.tensor([[0.5, 0.2, 3.0]], requires_grad=True)
    ditto_losses(losses, torch.tensor([[0, 1, 1]]), 0.5).sum().backward()
    p = [math.exp(-x) for x in (0.5, 0.2, 3.0)]
    expected = [1.0]
    for now, before in ((p[1], p[0]), (p[2], p[1])):
        gap = now - 0.5 * before
        expected.append(-now * math.copysign(1, gap) / (1 - abs(gap)))
    torch.testing.assert_close(losses.grad, torch.tensor([expected]))


def test_without_a_share_everything_is_learnt_as_ever():
    data = pack([story(5, 6)], 64)
    assert language(data, str, 0.0, 0.5, 0) == Language(data)


def test_a_text_ends_sentences_by_what_its_tokens_show():
    data = pack([story(9, 6)], 64)
    objective = language(data, lambda token: "so." if token == END else "so", 0.5, 0.5, seed=0)
    assert isinstance(objective, Ditto)
    assert objective.periods.any()


def test_impossible_shares_are_refused():
    with pytest.raises(UsageError, match=r"ditto = 1\.0: expected a number of at least 0 and less than 1"):
        FinetuneSettings(model="m", train="t", out="o", ditto=1.0)
    with pytest.raises(UsageError, match=r"ditto = 0\.5: task dpo learns no text"):
        FinetuneSettings(model="m", train="t", out="o", task="dpo", ditto=0.5)
