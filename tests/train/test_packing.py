"""Sequences of one length from documents of any, and the order in which steps see them."""

from __future__ import annotations

import numpy as np

from maestrale.text.samples import Sample
from maestrale.torch_backend.train.packing import IGNORED, batch_rows, pack, pack_samples


def test_documents_stand_end_to_end_and_continue_without_a_beginning():
    packed = pack([[1, 10, 11, 2], [1, 20, 21, 22, 2]], seq_len=3)
    assert packed.tokens.tolist() == [[1, 10, 11], [2, 1, 20], [21, 22, 2]]
    assert packed.documents.tolist() == [[0, 0, 0], [0, 1, 1], [1, 1, 1]]


def test_labels_are_the_next_token_of_the_same_document_even_over_a_cut():
    packed = pack([[1, 10, 11, 2], [1, 20, 21, 22, 2]], seq_len=3)
    assert packed.labels.tolist() == [[10, 11, 2], [IGNORED, 20, 21], [22, 2, IGNORED]]


def test_padding_belongs_to_no_document_and_has_no_label():
    packed = pack([[1, 10, 2]], seq_len=5)
    assert packed.documents.tolist() == [[0, 0, 0, -1, -1]]
    assert packed.labels.tolist() == [[10, 2, IGNORED, IGNORED, IGNORED]]


def test_every_token_but_a_beginning_is_learnt_once():
    documents = [[1, *range(i, i + 7 * i), 2] for i in range(3, 30)]
    packed = pack(documents, seq_len=16)
    learnt = packed.labels[packed.labels != IGNORED].tolist()
    assert learnt == [token for document in documents for token in document[1:]]


def test_an_epoch_sees_every_sequence_once_and_the_next_in_another_order():
    steps = [batch_rows(10, 4, step, seed=3) for step in range(5)]  # 20 places: two epochs, one step over the border
    places = np.concatenate(steps)
    assert sorted(places[:10]) == sorted(places[10:]) == list(range(10))
    assert places[:10].tolist() != places[10:].tolist()


def test_a_batch_may_be_larger_than_the_data():
    assert sorted(batch_rows(3, 7, 0, seed=0).tolist()[:6]) == [0, 0, 1, 1, 2, 2]


def sample(length: int, line: int, whole: bool = True) -> Sample:
    """Ids that tell the sample and the place; every third is not learnt, nor is the first."""
    ids = np.arange(length, dtype=np.int32) + 1000 * (line + 1)
    weights = (np.arange(length) % 3 > 0).astype(np.float32) * (0.5 if line % 2 else 1.0)
    return Sample(line, ids, weights, whole)


def test_samples_lie_whole_in_sequences_and_each_is_there_once():
    samples = [sample(3 + line * 5 % 27, line) for line in range(80)]
    packed, too_long = pack_samples(samples, 30)
    found = []
    for tokens, documents in zip(packed.tokens, packed.documents, strict=True):
        found += [tokens[documents == number].tolist() for number in range(documents.max() + 1)]
    assert sorted(found) == sorted(one.ids.tolist() for one in samples)
    assert (too_long.cut, too_long.left_out) == (0, 0)
    full = sum(len(one.ids) for one in samples) / packed.tokens.size
    assert full > 0.9


def test_labels_and_weights_of_packed_samples_are_those_of_the_next_token():
    samples = [sample(3 + line * 5 % 20, line) for line in range(20)]
    packed, _ = pack_samples(samples, 24)
    weight_of = {int(i): float(w) for one in samples for i, w in zip(one.ids, one.weights, strict=True)}
    learnt = packed.labels != IGNORED
    assert (packed.labels[learnt] == packed.tokens[learnt] + 1).all()
    assert packed.weights[learnt].tolist() == [weight_of[label] for label in packed.labels[learnt].tolist()]
    assert not packed.weights[~learnt].any()
    expected = sorted(i for i, weight in weight_of.items() if weight and i % 1000)
    assert sorted(packed.labels[learnt].tolist()) == expected


def test_a_long_text_is_cut_with_all_of_it_learnt_and_a_long_chat_is_left_out():
    text, chat = sample(50, 0, whole=False), sample(50, 1)
    packed, too_long = pack_samples([text, chat, sample(5, 2)], 16)
    assert (too_long.cut, too_long.left_out) == (1, 1)
    learnt = packed.labels[(packed.labels != IGNORED) & (packed.labels < 2000)]
    assert sorted(learnt.tolist()) == sorted(text.ids[text.weights > 0].tolist())
    assert not (packed.tokens // 1000 == 2).any()
