"""From tokens to completions, with a runner that answers by a formula: sampling, stops, forks, beams, errors."""

import numpy as np
import pytest
from fake_runner import NAN_TOKEN, VOCAB, make_engine, run, spell, true_greedy, true_row
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import letters

from maestrale.errors import CheckpointError, RequestError
from maestrale.sampling.beam import BeamSearch
from maestrale.sampling.params import SamplingParams

EOS = 2
SMALL = {"page_size": 1, "max_len": 16, "max_chunk": 16}


def greedy(max_tokens=8, **more):
    return SamplingParams(max_tokens=max_tokens, temperature=0, **more)


def ids(text):
    return [3 + ord(letter) - 32 for letter in text]


def log_softmax(row):
    shifted = row.astype(np.float64) - row.max()
    return shifted - np.log(np.exp(shifted).sum())


# The end of a sequence


def test_each_row_stops_at_its_own_end_of_sequence_and_emits_nothing_after_it():
    answers = {3: [9, EOS], 4: [9, 9, 9, EOS], 5: [EOS], 6: [9] * 5}
    engine = make_engine(letters(), rule=spell(1, answers))
    requests = [engine.submit([first], greedy(5)) for first in answers]
    run(engine)
    found = [(r.completions[0].token_ids, r.completions[0].finish_reason) for r in requests]
    assert found == [([9], "stop"), ([9, 9, 9], "stop"), ([], "stop"), ([9] * 5, "length")]


def test_ignore_eos_goes_on_after_it():
    engine = make_engine(letters(), rule=spell(1, {3: [EOS, 9, EOS, 9]}))
    request = engine.submit([3], greedy(4, ignore_eos=True))
    run(engine)
    assert request.completions[0].token_ids == [EOS, 9, EOS, 9]
    assert request.completions[0].finish_reason == "length"


def test_min_tokens_holds_the_end_of_sequence_back():
    def rule(seen, position):
        row = np.full(VOCAB, -20, np.float32)
        row[[EOS, 7]] = 5, 4
        return row

    engine = make_engine(letters(), rule=rule)
    requests = [engine.submit([3], greedy(8, min_tokens=n)) for n in (0, 3, 8)]
    run(engine)
    assert [r.completions[0].token_ids for r in requests] == [[], [7] * 3, [7] * 8]
    assert [r.completions[0].finish_reason for r in requests] == ["stop", "stop", "length"]


@pytest.mark.parametrize(
    ("written", "stop", "text", "count"),
    [
        ("HELLO WORLD", "O W", "HELL", 7),
        ("HELLO WORLD", ("XYZ", "WOR"), "HELLO ", 9),
        ("HELLO WORLD", "HELLO", "", 5),
        ("AAAB", "AAB", "A", 4),
        ("HELLO", "LOX", "HELLO", 5),  # "LO" is held back, and shown at the end
    ],
)
def test_a_stop_string_over_token_borders_stops_and_is_not_shown(written, stop, text, count):
    engine = make_engine(letters(), rule=spell(2, {1: [*ids(written), EOS]}))
    request = engine.submit([1, 40], greedy(20, stop=stop))
    pieces = run(engine)
    (completion,) = request.completions
    assert completion.text == text
    assert "".join(piece.text for _, piece in pieces) == text
    assert completion.finish_reason == "stop"
    assert len(completion.token_ids) == count


def test_before_min_tokens_a_stop_string_is_text_like_any_other():
    engine = make_engine(letters(), rule=spell(2, {1: [*ids("NO NO NO"), EOS]}))
    request = engine.submit([1, 40], greedy(20, stop="NO", min_tokens=3))
    run(engine)
    (completion,) = request.completions
    assert (completion.text, completion.finish_reason) == ("NO ", "stop")


def test_the_last_piece_of_a_stream_carries_the_prompts_logprobs():
    engine = make_engine()
    request = engine.submit([3, 4, 5], greedy(3, prompt_logprobs=1))
    pieces = [piece for _, piece in run(engine)]
    assert [piece.prompt_logprobs for piece in pieces[:-1]] == [None, None]
    assert pieces[-1].prompt_logprobs == request.completions[0].prompt_logprobs
    assert len(pieces[-1].prompt_logprobs) == 3


def test_text_comes_in_pieces_and_a_character_when_its_bytes_are_there():
    engine = make_engine(letters(), rule=spell(2, {1: [*ids("A"), 62, 63, *ids("B"), EOS]}))
    request = engine.submit([1, 40], greedy(20))
    texts = [piece.text for _, piece in run(engine)]
    assert texts == ["A", "", "é", "B", ""]
    assert request.completions[0].text == "AéB"


