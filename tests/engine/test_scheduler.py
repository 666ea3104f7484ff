"""Who computes when: the budget, the order, preemption, and that nobody waits for ever."""

from fake_runner import VOCAB, make_engine, run, true_greedy
from hypothesis import given, settings
from hypothesis import strategies as st

from maestrale.errors import RequestError
from maestrale.sampling.params import SamplingParams


def greedy(max_tokens, **more):
    return SamplingParams(max_tokens=max_tokens, temperature=0, **more)


WINDOWS = st.sampled_from([(None,), (3,), (None, 4), (7, None, 1)])
REQUESTS = st.lists(
    st.tuples(st.lists(st.integers(3, VOCAB - 2), min_size=1, max_size=20), st.integers(0, 12), st.integers(0, 10)),
    min_size=1,
    max_size=8,
)


@settings(max_examples=80)
@given(REQUESTS, WINDOWS, st.integers(1, 9), st.integers(1, 4), st.integers(16, 60), st.integers(1, 5))
def test_every_text_is_the_formulas_whatever_else_runs(requests, windows, max_chunk, page_size, pages, max_sequences):
    engine = make_engine(
        windows=windows, max_chunk=max_chunk, page_size=page_size, max_len=32, pages=pages, max_sequences=max_sequences
    )
    waiting, submitted, step = sorted(requests, key=lambda r: r[2]), [], 0
    while waiting or engine.has_work:
        while waiting and waiting[0][2] <= step:
            prompt, count, _ = waiting.pop(0)
            submitted.append((prompt, count, try_submit(engine, prompt, count, windows, page_size, max_chunk, pages)))
        engine.step()
        step += 1
        assert step < 3000
    run(engine)
    for prompt, count, request in submitted:
        if request is not None:
            (completion,) = request.completions
            assert completion.token_ids == true_greedy(prompt, count, windows)
            assert completion.finish_reason == "length"


