"""Prefix caching: what is found, who may find it, and that no text depends on it."""

import pytest
from fake_runner import VOCAB, check_books, make_engine, run, true_greedy, true_row
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import letters

from maestrale.errors import RequestError
from maestrale.sampling.params import SamplingParams


def greedy(max_tokens=4, **more):
    return SamplingParams(max_tokens=max_tokens, temperature=0, **more)


def computed(engine, prompt, params=None, **more):
    """How many tokens the engine computes to answer `prompt` alone, and the request."""
    before = len(engine.runner.steps)
    request = engine.submit(prompt, params or greedy(), **more)
    run(engine)
    return sum(sum(step.counts) for step in engine.runner.steps[before:]), request


@pytest.mark.parametrize("windows", [(None,), (6,), (None, 3)])
def test_the_same_prompt_again_computes_only_its_last_page(windows):
    engine = make_engine(page_size=4, windows=windows, max_chunk=64)
    prompt = list(range(3, 29))  # 26 tokens: six whole pages, of which a greedy answer leaves all in place
    assert computed(engine, prompt)[0] == 26 + 3  # the last of four new tokens is never computed
    count, request = computed(engine, prompt)
    assert count == 2 + 3
    assert request.completions[0].token_ids == true_greedy(prompt, 4, windows)
    assert request.cached == engine.prefixes.found == 24
    assert engine.prefixes.asked == 52


def test_at_least_the_last_token_is_computed():
    engine = make_engine(page_size=4, max_chunk=64)
    prompt = list(range(3, 11))
    assert [computed(engine, prompt)[0] for _ in range(2)] == [8 + 3, 4 + 3]


def test_a_chat_goes_on_from_the_answer_before():
    engine = make_engine(page_size=4, max_chunk=64)
    _, first = computed(engine, list(range(3, 20)), greedy(8))
    turn = [*first.prompt, *first.completions[0].token_ids, 30, 31, 32]  # 17 + 8 + 3, of which 24 were computed
    assert computed(engine, turn, greedy(1))[0] == 28 - 24


def test_other_namespaces_and_other_beginnings_find_nothing():
    engine = make_engine(page_size=4, max_chunk=64)
    prompt = list(range(3, 20))
    computed(engine, prompt, namespace="a")
    assert computed(engine, prompt, namespace="b")[0] == 17 + 3
    assert computed(engine, [9, *prompt[1:]], namespace="a")[0] == 17 + 3
    assert computed(engine, prompt, namespace="a")[0] == 1 + 3


def test_it_can_be_left_out():
    engine = make_engine(page_size=4, max_chunk=64, prefix_cache=False)
    assert [computed(engine, list(range(3, 20)))[0] for _ in range(2)] == [20, 20]
    assert len(engine.pages.pools[0].free) == 64


def test_rows_that_are_asked_for_are_computed_again():
    engine = make_engine(page_size=4, max_chunk=64)
    prompt = list(range(3, 20))
    computed(engine, prompt)
    count, scored = computed(engine, prompt, greedy(4, prompt_logprobs=0))
    assert count == 20
    assert len(scored.completions[0].prompt_logprobs) == 17
    count, kept = computed(engine, prompt, greedy(0), keep_logits=True)
    assert count == 17
    assert all((row == true_row(prompt[: i + 1])).all() for i, row in enumerate(kept.logits))


def test_requests_that_run_at_once_share_their_beginning():
    engine = make_engine(page_size=4, max_chunk=20, pages=64)
    shared = list(range(3, 19))
    requests = [engine.submit([*shared, name], greedy()) for name in (40, 41, 42)]
    engine.step()
    engine.step()
    assert 64 - engine.pages.available[0] == 4 + 3  # four pages of the beginning once, and one more of each
    run(engine)
    assert engine.runner.steps[1].counts == [1, 1, 1]
    for request in requests:
        assert request.completions[0].token_ids == true_greedy(request.prompt, 4)
    assert [request.cached for request in requests] == [0, 16 - 3, 16]  # the second had begun


def test_preempted_requests_find_their_own_pages_again():
    def work(prefix_cache):
        engine = make_engine(page_size=1, max_len=24, max_chunk=8, pages=40, prefix_cache=prefix_cache)
        requests = [engine.submit([name, 5, 6, 7], greedy(16)) for name in (3, 4, 5)]
        run(engine)
        assert engine.scheduler.preemptions > 0
        for request in requests:
            assert request.completions[0].token_ids == true_greedy(request.prompt, 16)
            assert request.cached == 0, "no other had computed anything of it"
        return sum(sum(step.counts) for step in engine.runner.steps)

    useful = 3 * (4 + 15)
    assert useful < work(True) < work(False)


# All at once

BEGINNINGS = [[9] * 12, [9] * 7 + [8] * 5, list(range(3, 25))]
PROMPTS = st.builds(
    lambda which, length, rest: [*BEGINNINGS[which][:length], *rest],
    st.integers(0, 2),
    st.integers(0, 22),
    st.lists(st.integers(3, VOCAB - 2), min_size=1, max_size=4),
)
REQUEST = st.fixed_dictionaries(
    {
        "prompt": PROMPTS,
        "count": st.integers(1, 14),
        "arrives": st.integers(0, 30),
        "leaves": st.none() | st.integers(1, 12),
        "namespace": st.sampled_from(["", "", "other"]),
        "more": st.sampled_from([{}, {}, {"n": 3}, {"prompt_logprobs": 1}, {"beam_width": 2}]),
    }
)


def answers(asked, tight, prefix_cache, **layout):
    """What each request gets that nobody aborts; the books are looked at after every step."""
    engine = make_engine(letters(), prefix_cache=prefix_cache, max_len=40, max_sequences=6, **layout)
    waiting, running, found, step = sorted(enumerate(asked), key=lambda r: r[1]["arrives"]), {}, {}, 0
    while waiting or engine.has_work:
        while waiting and waiting[0][1]["arrives"] <= step:
            i, one = waiting.pop(0)
            params = SamplingParams(max_tokens=one["count"], temperature=1.0, seed=i, **one["more"])
            try:
                running[i] = engine.submit(one["prompt"], params, namespace=one["namespace"]), one["leaves"], step
            except RequestError:
                found[i] = None
        engine.step()
        check_books(engine)
        step += 1
        assert step < 3000
        for request, leaves, came in running.values():
            if tight and leaves is not None and step >= came + leaves:
                engine.abort(request)
                check_books(engine)
    assert engine.pages.available == list(engine.pages.layout.pages)
    for i, (request, leaves, _) in running.items():
        if leaves is None:
            assert request.error is None
            key = sorted((c.index, c.token_ids, c.prompt_logprobs) for c in request.completions)
            found[i] = key
    return found, engine


@settings(max_examples=150)
@given(
    st.lists(REQUEST, min_size=1, max_size=9),
    st.sampled_from([(None,), (3,), (None, 4), (7, None, 1), (10,)]),
    st.integers(2, 20),
    st.integers(1, 5),
    st.integers(30, 100),
)
def test_no_text_depends_on_what_was_cached(asked, windows, max_chunk, page_size, tokens):
    layout = {"windows": windows, "max_chunk": max_chunk, "page_size": page_size}
    pages = -(-tokens // page_size)
    tight, engine = answers(asked, True, True, pages=pages, **layout)
    roomy, _ = answers(asked, False, False, pages=1000, **layout)
    for i, found in tight.items():
        assert found is None or found == roomy[i]
    hits.append(engine.prefixes.found)


hits: list[int] = []


def test_the_property_before_did_meet_cached_pages():
    assert sum(hit > 0 for hit in hits) > len(hits) / 4
