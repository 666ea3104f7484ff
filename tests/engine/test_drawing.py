"""A runner that draws tokens itself: the same texts as without it, and rows travel only where they are needed."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from fake_runner import NAN_TOKEN, VOCAB, FakeRunner, babble, make_layout, row_for, run
from tiny import letters

from maestrale.batch import StepOutput
from maestrale.engine.engine import Engine
from maestrale.sampling.params import SamplingParams
from maestrale.torch_backend.draw import draw


class Fetched:
    def __init__(self, rows, log):
        self.rows, self.log = rows, log

    def __getitem__(self, which):
        self.log.append(which)
        return self.rows[which]


class DrawingRunner(FakeRunner):
    """As a device does: steps are computed in order, and a step may go on from tokens of the one before it that
    nobody has read. log: when a step was set going, and when it was read."""

    draws, depth = True, 2

    def __init__(self, *args):
        super().__init__(*args)
        self.fetched, self.drawn, self.log, self.tokens = [], 0, [], None

    def begin(self, batch):
        self.log.append("begin")
        if batch.follows is not None:
            places, rows = batch.follows.T
            assert not batch.token_ids[places].any()
            batch = replace(batch, token_ids=batch.token_ids.copy())
            batch.token_ids[places] = self.tokens[rows].clip(0)
        rows = super().step(batch).logits
        self.tokens = tokens = draw(torch.from_numpy(rows), batch.draws).numpy()
        self.drawn += int((tokens >= 0).sum())

        def read():
            self.log.append("read")
            return StepOutput(Fetched(rows, self.fetched), tokens=tokens)

        return read

    def step(self, batch):
        raise AssertionError("it is set going")


def answers(runner, asked, rule, tokenizer=None, **more):
    engine = Engine(runner, VOCAB, tokenizer, 16)
    prompts = [[5 + i, 6, 7 + i % 3, 8] for i in range(len(asked))]
    requests = [engine.submit(prompt, params, **more) for prompt, params in zip(prompts, asked, strict=True)]
    run(engine)
    return requests


def both(asked, rule=row_for, tokenizer=None, **more):
    plain = answers(FakeRunner(make_layout(), rule), asked, rule, tokenizer, **more)
    runner = DrawingRunner(make_layout(), rule)
    drawing = answers(runner, asked, rule, tokenizer, **more)
    assert [r.completions for r in drawing] == [r.completions for r in plain]
    return runner, drawing, plain


DRAWN = [
    SamplingParams(temperature=0, max_tokens=12),
    SamplingParams(temperature=1, seed=3, max_tokens=12),
    SamplingParams(temperature=1.5, seed=4, top_k=5, top_p=0.9, max_tokens=9),
    SamplingParams(temperature=0.8, seed=5, min_p=0.1, logit_bias={9: 4.0}, max_tokens=11),
    SamplingParams(temperature=0, logit_bias={20: 30.0}, min_tokens=3, max_tokens=6),
]


@pytest.mark.parametrize("rule", [row_for, babble], ids=["no drafts to speak of", "many drafts"])
def test_texts_are_the_same_and_no_row_travels(rule):
    runner, requests, _ = both(DRAWN, rule)
    assert runner.fetched == []
    assert runner.drawn >= sum(len(request.completions[0].token_ids) for request in requests)


def test_an_end_of_sequence_is_held_back_until_min_tokens():
    def ends(seen, position):
        row = row_for(seen, position)
        row[2] = 40  # the end, wherever it may come
        return row

    asked = [SamplingParams(temperature=t, seed=1, min_tokens=n, max_tokens=9) for t in (0, 1) for n in (0, 4)]
    runner, requests, _ = both(asked, ends, letters(VOCAB))
    assert [len(request.completions[0].token_ids) for request in requests] == [0, 4, 0, 4]
    assert runner.fetched == []


NEEDED = {
    "logprobs": SamplingParams(temperature=0, logprobs=2, max_tokens=4),
    "penalties": SamplingParams(temperature=1, seed=1, repetition_penalty=1.3, max_tokens=4),
    "beams": SamplingParams(beam_width=3, max_tokens=4),
}


@pytest.mark.parametrize("name", NEEDED)
def test_who_needs_rows_gets_them_beside_others_who_do_not(name):
    runner, *_ = both([NEEDED[name], *DRAWN])
    alone, *_ = both([NEEDED[name]])
    assert len(runner.fetched) == len(alone.fetched) > 0
    assert alone.drawn == 0


def test_several_continuations_fetch_the_row_they_share_and_no_other():
    runner, *_ = both([SamplingParams(temperature=1, seed=2, n=3, max_tokens=5)])
    assert len(runner.fetched) == 3  # each from the prompt's last row
    assert runner.drawn == 3 * 4


def test_rows_of_the_prompt_that_are_asked_for_are_fetched():
    _, requests, plain = both([SamplingParams(temperature=0, prompt_logprobs=1, max_tokens=3)], keep_logits=True)
    assert requests[0].prompt_logprobs == plain[0].prompt_logprobs
    np.testing.assert_array_equal(requests[0].logits, plain[0].logits)


def test_nothing_is_drawn_where_a_prompt_is_only_scored():
    runner, *_ = both([SamplingParams(max_tokens=0, prompt_logprobs=0)])
    assert runner.drawn == 0


def test_a_row_of_nan_fails_its_request_alone_and_says_why():
    engine = Engine(DrawingRunner(make_layout()), VOCAB, None, 16)
    asked = SamplingParams(temperature=0, max_tokens=4)
    bad, good = engine.submit([5, NAN_TOKEN], asked), engine.submit([5, 6], asked)
    run(engine)
    assert "nan" in str(bad.error)
    assert good.error is None
    assert len(good.completions[0].token_ids) == 4
