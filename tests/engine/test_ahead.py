"""A runner that draws tokens is given the next step before the last one is read; nobody's tokens depend on it."""

import random
from operator import attrgetter

import numpy as np
import pytest
from fake_runner import NAN_TOKEN, VOCAB, FakeRunner, check_books, make_layout, row_for, run, true_greedy
from hypothesis import given, settings
from hypothesis import strategies as st
from test_drawing import DrawingRunner
from tiny import letters

from maestrale.engine.engine import Engine
from maestrale.errors import MaestraleError, MemoryLimitError
from maestrale.sampling.params import SamplingParams

BY_INDEX = attrgetter("index")
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


def engine_on(runner, tokenizer=None):
    return Engine(runner, VOCAB, tokenizer, 16)


def rows(runner):
    return sum(step.rows for step in runner.steps)


def test_the_next_step_is_under_way_while_one_is_read():
    runner = DrawingRunner(make_layout())
    engine = engine_on(runner)
    requests = [engine.submit([5 + i, 6], GREEDY) for i in range(3)]
    run(engine)
    assert runner.log == ["begin", *["begin", "read"] * 5, "read"]
    assert rows(runner) == 3 * 6  # whose length is known ends without a token too many
    for i, request in enumerate(requests):
        assert request.completions[0].token_ids == true_greedy([5 + i, 6], 6)


def test_a_prompt_is_cut_into_chunks_and_joined_as_ever():
    runner = DrawingRunner(make_layout(max_chunk=4))
    engine = engine_on(runner)
    first = engine.submit([5, 6], GREEDY)
    long = engine.submit([*range(3, 33)], GREEDY)
    run(engine)
    assert first.completions[0].token_ids == true_greedy([5, 6], 6)
    assert long.completions[0].token_ids == true_greedy([*range(3, 33)], 6)


def test_who_ends_by_what_it_says_has_computed_one_token_too_many():
    def third_ends(seen, position):
        row = row_for(seen, position)
        row[2] = 40 if position == 3 else -50
        return row

    runner = DrawingRunner(make_layout(), third_ends)
    engine = engine_on(runner, letters(VOCAB))
    request = engine.submit([5, 6], SamplingParams(temperature=0, max_tokens=9))
    run(engine)
    assert len(request.completions[0].token_ids) == 2
    assert request.completions[0].finish_reason == "stop"
    assert rows(runner) == 4  # two tokens, the end, and one that was begun before the end was read


@pytest.mark.parametrize(
    "needs", [{"logprobs": 1}, {"repetition_penalty": 1.3}, {"prompt_logprobs": 0}, {"beam_width": 2}]
)
def test_nothing_is_begun_behind_a_step_of_which_rows_are_wanted(needs):
    runner = DrawingRunner(make_layout())
    engine = engine_on(runner)
    engine.submit([5, 6], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, **needs))
    engine.submit([7, 6], GREEDY)
    run(engine)
    held = 1 if "prompt_logprobs" in needs else 4  # steps in which the first request wants rows
    assert runner.log[: 2 * held] == ["begin", "read"] * held
    assert runner.log[2 * held : 2 * held + 2] == ["begin", "begin"]


def test_a_row_of_nan_ends_its_request_alone_though_its_next_step_is_under_way():
    engine = engine_on(DrawingRunner(make_layout()))
    bad, good = engine.submit([5, NAN_TOKEN], GREEDY), engine.submit([5, 6], GREEDY)
    run(engine)
    assert "nan" in str(bad.error)
    assert good.completions[0].token_ids == true_greedy([5, 6], 6)


class Failing(DrawingRunner):
    """Fails where `fault(batch)` gives an error: at once, or (late) when it is asked what it brought; then nothing of
    what the step would have written is there."""

    def __init__(self, layout, fault, late):
        super().__init__(layout)
        self.fault, self.late = fault, late

    def begin(self, batch):
        if (error := self.fault(batch)) is None:
            return super().begin(batch)
        if not self.late:
            raise error
        self.tokens = np.full(len(batch.logit_rows), -1)

        def read():
            raise error

        return read