def test_the_longest_length_is_the_contexts():
    engine = make_engine(**SMALL)
    request = engine.submit([5] * 10, greedy(100))
    run(engine)
    assert request.completions[0].token_ids == true_greedy([5] * 10, 6)
    assert request.completions[0].finish_reason == "length"


# What is reported


@pytest.mark.parametrize("budget", [1, 3, 16])
@pytest.mark.parametrize("pages", [16, 40])
def test_prompt_and_token_logprobs_are_those_of_the_raw_logits(budget, pages):
    engine = make_engine(page_size=1, max_len=16, max_chunk=budget, pages=pages)
    asked = {"prompt_logprobs": 2, "logprobs": 3, "logit_bias": {9: 50.0}}
    requests = [engine.submit([first, 7, 8, 30, 11, 50], greedy(4, **asked)) for first in (3, 4, 5)]
    run(engine)
    assert (engine.scheduler.preemptions > 0) == (pages == 16 and budget == 16)
    for request in requests:
        (completion,) = request.completions
        assert completion.token_ids == [9] * 4
        known = [*request.prompt, *completion.token_ids]
        expected = [log_softmax(true_row(known[:i])) for i in range(1, len(known))]
        logprobs = [row[token] for row, token in zip(expected, known[1:], strict=True)]
        assert completion.prompt_logprobs[0] is None
        np.testing.assert_allclose(completion.prompt_logprobs[1:] + completion.logprobs, logprobs, atol=1e-4)
        assert completion.prompt_top_logprobs[0] is None
        tops = completion.prompt_top_logprobs[1:] + completion.top_logprobs
        for top, row, count in zip(tops, expected, [2] * 5 + [3] * 4, strict=True):
            assert [token for token, _ in top] == np.argsort(-row, kind="stable")[:count].tolist()
            np.testing.assert_allclose([logprob for _, logprob in top], np.sort(row)[::-1][:count], atol=1e-4)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("beam_width", [1, 3])
def test_max_tokens_0_scores_the_prompt_and_gives_n_empty_completions(n, beam_width):
    engine = make_engine(letters())
    request = engine.submit([3, 7, 8], greedy(0, prompt_logprobs=0, n=n, beam_width=beam_width))
    run(engine)
    assert [c.index for c in request.completions] == list(range(n))
    for completion in request.completions:
        assert (completion.token_ids, completion.text, completion.finish_reason) == ([], "", "length")
        expected = [log_softmax(true_row([3]))[7], log_softmax(true_row([3, 7]))[8]]
        np.testing.assert_allclose(completion.prompt_logprobs[1:], expected, atol=1e-4)
    assert len(engine.runner.steps) == 1


@pytest.mark.parametrize("chunk_size", [1, 2, 7, 100])
def test_kept_logits_are_all_rows_whatever_the_chunk(chunk_size):
    engine = make_engine(page_size=1, max_len=16, max_chunk=9, pages=20)
    prompts = [[first, 9, 8, 7, 6, 5, 4, 3, 10, 20, 30][:length] for first, length in ((3, 11), (4, 2), (5, 7))]
    requests = [engine.submit(p, greedy(0), chunk_size=chunk_size, keep_logits=True) for p in prompts]
    run(engine)
    for prompt, request in zip(prompts, requests, strict=True):
        np.testing.assert_array_equal(request.logits, [true_row(prompt[: i + 1]) for i in range(len(prompt))])
    assert max(max(step.counts) for step in engine.runner.steps) <= chunk_size


@pytest.mark.parametrize("more", [{"n": 2}, {"beam_width": 2}])
def test_logits_are_kept_of_a_single_sequence(more):
    with pytest.raises(RequestError, match="single sequence") as error:
        make_engine().submit([3, 4], greedy(5, **more), keep_logits=True)
    assert error.value.param == "n"


def test_pieces_add_up_to_the_completion():
    engine = make_engine(letters())
    request = engine.submit([3, 7], greedy(8, logprobs=1, n=2))
    pieces = run(engine)
    for completion in request.completions:
        mine = [piece for _, piece in pieces if piece.index == completion.index]
        for name in ("token_ids", "logprobs", "top_logprobs"):
            assert [x for piece in mine for x in getattr(piece, name)] == getattr(completion, name)
        assert "".join(piece.text for piece in mine) == completion.text
        assert [piece.finish_reason for piece in mine] == [None] * 7 + ["length"]


# Seeds, n and penalties


def sampled(seed, **more):
    return SamplingParams(max_tokens=8, temperature=1.5, seed=seed, **more)


