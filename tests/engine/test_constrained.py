"""Constraints in the engine. What must come is worked out from a list of all texts that a regex allows: of the tokens
that keep the text a beginning of one of them, the likeliest by the formula of the fake runner."""

import numpy as np
import pytest
from fake_runner import VOCAB, make_engine, run, true_row
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import EOS, greedy, ids, log_softmax, sampled
from tiny import letters

from maestrale.errors import RequestError
from maestrale.sampling.params import SamplingParams

TEXTS = [f"{a}{b}{c}" for a in ("NO", "YES", "Y") for b in (" ", ", ", "") for c in ("1", "12", "2", "É", "")] + ["X"]
TEXTS = [text.replace("É", "é") for text in TEXTS]
REGEX = "|".join(TEXTS)
SHOWN = {3 + i: bytes([32 + i]) for i in range(VOCAB - 5)} | {VOCAB - 2: b"\xc3", VOCAB - 1: b"\xa9"}


def true_constrained(prompt, limit=8, texts=TEXTS):
    """Token ids and the reason for the end."""
    tokens, text, goals = [], b"", {goal.encode() for goal in texts}
    while len(tokens) < limit:
        if {goal for goal in goals if goal.startswith(text)} <= {text}:
            return tokens, "stop"
        row = true_row(prompt + tokens)
        may = [t for t, shown in SHOWN.items() if any(goal.startswith(text + shown) for goal in goals)]
        best = max(may + [EOS] * (text in goals), key=lambda t: (row[t], -t))
        if best == EOS:
            return tokens, "stop"
        tokens, text = [*tokens, best], text + SHOWN[best]
    done = {goal for goal in goals if goal.startswith(text)} <= {text}
    return tokens, "stop" if done else "length"


@given(
    prompts=st.lists(st.lists(st.integers(3, VOCAB - 4), min_size=1, max_size=6), min_size=1, max_size=5),
    limit=st.integers(1, 8),
    chunk=st.integers(1, 8),
    pages=st.sampled_from([16, 20, 64]),
)
@settings(max_examples=60)
def test_greedy_text_is_the_likeliest_that_the_constraint_allows_in_any_batch(prompts, limit, chunk, pages):
    engine = make_engine(letters(), page_size=1, max_len=16, max_chunk=chunk, pages=pages)
    free = [engine.submit(prompt, greedy(4)) for prompt in prompts]
    held = [engine.submit(prompt, greedy(limit, constraint={"regex": REGEX})) for prompt in prompts]
    run(engine)
    for prompt, request in zip(prompts, held, strict=True):
        (completion,) = request.completions
        assert (completion.token_ids, completion.finish_reason) == true_constrained(prompt, limit)
        shown = b"".join(SHOWN[token] for token in completion.token_ids)
        assert completion.text == shown.decode(errors="replace")
    assert all(len(request.completions[0].token_ids) == 4 for request in free)


def test_preemption_changes_nothing():
    prompts = [[first, 7, 8, 30, 11, 50] for first in (3, 4, 5, 6)]
    engine = make_engine(letters(), page_size=1, max_len=16, max_chunk=16, pages=16)
    requests = [engine.submit(prompt, greedy(8, constraint={"regex": "[A-Z ]{6}12"})) for prompt in prompts]
    run(engine)
    assert engine.scheduler.preemptions > 0
    for prompt, request in zip(prompts, requests, strict=True):
        tokens = []
        for _ in range(6):
            row = true_row(prompt + tokens)
            tokens.append(max(ids("ABCDEFGHIJKLMNOPQRSTUVWXYZ "), key=lambda t, row=row: (row[t], -t)))
        assert request.completions[0].token_ids == tokens + ids("12")


def test_each_of_n_goes_its_own_way_and_the_same_as_alone():
    def texts(prompts, **more):
        engine = make_engine(letters(), **more)
        asked = {"n": 6, "constraint": {"regex": REGEX}}
        requests = [engine.submit(prompt, sampled(7, **asked)) for prompt in prompts]
        run(engine)
        return [[c.text for c in sorted(r.completions, key=lambda c: c.index)] for r in requests]

    prompts = [[3, 4], [5, 6, 7, 8], [9]]
    together = texts(prompts, page_size=1, max_len=16, max_chunk=7, pages=100)
    assert together == [texts([prompt])[0] for prompt in prompts]
    for each in together:
        assert set(each) <= set(TEXTS)
        assert len(set(each)) > 1


@pytest.mark.parametrize("min_tokens", [0, 2, 6])
def test_min_tokens_holds_the_end_back_only_where_the_text_can_go_on(min_tokens):
    engine = make_engine(letters(), rule=lambda seen, position: np.eye(1, VOCAB, EOS, dtype=np.float32)[0])
    request = engine.submit([3], greedy(8, min_tokens=min_tokens, constraint={"regex": "A{1,4}"}))
    run(engine)
    (completion,) = request.completions
    assert (completion.text, completion.finish_reason) == ("A" * min(max(min_tokens, 1), 4), "stop")


def test_a_constraint_that_only_the_empty_text_meets_ends_at_once():
    engine = make_engine(letters())
    request = engine.submit([3], greedy(8, constraint={"regex": ""}))
    run(engine)
    assert (request.completions[0].text, request.completions[0].finish_reason) == ("", "stop")


def test_the_sequence_ends_with_the_token_that_completes_its_text():
    engine = make_engine(letters())
    request = engine.submit([3], greedy(8, constraint={"regex": "AB|CD"}))
    run(engine)
    assert request.completions[0].text in ("AB", "CD")
    assert len(engine.runner.steps) == 2


def test_a_stop_string_still_ends_a_constrained_text():
    engine = make_engine(letters())
    request = engine.submit([3], greedy(8, stop="MI", constraint={"regex": "BORA MISTRAL"}))
    run(engine)
    assert (request.completions[0].text, request.completions[0].finish_reason) == ("BORA ", "stop")


def test_logprobs_are_those_of_the_raw_logits():
    engine = make_engine(letters())
    request = engine.submit([3, 9], greedy(8, logprobs=2, constraint={"regex": "AZ"}))
    run(engine)
    expected = [log_softmax(true_row([3, 9]))[ids("A")[0]], log_softmax(true_row([3, 9, *ids("A")]))[ids("Z")[0]]]
    np.testing.assert_allclose(request.completions[0].logprobs, expected, atol=1e-4)


def test_a_constraint_that_leads_nowhere_fails_its_request_alone():
    engine = make_engine(letters())
    before, after = engine.submit([3, 9], greedy(6)), engine.submit([4, 9], greedy(6))
    lost = engine.submit([5, 9], greedy(6, constraint={"grammar": 'start: "AB" /[^\\s\\S]/'}))
    run(engine)
    assert isinstance(lost.error, RequestError)
    assert lost.error.param == "constraint"
    assert lost.completions == []
    for request in (before, after):
        tokens = list(request.prompt)
        for _ in range(6):
            tokens.append(int(true_row(tokens).argmax()))
        assert request.completions[0].token_ids == tokens[2:]


def test_what_cannot_be_compiled_is_refused_before_it_is_queued():
    engine = make_engine(letters())
    for wrong in ({"regex": "["}, {"json_schema": False}):
        with pytest.raises(RequestError) as error:
            engine.submit([3], greedy(4, constraint=wrong))
        assert error.value.param == "constraint"
    assert not engine.has_work


def test_a_constraint_needs_a_tokenizer():
    with pytest.raises(RequestError, match="needs a tokenizer") as error:
        make_engine().submit([3], SamplingParams(constraint={"regex": "A"}))
    assert error.value.param == "constraint"