@pytest.mark.parametrize("late", [False, True])
def test_a_step_that_fails_takes_back_the_one_behind_it_and_only_the_guilty_fails(late):
    poison = 62
    runner = Failing(
        make_layout(), lambda batch: MemoryLimitError("too much") if poison in batch.token_ids else None, late
    )
    engine = engine_on(runner)
    good = [engine.submit([5 + i, 6], GREEDY) for i in range(2)]
    for _ in range(2):
        engine.step()
    bad = engine.submit([9, poison], GREEDY)
    late_comer = engine.submit([11, 6], GREEDY)
    run(engine)
    assert isinstance(bad.error, MaestraleError)
    for request in (*good, late_comer):
        assert request.completions[0].token_ids == true_greedy(request.prompt, 6)


@pytest.mark.parametrize("late", [False, True])
def test_ctrl_c_in_a_step_leaves_whole_pages_and_the_same_text(late):
    calls = []

    def fault(batch):
        calls.append(batch)
        return KeyboardInterrupt() if len(calls) == 4 else None

    engine = engine_on(Failing(make_layout(), fault, late))
    requests = [engine.submit([5 + i, 6], GREEDY) for i in range(2)]
    with pytest.raises(KeyboardInterrupt):
        run(engine)
    check_books(engine)
    run(engine)
    for request in requests:
        assert request.completions[0].token_ids == true_greedy(request.prompt, 6)


def params_of(draw):
    count = draw.randrange(1, 12)
    kind = draw.choice(["greedy", "greedy", "drawn", "drawn", "several", "penalized", "beams", "scored"])
    if kind == "greedy":
        return SamplingParams(temperature=0, max_tokens=count, stop=draw.choice([(), ("e",), ("gh", "k")]))
    if kind == "drawn":
        return SamplingParams(temperature=1, seed=draw.randrange(9), max_tokens=count, min_tokens=draw.randrange(count))
    if kind == "several":
        return SamplingParams(temperature=1, seed=1, n=3, max_tokens=count)
    if kind == "penalized":
        return SamplingParams(temperature=0, frequency_penalty=0.5, max_tokens=count)
    if kind == "beams":
        return SamplingParams(beam_width=2, max_tokens=count)
    return SamplingParams(temperature=0, prompt_logprobs=1, max_tokens=draw.choice([0, count]))


def ends_now_and_then(seen, position):
    row = row_for(seen, position)
    row[2] = 5 if sum(map(sum, seen)) % 7 == 0 else -50
    return row


@settings(max_examples=300)
@given(st.integers(0, 1 << 30), st.sampled_from([(None,), (5,), (None, 4)]), st.integers(3, 9), st.booleans())
def test_any_mix_of_requests_gives_what_it_gives_one_step_at_a_time(seed, windows, chunk, tight):
    draw = random.Random(seed)
    starts = [[draw.randrange(3, 60) for _ in range(20)] for _ in range(2)]
    asked = [(draw.choice(starts)[: draw.randrange(1, 21)], params_of(draw)) for _ in range(draw.randrange(1, 7))]
    layout = make_layout(windows=windows, max_chunk=chunk, pages=60 if tight else 400)
    tokenizer = letters(VOCAB)
    plain = engine_on(FakeRunner(layout, ends_now_and_then), tokenizer)
    expected = [plain.submit(prompt, params) for prompt, params in asked]
    run(plain)
    ahead = engine_on(DrawingRunner(layout, ends_now_and_then), tokenizer)
    requests, aborted = [], []
    for prompt, params in asked:
        requests.append(ahead.submit(prompt, params))
        if draw.random() < 0.3:
            aborted.append(ahead.submit(prompt[::-1], GREEDY))
        for _ in range(draw.randrange(4)):
            ahead.step()
            check_books(ahead)
        if aborted and draw.random() < 0.5:
            ahead.abort(aborted.pop())
    run(ahead)
    for ours, theirs in zip(requests, expected, strict=True):
        assert ours.error is None
        assert sorted(ours.completions, key=BY_INDEX) == sorted(theirs.completions, key=BY_INDEX)