@pytest.mark.parametrize("more", [{}, {"repetition_penalty": 1.5, "presence_penalty": 0.5}, {"n": 3}])
@pytest.mark.parametrize("layout", [{"max_chunk": 3}, {"pages": 44, "page_size": 1, "max_len": 12}])
def test_a_seeded_text_depends_on_nothing_else_that_runs(more, layout):
    def texts(prompts, **layout):
        engine = make_engine(**layout)
        requests = [engine.submit(p, sampled(7, **more)) for p in prompts]
        run(engine)
        return [sorted((c.index, c.token_ids) for c in r.completions) for r in requests], engine.scheduler.preemptions

    prompts = [[3, 4], [5, 6, 7, 8], [9], [3, 4]]
    alone = [texts([prompt])[0][0] for prompt in prompts]
    together, preemptions = texts(prompts, **layout)
    assert together == alone
    assert alone[0] == alone[3]
    assert len({str(ids) for _, ids in alone[0]}) == more.get("n", 1)
    assert preemptions == 0 or "pages" in layout


def test_n_forced_to_wait_for_pages_gives_the_same_texts():
    def texts(pages):
        engine = make_engine(page_size=1, max_len=12, max_chunk=4, pages=pages)
        requests = [engine.submit([name, 5], sampled(name, n=3)) for name in (3, 4, 5)]
        run(engine)
        return [sorted((c.index, c.token_ids) for c in r.completions) for r in requests], engine.scheduler.preemptions

    roomy, none = texts(200)
    tight, some = texts(30)
    assert (none, some > 0) == (0, True)
    assert tight == roomy


def test_n_computes_the_prompt_once_and_shares_its_pages():
    engine = make_engine(page_size=4, max_len=64, max_chunk=32, pages=100)
    engine.submit([9] * 30, sampled(1, n=8))
    engine.step()
    assert engine.pages.available[0] == 100 - 8  # 30 tokens are 8 pages, and 8 sequences hold them
    engine.step()
    assert engine.pages.available[0] == 100 - 8 - 7  # seven of the eight copy the page that they write into
    assert engine.runner.steps[0].counts == [30]
    assert engine.runner.steps[1].counts == [1] * 8
    assert engine.runner.steps[1].copies == 7


def test_penalties_count_what_was_generated():
    logits = np.full(VOCAB, -20, np.float32)
    logits[[7, 8, 9]] = 5, 4.6, 3
    expected, counts = [], np.zeros(VOCAB)
    for _ in range(12):
        expected.append(int((logits - counts - 0.5 * (counts > 0)).argmax()))
        counts[expected[-1]] += 1
    assert {7, 8, 9} == set(expected)
    engine = make_engine(rule=lambda seen, position: logits)
    request = engine.submit([9, 9, 9], greedy(12, frequency_penalty=1.0, presence_penalty=0.5))
    run(engine)
    assert request.completions[0].token_ids == expected


def test_without_a_seed_two_requests_differ():
    engine = make_engine()
    requests = [engine.submit([3, 4], sampled(None)) for _ in range(2)]
    run(engine)
    assert requests[0].completions[0].token_ids != requests[1].completions[0].token_ids


# Beams


def true_beams(prompt, width, max_tokens, windows):
    """BeamSearch over rows of the formula, with no engine and no cache."""
    beam = BeamSearch(width, max_tokens, (EOS,))
    live = [list(prompt)]
    while not beam.done:
        rows = np.array([log_softmax(true_row(tokens, windows)) for tokens in live], np.float32)
        live = [[*live[parent], token] for parent, token in beam.advance(rows)]
    return beam.results()


@settings(max_examples=25)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(3, 60), min_size=1, max_size=7), st.integers(2, 4)), min_size=1, max_size=4
    ),
    st.sampled_from([(None,), (3,), (None, 2)]),
    st.integers(4, 16),
    st.sampled_from([48, 400]),
    st.integers(1, 3),
)
def test_beams_are_those_of_the_search_alone(asked, windows, budget, pages, page_size):
    engine = make_engine(
        letters(), windows=windows, page_size=page_size, max_len=12, max_chunk=budget, pages=pages, max_sequences=32
    )
    requests = [engine.submit(prompt, greedy(5, beam_width=width, n=width)) for prompt, width in asked]
    run(engine)
    for request, (prompt, width) in zip(requests, asked, strict=True):
        expected = true_beams(prompt, width, 5, windows)
        assert [c.token_ids for c in request.completions] == [list(h.token_ids) for h in expected]
        np.testing.assert_allclose([c.score for c in request.completions], [h.score for h in expected], atol=1e-4)


