import itertools

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, MistralConfig, MistralForCausalLM

from maestrale.errors import CheckpointError
from maestrale.sampling.beam import BeamSearch, Hypothesis
from maestrale.sampling.policy import log_softmax

PROMPT = [1, 7, 3]
MAX_TOKENS = 9


@pytest.fixture(scope="module", params=[(60, 0), (150, 1), (300, 2)], ids=["V60", "V150", "V300"])
def model(request):
    vocab, seed = request.param
    torch.manual_seed(seed)
    config = MistralConfig(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.5,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = MistralForCausalLM(config).eval()
    # A bias on the end of sequence makes it likely or not, for both sides alike.
    model.eos_bias = torch.zeros(vocab)
    model.lm_head.register_forward_hook(lambda module, inputs, output: output + model.eos_bias)
    return model


def ours(model, width, eos_ids, length_penalty, min_tokens=0):
    search = BeamSearch(width, MAX_TOKENS, eos_ids, length_penalty, min_tokens)
    beams = [PROMPT]
    while not search.done:
        with torch.no_grad():
            logits = model(torch.tensor(beams), use_cache=False).logits[:, -1].numpy()
        beams = [[*beams[parent], token] for parent, token in search.advance(log_softmax(logits))]
    return search.results()


def theirs(model, width, eos_ids, length_penalty, min_tokens=0):
    options = GenerationConfig(
        num_beams=width,
        num_return_sequences=width,
        do_sample=False,
        early_stopping=False,
        length_penalty=length_penalty,
        max_new_tokens=MAX_TOKENS,
        min_new_tokens=min_tokens or None,
        eos_token_id=list(eos_ids) or None,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    prompt = torch.tensor([PROMPT])
    output = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=options)
    lengths = (output.beam_indices >= 0).sum(1).tolist()
    ids = [row[len(PROMPT) :][:n].tolist() for row, n in zip(output.sequences, lengths, strict=True)]
    results = []
    for row, score in zip(ids, output.sequences_scores.tolist(), strict=True):
        finished = row[-1] in eos_ids
        results.append((tuple(row[:-1] if finished else row), score, finished))
    return results


def assert_same(model, *options):
    mine, reference = ours(model, *options), theirs(model, *options)
    assert [(h.token_ids, h.finished) for h in mine] == [(ids, finished) for ids, _, finished in reference]
    assert [h.score for h in mine] == pytest.approx([score for _, score, _ in reference], rel=1e-5, abs=1e-5)
    return mine


@pytest.mark.parametrize("bias", [-30.0, 3.0, 6.0])
@pytest.mark.parametrize("width", [2, 3, 4, 5])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 0.5, 1.0, 2.0])
def test_beams_are_those_of_transformers(model, width, length_penalty, bias):
    model.eos_bias = torch.zeros(model.config.vocab_size).index_fill_(0, torch.tensor([2]), bias)
    results = assert_same(model, width, [2], length_penalty)
    assert len(results) == width
    if bias < 0:
        assert not any(h.finished for h in results)


@pytest.mark.parametrize("bias", [3.0, 10.0])
@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("length_penalty", [-1.0, 1.0, 5.0])
def test_several_ends_of_sequence_keep_more_candidates(model, width, length_penalty, bias):
    eos_ids = [2, 5, 11, 12, 40]
    model.eos_bias = torch.zeros(model.config.vocab_size).index_fill_(0, torch.tensor(eos_ids), bias)
    assert_same(model, width, eos_ids, length_penalty)


@pytest.mark.parametrize("width", [2, 5])
@pytest.mark.parametrize("min_tokens", [1, 4, MAX_TOKENS])
def test_no_beam_ends_before_min_tokens(model, width, min_tokens):
    model.eos_bias = torch.zeros(model.config.vocab_size).index_fill_(0, torch.tensor([2]), 6.0)
    results = assert_same(model, width, [2], 1.0, min_tokens)
    assert all(len(h.token_ids) >= min_tokens for h in results)


def test_without_ends_of_sequence_every_beam_has_max_tokens(model):
    model.eos_bias = torch.zeros(model.config.vocab_size)
    results = assert_same(model, 3, [], 1.0)
    assert [len(h.token_ids) for h in results] == [MAX_TOKENS] * 3


def test_one_beam_is_greedy_until_the_rules_end_it(model):
    model.eos_bias = torch.zeros(model.config.vocab_size)
    (only,) = ours(model, 1, [], 0.0)
    ids = list(PROMPT)
    total = 0.0
    for _ in range(MAX_TOKENS):
        with torch.no_grad():
            logprobs = model(torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1)
        ids.append(int(logprobs.argmax()))
        total += float(logprobs.max())
    assert only.token_ids == tuple(ids[len(PROMPT) :])
    assert only.score == pytest.approx(total, abs=1e-5)


def test_a_beam_as_wide_as_the_tree_finds_the_best_sequences():
    tables = log_softmax(np.random.default_rng(0).standard_normal((7, 6)).astype(np.float32))
    row_of = {(): 0, **{(i,): i + 1 for i in range(6)}}
    search = BeamSearch(6, 2)
    beams = [()]
    while not search.done:
        steps = search.advance(np.stack([tables[row_of[beam]] for beam in beams]))
        beams = [(*beams[parent], token) for parent, token in steps]
    scores = {(a, b): (tables[0, a] + tables[a + 1, b]) / 2 for a, b in itertools.product(range(6), repeat=2)}
    expected = sorted(scores, key=lambda ids: -scores[ids])[:6]
    assert [h.token_ids for h in search.results()] == expected
    assert [h.score for h in search.results()] == pytest.approx([scores[ids] for ids in expected])


def test_ties_go_to_the_lower_row_and_the_lower_token():
    search = BeamSearch(3, 5)
    flat = log_softmax(np.zeros((3, 8), np.float32))
    assert search.advance(flat[:1]) == [(0, 0), (0, 1), (0, 2)]
    assert search.advance(flat) == [(0, 0), (0, 1), (0, 2)]


def test_a_vocabulary_smaller_than_the_width_starts_with_fewer_beams():
    search = BeamSearch(4, 2)
    assert search.advance(np.log(np.array([[0.75, 0.25]], np.float32))) == [(0, 0), (0, 1)]
    assert search.advance(np.log(np.array([[0.5, 0.5], [0.9, 0.1]], np.float32))) == []
    assert [h.token_ids for h in search.results()] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_an_impossible_token_continues_no_beam():
    search = BeamSearch(3, 4)
    with np.errstate(divide="ignore"):
        assert search.advance(np.log(np.array([[0, 0.5, 0, 0.5, 0]], np.float32))) == [(0, 1), (0, 3)]


def test_no_tokens_asked_is_done_at_once():
    search = BeamSearch(3, 0)
    assert search.done
    assert search.results() == [Hypothesis((), 0.0, False)]


def test_rows_that_do_not_match_the_live_beams_are_refused():
    search = BeamSearch(2, 3)
    with pytest.raises(ValueError, match="expected 1 rows"):
        search.advance(np.zeros((2, 5), np.float32))
    search = BeamSearch(2, 0)
    with pytest.raises(ValueError, match="expected 0 rows"):
        search.advance(np.zeros((1, 5), np.float32))


def test_damaged_logits_never_reach_a_beam():
    with pytest.raises(CheckpointError, match="they hold nan"):
        log_softmax(np.array([[0.0, 1.0], [np.nan, 0.0]], np.float32))
