"""The engine's counters, each counted once more by hand."""

from dataclasses import FrozenInstanceError, replace

import pytest
from fake_runner import NAN_TOKEN, make_engine, run, spell
from tiny import letters

from maestrale.sampling.params import SamplingParams


def greedy(max_tokens=4, **more):
    return SamplingParams(max_tokens=max_tokens, temperature=0, **more)


def test_counters_follow_requests_from_the_queue_to_their_end():
    engine = make_engine(page_size=4, max_chunk=64, pages=32, max_sequences=3, windows=(None, 5))
    engine.submit(list(range(3, 20)), greedy())
    engine.submit([40, 41], greedy(n=2))
    engine.submit([50], greedy())
    found = engine.counters()
    assert (found.waiting, found.running, found.sequences, found.steps) == (3, 0, 0, 0)
    assert (found.tokens_in, found.tokens_out) == (17 + 2 + 1, 0)
    engine.step()
    found = engine.counters()
    assert (found.waiting, found.running, found.sequences, found.steps) == (1, 2, 3, 1)
    assert found.tokens_out == 3
    assert [(pool.window, pool.total, pool.free, pool.cached, pool.in_step) for pool in found.pools] == [
        (None, 32, 32 - 5 - 1, 0, 5 + 1),
        (5, 32, 32 - 5 - 1, 0, 5 + 1),
    ]
    run(engine)
    found = engine.counters()
    assert found.pools[0].in_step == 1, "of the last one, which has ended"
    assert (found.waiting, found.running, found.sequences) == (0, 0, 0)
    assert found.tokens_out == 4 * 4
    assert found.pools[0].cached == 5 + 1 + 1  # of 17 + 3, 2 + 3 (twice the same) and 1 + 3 computed tokens
    assert found.pools[0].free + found.pools[0].cached == 32
    assert (found.prefix_asked, found.prefix_found, found.preemptions, found.failed) == (20, 0, 0, 0)
    engine.submit(list(range(3, 20)), greedy())
    run(engine)
    after = engine.counters()
    assert (after.prefix_asked, after.prefix_found) == (37, 16)
    with pytest.raises(FrozenInstanceError):
        after.steps = 0
    assert replace(after, steps=0) != after


def test_an_end_of_sequence_is_no_token_out():
    engine = make_engine(letters(), rule=spell(1, {3: [9, 9, 2]}))
    engine.submit([3], greedy(8))
    run(engine)
    assert engine.counters().tokens_out == 2


def test_preemptions_evictions_and_failures_are_counted():
    engine = make_engine(page_size=1, max_len=10, max_chunk=4, pages=12)
    for name in (3, 4, 5, 6):
        engine.submit([name, 5], greedy(8))
    engine.submit([NAN_TOKEN], greedy())
    run(engine)
    found = engine.counters()
    assert found.preemptions == engine.scheduler.preemptions > 0
    assert found.pools[0].evictions > 0
    assert (found.failed, found.failed_steps) == (1, 0)
    engine.submit([7], greedy())
    engine.runner.step = lambda batch: 1 / 0
    run(engine)
    assert (engine.counters().failed, engine.counters().failed_steps) == (2, 1)