def try_submit(engine, prompt, count, windows, page_size, max_chunk, pages):
    """None where one sequence alone needs more pages than there are, and exactly then."""
    length = len(prompt) + count
    kept = [min(32, length) if w is None else min(32, length, w + max_chunk - 1 + page_size) for w in windows]
    try:
        return engine.submit(prompt, greedy(count))
    except RequestError:
        assert any(-(-tokens // page_size) > pages for tokens in kept)
        return None


def test_a_prompt_is_computed_in_chunks_of_the_budget_and_a_token_costs_one_step():
    engine = make_engine(max_chunk=8)
    engine.submit(list(range(3, 23)), greedy(4))
    run(engine)
    assert [step.counts for step in engine.runner.steps] == [[8], [8], [4], [1], [1], [1]]


def test_logits_are_computed_only_for_rows_that_need_them():
    engine = make_engine(max_chunk=8)
    engine.submit(list(range(3, 23)), greedy(4))
    engine.submit([5, 6], greedy(4))
    run(engine)
    # The long prompt has the budget for two steps, which want none of its rows; then both give one row a step.
    assert [step.rows for step in engine.runner.steps] == [0, 0, 2, 2, 2, 2]


def test_sequences_that_need_one_token_come_before_prompts():
    engine = make_engine(max_chunk=4, max_len=64)
    engine.submit([3, 4], greedy(10))
    engine.step()
    engine.submit(list(range(4, 44)), greedy(1))
    run(engine)
    for step in engine.runner.steps[1:10]:
        assert step.counts == [1, 3]
        assert step.names == [3, 4]


def test_an_older_prompt_in_small_chunks_does_not_hold_up_forks():
    engine = make_engine(max_chunk=4)
    engine.submit([9] * 30, greedy(1), chunk_size=3)
    engine.submit([3], greedy(5, n=3))
    run(engine)
    assert [(s.names, s.counts) for s in engine.runner.steps[:2]] == [([9, 3], [3, 1]), ([3, 3, 3, 9], [1, 1, 1, 1])]


def test_prompts_share_a_step_in_order_of_arrival():
    engine = make_engine(max_chunk=8)
    for first, length in ((3, 5), (4, 5), (5, 5)):
        engine.submit([first] * length, greedy(1))
    run(engine)
    assert [(s.names, s.counts) for s in engine.runner.steps] == [([3, 4], [5, 3]), ([4, 5], [2, 5])]


def test_no_more_sequences_run_than_are_allowed():
    engine = make_engine(max_sequences=3)
    for first in range(3, 13):
        engine.submit([first], greedy(5))
    run(engine)
    assert max(len(step.counts) for step in engine.runner.steps) == 3


def test_a_request_wider_than_the_limit_runs_alone():
    engine = make_engine(max_sequences=2)
    engine.submit([3], greedy(3))
    wide = engine.submit([4], greedy(3, n=4))
    run(engine)
    assert len(wide.completions) == 4
    assert [3, 4] not in [step.names[:2] for step in engine.runner.steps]


def test_pages_run_out_and_the_one_that_came_last_gives_way():
    engine = make_engine(page_size=1, max_len=10, max_chunk=4, pages=12)
    requests = [engine.submit([name, 5], greedy(8)) for name in (3, 4, 5)]
    lost = []  # who was preempted, in order
    while engine.has_work:
        running = list(engine.scheduler.running)
        engine.step()
        lost += [request for request in running if request in engine.scheduler.waiting]
    assert len(lost) == engine.scheduler.preemptions > 0
    assert lost[0] is requests[2]
    assert requests[0] not in lost
    for request in requests:
        assert request.completions[0].token_ids == true_greedy(request.prompt, 8)


def test_preempted_requests_come_back_before_newer_ones_in_their_order():
    engine = make_engine(page_size=1, max_len=12, max_chunk=12, pages=14)
    requests = [engine.submit([name] * 3, greedy(8)) for name in (3, 4, 5, 6)]
    newest, ended = engine.submit([7] * 3, greedy(8)), []
    while engine.has_work:
        ended += [request for request, piece in engine.step() if piece.finish_reason]
    assert engine.scheduler.preemptions > 0
    assert ended == [*requests, newest]


def test_a_stream_of_short_requests_does_not_starve_a_long_prompt():
    engine = make_engine(page_size=1, max_len=20, max_chunk=12, pages=24)
    for _ in range(4):
        engine.submit([3], greedy(4))
        engine.step()
    long = engine.submit([9] * 18, greedy(2))
    for _ in range(50):  # the short ones end one by one, each leaving fewer pages than the long one's next chunk takes
        engine.submit([4], greedy(4))
        engine.step()
    assert long.finished
    assert long.completions[0].token_ids == true_greedy([9] * 18, 2)


def test_a_stream_of_long_prompts_does_not_hold_up_who_is_read():
    engine = make_engine(max_chunk=4)
    reader = engine.submit([3], greedy(30))
    for step in range(30):
        engine.submit([4] * 20, greedy(1))
        pieces = engine.step()
        assert [piece for request, piece in pieces if request is reader], f"no token in step {step}"
    assert reader.finished


def test_an_aborted_request_frees_its_pages_at_once_wherever_it_is():
    engine = make_engine(page_size=1, max_len=10, max_chunk=4, pages=12)
    running, waiting = engine.submit([3] * 8, greedy(2)), engine.submit([4] * 8, greedy(2))
    engine.step()
    assert engine.scheduler.running == [running]
    engine.abort(running)
    assert engine.pages.available[0] == 12
    engine.abort(running)
    engine.abort(waiting)
    assert not engine.has_work
    assert engine.step() == []


def test_preemption_frees_all_kinds_of_layers():
    engine = make_engine(windows=(None, 3), page_size=1, max_len=10, max_chunk=2, pages=12)
    requests = [engine.submit([name, 5], greedy(8)) for name in (3, 4, 5)]
    run(engine)
    assert engine.scheduler.preemptions > 0
    for request in requests:
        assert request.completions[0].token_ids == true_greedy(request.prompt, 8, (None, 3))
