"""A runner of several stages: many steps under way at once, and the same tokens."""

from collections import deque

import pytest
from fake_runner import FakeRunner, make_layout, true_greedy
from hypothesis import given
from hypothesis import strategies as st

from maestrale.engine.engine import Engine
from maestrale.errors import DistributedError
from maestrale.sampling.params import SamplingParams


class Stages(FakeRunner):
    """The fake runner as a pipeline: what is sent is computed in order, and only later asked for."""

    draws = False

    def __init__(self, layout, depth):
        super().__init__(layout)
        self.depth, self.under_way, self.most = depth, deque(), 0

    def begin(self, batch):
        self.under_way.append(super().step(batch))
        self.most = max(self.most, len(self.under_way))
        assert len(self.under_way) <= self.depth
        return self.receive

    def receive(self):
        return self.under_way.popleft()

    def step(self, batch):
        assert self.depth == 1, "a pipeline is sent to"
        return super().step(batch)


def drive(depth, prompts, counts, aborted=(), **layout):
    runner = Stages(make_layout(**layout), depth)
    engine = Engine(runner, 64, None, 8)
    requests = [
        engine.submit(prompt, SamplingParams(max_tokens=count, temperature=0, ignore_eos=True))
        for prompt, count in zip(prompts, counts, strict=True)
    ]
    steps = 0
    while engine.has_work:
        engine.step()
        steps += 1
        for i in aborted:
            if steps == 3 + i:
                engine.abort(requests[i])
    while engine.step():
        pass
    counters = engine.counters()
    for pool in counters.pools:
        assert pool.free + pool.cached == pool.total
    return runner, requests


lists = st.lists(st.lists(st.integers(3, 60), min_size=1, max_size=20), min_size=1, max_size=6)


@given(
    st.integers(1, 4),
    lists,
    st.data(),
    st.sampled_from([(None,), (5,), (None, 4)]),
    st.integers(30, 64),
    st.integers(2, 8),
)
def test_tokens_do_not_depend_on_how_many_steps_are_under_way(depth, prompts, data, windows, pages, chunk):
    counts = [data.draw(st.integers(1, 10)) for _ in prompts]
    _, requests = drive(depth, prompts, counts, windows=windows, pages=pages, max_chunk=chunk)
    for prompt, count, request in zip(prompts, counts, requests, strict=True):
        assert request.completions[0].token_ids == true_greedy(prompt, count, windows)


def test_all_stages_have_work_when_there_are_as_many_sequences():
    runner, _ = drive(3, [[5], [6], [7]], [10] * 3)
    assert runner.most == 3
    assert max(len(step.counts) for step in runner.steps) == 1  # a sequence for each stage


def test_chunks_of_one_long_prompt_fill_the_pipe():
    runner, requests = drive(3, [[*range(3, 33)]], [1], max_chunk=4)
    assert runner.most == 3
    assert requests[0].completions[0].token_ids == true_greedy([*range(3, 33)], 1)


def test_a_request_aborted_while_it_is_under_way_gives_its_pages_back_and_harms_nobody():
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12]]
    _, requests = drive(2, prompts, [12] * 3, aborted=(1,), pages=40)
    for i in (0, 2):
        assert requests[i].completions[0].token_ids == true_greedy(prompts[i], 12)
    assert not requests[1].completions


def test_a_lost_rank_is_nobodys_request_and_ends_the_engine():
    runner = Stages(make_layout(), 2)
    engine = Engine(runner, 64, None, 8)
    engine.submit([5], SamplingParams(max_tokens=5))

    def lost():
        raise DistributedError("rank 1 on there: gone")

    runner.receive = lost
    with pytest.raises(DistributedError, match="rank 1"):
        engine.step()
