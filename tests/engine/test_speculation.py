"""Speculation by looking up: fewer steps where a text repeats itself, and the same text everywhere."""

import numpy as np
from fake_runner import VOCAB, babble, check_books, make_engine, run, spell
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import letters

from maestrale.engine.lookup import LookUp
from maestrale.errors import RequestError
from maestrale.sampling.params import SamplingParams


def greedy(max_tokens, **more):
    return SamplingParams(max_tokens=max_tokens, temperature=0, **more)


# What is drafted


def test_a_draft_is_what_followed_the_same_three_tokens_the_last_time():
    text = [1, 2, 3, 40, 41, 1, 2, 3, 50, 51, 52, 1, 2, 3]
    assert LookUp().draft(text, 3) == [50, 51, 52]
    assert LookUp().draft(text, 2) == [50, 51]
    assert LookUp().draft([*text, 9], 3) == []
    assert LookUp().draft([], 3) == LookUp().draft([1, 2, 3], 3) == []


def test_of_two_places_the_one_with_more_of_the_text_before_it_counts():
    long = list(range(10, 18))
    text = [*long, 50, 51, 52, 53, 1, *long[-3:], 60, 61, 62, *long]
    assert LookUp().draft(text, 3) == [50, 51, 52]


def test_a_text_that_has_only_begun_to_repeat_itself_goes_round():
    assert LookUp().draft([7, 8, 9, 7, 8, 9], 4) == [7, 8, 9, 7]


def test_a_text_may_be_read_as_it_grows():
    text = np.random.default_rng(0).integers(3, 6, size=200).tolist()
    growing = LookUp()
    for end in range(len(text)):
        assert growing.draft(text[:end], 4) == LookUp().draft(text[:end], 4)


def test_a_long_text_is_read_in_parts_and_drafted_from_when_all_is_read():
    text = [*range(3000), 5, 6, 7]
    lookup = LookUp()
    assert [lookup.draft(text, 4) for _ in range(3)] == [[], [], [8, 9, 10, 11]]


def test_drafts_grow_while_they_are_right_and_rest_when_they_are_wrong():
    lookup, text, lengths = LookUp(), [1, 2, 3] * 20, []
    for right in (True, True, True, False):
        lengths.append(len(lookup.draft(text, 100)))
        lookup.learn(lengths[-1], lengths[-1] if right else 0)
    assert lengths == [4, 8, 15, 15]
    waits = []
    for _ in range(7):
        steps = 0
        while not (draft := lookup.draft(text, 100)):
            steps += 1
        waits.append(steps)
        lookup.learn(len(draft), 0)
    assert waits == [4, 8, 16, 32, 64, 64, 64]
    while not lookup.draft(text, 100):
        pass
    lookup.learn(1, 1)
    assert len(lookup.draft(text, 100)) == 2


# Steps


def test_a_text_that_copies_its_prompt_takes_a_fraction_of_the_steps():
    passage = np.random.default_rng(1).permutation(np.arange(3, 60)).tolist()[:40]
    engine = make_engine(rule=spell(41, {9: passage}), max_len=100, max_chunk=64)
    request = engine.submit([9, *passage], greedy(40))
    run(engine)
    assert request.completions[0].token_ids == passage
    # The prompt; three tokens alone, before anything is recognised; then 1 + 4, 1 + 8, 1 + 15 and the rest.
    assert [step.counts for step in engine.runner.steps] == [[41], [1], [1], [5], [9], [16], [7]]
    assert (engine.speculation.drafted, engine.speculation.accepted) == (33, 33)


def test_it_can_be_left_out():
    engine = make_engine(rule=spell(1, {3: [4, 5] * 20}), speculate=False)
    engine.submit([3], greedy(40))
    run(engine)
    assert [step.counts for step in engine.runner.steps] == [[1]] * 40


def test_no_step_of_many_sequences_drafts():
    engine = make_engine(rule=babble, pages=400)
    for first in range(3, 19):
        engine.submit([first, 3, 4, 3, 4, 3, 4], greedy(4))
    run(engine)
    assert engine.speculation.drafted == 0