@pytest.mark.parametrize(("budget", "chunk_size"), [(20, None), (14, None), (10, 1), (12, 4), (15, 2), (16, 3)])
def test_preempted_beams_find_the_same(budget, chunk_size):
    engine = make_engine(letters(), page_size=1, max_len=12, max_chunk=budget, pages=36, max_sequences=32)
    prompts = [[3, 9, 9], [4, 8], [5, 30, 7, 7], [6, 6], [7, 50], [8]]
    requests = [engine.submit(p, greedy(8, beam_width=3, n=3), chunk_size=chunk_size) for p in prompts]
    run(engine)
    assert engine.scheduler.preemptions > 0
    for prompt, request in zip(prompts, requests, strict=True):
        assert [c.token_ids for c in request.completions] == [
            list(h.token_ids) for h in true_beams(prompt, 3, 8, (None,))
        ]


# Errors


@pytest.mark.parametrize("more", [{}, {"prompt_logprobs": 0}, {"beam_width": 2}, {"n": 2}, {"temperature": 1.0}])
@pytest.mark.parametrize("place", [0, 3])
def test_nan_logits_fail_their_own_request_only(more, place):
    engine = make_engine(max_chunk=6)
    healthy = [engine.submit([3, 4], greedy(8)), engine.submit([5, 6, 7], greedy(8))]
    engine.step()
    prompt = [8] * 6
    prompt[place] = NAN_TOKEN
    ill = engine.submit(prompt, SamplingParams(**{"max_tokens": 8, "temperature": 0} | more))
    healthy.append(engine.submit([6], greedy(8)))
    run(engine)
    assert isinstance(ill.error, CheckpointError)
    assert "NaN" in str(ill.error) or "nan" in str(ill.error)
    assert (ill.finished, ill.completions) == (True, [])
    for request in healthy:
        assert request.error is None
        assert request.completions[0].token_ids == true_greedy(request.prompt, 8)


@pytest.mark.parametrize(
    ("prompt", "params", "param"),
    [
        ([], {}, "prompt"),
        (np.array([], np.int64), {}, "prompt"),
        ([-1], {}, "prompt"),
        ([VOCAB], {}, "prompt"),
        ([1 << 70], {}, "prompt"),
        ([1.5], {}, "prompt"),
        ([True], {}, "prompt"),
        (["a"], {}, "prompt"),
        ([[1], [2, 3]], {}, "prompt"),
        ([[1, 2], [3, 4]], {}, "prompt"),
        ([3] * 16, {}, "prompt"),
        ([3] * 17, {"max_tokens": 0}, "prompt"),
        ([3], {"logit_bias": {VOCAB: 1.0}}, "logit_bias"),
        ([3], {"stop": "x"}, "stop"),
        ([3] * 2, {"n": 8, "max_tokens": 14}, "n"),
        ([3] * 2, {"beam_width": 8, "max_tokens": 14}, "beam_width"),
        ([3], {"n": 17, "max_tokens": 1}, "n"),
        ([3], {"beam_width": 2, "logprobs": 0}, "logprobs"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_by_the_name_of_its_field(prompt, params, param):
    engine = make_engine(**SMALL, pages=100)
    with pytest.raises(RequestError) as error:
        engine.submit(prompt, SamplingParams(**params))
    assert error.value.param == param
    assert "\n" not in str(error.value)
    assert not engine.has_work


def test_the_context_is_exactly_as_long_as_it_says():
    engine = make_engine(**SMALL)
    scored, continued = engine.submit([3] * 16, greedy(0)), engine.submit([3] * 15, greedy(9))
    run(engine)
    assert scored.completions[0].finish_reason == "length"
    assert len(continued.completions[0].token_ids) == 1


def test_numpy_prompts_are_taken():
    engine = make_engine()
    request = engine.submit(np.array([3, 4, 5]), greedy(4))
    run(engine)
    assert request.completions[0].token_ids == true_greedy([3, 4, 5], 4)
    assert all(type(token) is int for token in request.completions[0].token_ids)


def interrupted(batch):
    raise KeyboardInterrupt


def test_after_a_step_that_was_interrupted_all_go_on_as_if_it_had_not_been(monkeypatch):
    engine = make_engine(page_size=4)
    forked = engine.submit([3, 4, 5], SamplingParams(max_tokens=10, n=3, seed=1))
    alone = make_engine(page_size=4)
    expected = alone.submit([3, 4, 5], SamplingParams(max_tokens=10, n=3, seed=1))
    run(alone)
    while not forked.forked:
        engine.step()
    doomed = engine.submit([7] * 6, greedy(4))
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):  # the step in which the three would have parted: copies were due
            engine.step()
    engine.abort(doomed)
    run(engine)
    found = {c.index: c.token_ids for c in forked.completions}
    assert found == {c.index: c.token_ids for c in expected.completions}
    assert engine.pages.available == list(engine.pages.layout.pages)
