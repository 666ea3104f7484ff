"""Sequences of one length from documents of any, and the order in which steps see them."""

from __future__ import annotations

import numpy as np

from maestrale.torch_backend.train.packing import IGNORED, batch_rows, pack


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