def test_who_drafts_does_not_hold_up_who_reads():
    engine = make_engine(rule=babble, max_chunk=4)
    requests = [engine.submit([first, 3, 4, 3, 4, 3, 4, 3], greedy(30)) for first in (5, 6)]
    while not all(request.forked for request in requests):
        engine.step()
    while not any(request.finished for request in requests):
        assert {request for request, _ in engine.step()} == set(requests)


# The same text

REQUEST = st.fixed_dictionaries(
    {
        "prompt": st.lists(st.integers(3, 9), min_size=1, max_size=16),
        "count": st.integers(4, 40),
        "arrives": st.integers(0, 20),
        "more": st.sampled_from(
            [
                {},
                {},
                {"temperature": 0.7},
                {"n": 3, "temperature": 0.7},
                {"repetition_penalty": 1.3, "presence_penalty": 0.4},
                {"min_tokens": 1, "logprobs": 2},
                {"prompt_logprobs": 1, "stop": ("#$", "%")},
                {"stop": "&&"},
                {"beam_width": 2},
            ]
        ),
    }
)


def answers(asked, speculate, **layout):
    engine = make_engine(letters(), rule=babble, speculate=speculate, max_len=64, max_sequences=6, **layout)
    waiting, requests, pieces, step = sorted(enumerate(asked), key=lambda r: r[1]["arrives"]), {}, [], 0
    while waiting or engine.has_work:
        while waiting and waiting[0][1]["arrives"] <= step:
            i, one = waiting.pop(0)
            params = SamplingParams(**{"max_tokens": one["count"], "temperature": 0, "seed": i} | one["more"])
            try:
                requests[i] = engine.submit(one["prompt"], params)
            except RequestError:
                requests[i] = None
        pieces += engine.step()
        check_books(engine)
        step += 1
        assert step < 3000
    assert engine.pages.available == list(engine.pages.layout.pages)
    for i, request in requests.items():
        if request is not None:
            assert request.error is None
            for completion in request.completions:  # what was streamed adds up to what was answered
                mine = [p for r, p in pieces if r is request and p.index == completion.index]
                assert "".join(p.text for p in mine) == completion.text
                assert [token for p in mine for token in p.token_ids] == completion.token_ids
            requests[i] = [
                (c.token_ids, c.text, c.finish_reason, c.logprobs, c.top_logprobs, c.prompt_logprobs, c.score)
                for c in sorted(request.completions, key=lambda c: c.index)
            ]
    return requests, engine.speculation


ACCEPTED: list[int] = []


@settings(max_examples=150)
@given(
    st.lists(REQUEST, min_size=1, max_size=4),
    st.sampled_from([(None,), (3,), (None, 4), (7, None, 1), (10,)]),
    st.integers(2, 20),
    st.integers(1, 5),
    st.integers(60, 200),
    st.booleans(),
)
def test_no_text_depends_on_drafts(asked, windows, max_chunk, page_size, tokens, prefix_cache):
    layout = {"windows": windows, "max_chunk": max_chunk, "page_size": page_size}
    found, speculation = answers(asked, True, prefix_cache=prefix_cache, pages=-(-tokens // page_size), **layout)
    plain, _ = answers(asked, False, prefix_cache=False, pages=1000, **layout)
    for i, answer in found.items():
        assert answer is None or answer == plain[i]
    assert speculation.accepted <= speculation.drafted
    ACCEPTED.append(speculation.accepted)


def test_the_property_before_did_meet_drafts_that_were_right_and_wrong():
    assert sum(accepted > 0 for accepted in ACCEPTED) > len(ACCEPTED) / 3


def test_the_formula_of_these_tests_repeats_itself_often_but_not_always():
    tokens = [3, 4, 5]
    for _ in range(200):
        tokens.append(int(babble([tokens], len(tokens) - 1).argmax()))
    lookup, right, wrong = LookUp(), 0, 0
    for end in range(10, 200):
        for guess in lookup.draft(tokens[:end], 1):
            right, wrong = right + (guess == tokens[end]), wrong + (guess != tokens[end])
    assert right > wrong > 20
    assert max(tokens) < VOCAB - 2
