import dataclasses
import math

import numpy as np
import pytest

from maestrale.errors import RequestError
from maestrale.sampling.params import SamplingParams

WRONG = [
    *[("max_tokens", v) for v in (-1, 2**31, 1.0, "3", True, None)],
    *[("temperature", v) for v in (math.nan, math.inf, -math.inf, -0.1, 2.1, "1", True, None, 10**400)],
    *[("top_k", v) for v in (-1, 2.0, True, None)],
    *[("top_p", v) for v in (0, 0.0, -0.1, 1.01, math.nan, "0.9", None)],
    *[("min_p", v) for v in (-0.01, 1.01, math.nan, False)],
    *[("seed", v) for v in (2**63, -(2**63) - 1, 1.0, "1", True)],
    *[("stop", v) for v in ("", [""], ["a", ""], ["a"] * 17, "x" * 1001, [3], 3, b"a", {"a": 1})],
    *[("n", v) for v in (0, 129, "3", True, 1.0, None)],
    *[("logprobs", v) for v in (-1, 21, True, "3")],
    *[("prompt_logprobs", v) for v in (-1, 21, True, 2.0)],
    *[("presence_penalty", v) for v in (-2.1, 2.1, math.nan, "1")],
    *[("frequency_penalty", v) for v in (-2.1, 2.1, math.inf, None)],
    *[("repetition_penalty", v) for v in (0, -1, 10.1, math.nan)],
    *[("logit_bias", v) for v in ({"1": 1}, {True: 1}, {1: "1"}, {1: math.nan}, {1: 101}, {1: True}, [1], 5)],
    *[("min_tokens", v) for v in (-1, True, 129, 1.0)],
    *[("ignore_eos", v) for v in (1, 0, "true", None)],
    *[("experts", v) for v in (1, 0, "true", None)],
    *[("beam_width", v) for v in (0, 4097, True, 2.0)],
    *[("constraint", v) for v in ("json", 3, {}, {"json_schema": "{"}, {"regex": 3}, {"json_object": 1})],
    *[("length_penalty", v) for v in (math.nan, math.inf, -10.1, 10.1, "1")],
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=lambda v: repr(v)[:20])
def test_a_wrong_value_is_refused_with_the_name_of_its_field(name, value):
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name
    message = str(caught.value)
    assert name in message
    assert "expected" in message
    assert "\n" not in message
    assert len(message) < 250


def test_every_field_is_tested_for_wrong_values():
    assert {name for name, _ in WRONG} == {field.name for field in dataclasses.fields(SamplingParams)}


def test_a_constraint_stands_neither_with_beams_nor_with_an_end_that_is_ignored():
    for other in ({"beam_width": 2}, {"ignore_eos": True}):
        with pytest.raises(RequestError) as caught:
            SamplingParams(constraint={"regex": "a"}, **other)
        assert caught.value.param == "constraint"


def test_an_error_says_the_value_and_the_range():
    with pytest.raises(RequestError, match=r"^temperature = 3: expected a number from 0 to 2$"):
        SamplingParams(temperature=3)
    with pytest.raises(RequestError, match=r"^top_p = 0: expected a number above 0 up to 1$"):
        SamplingParams(top_p=0)


def test_an_integer_too_long_to_print_is_refused_in_few_words():
    with pytest.raises(RequestError, match="a number of too many digits"):
        SamplingParams(seed=10**5000)


def test_edges_of_the_ranges_are_allowed():
    SamplingParams(0, 0, 0, 1, 0, 2**63 - 1, ["x" * 1000] * 16, 128, 20, 0, -2, 2, 10, {0: -100, 5: 100}, 0, True)
    SamplingParams(2**31 - 1, 2.0, 2**31 - 1, 1e-300, 1.0, -(2**63), min_tokens=2**31 - 1, n=64, beam_width=64)
    SamplingParams(length_penalty=-10)
    SamplingParams(length_penalty=10)


def test_values_are_normalised_to_plain_types():
    params = SamplingParams(max_tokens=np.int64(7), temperature=1, top_p=np.float32(0.5), logit_bias={np.int32(3): 2})
    assert (type(params.max_tokens), type(params.temperature), type(params.top_p)) == (int, float, float)
    assert params.logit_bias == {3: 2.0}
    assert [(type(k), type(v)) for k, v in params.logit_bias.items()] == [(int, float)]


def test_stop_takes_a_string_a_list_or_nothing():
    assert SamplingParams(stop="ab").stop == ("ab",)
    assert SamplingParams(stop=["ab", "c"]).stop == ("ab", "c")
    assert SamplingParams(stop=None).stop == ()
    assert SamplingParams().stop == ()


def test_later_changes_to_the_callers_mapping_do_not_reach_the_params():
    bias = {1: 1.0}
    params = SamplingParams(logit_bias=bias)
    bias[2] = 2.0
    assert params.logit_bias == {1: 1.0}


def test_min_tokens_may_not_exceed_max_tokens():
    with pytest.raises(RequestError) as caught:
        SamplingParams(max_tokens=3, min_tokens=4)
    assert caught.value.param == "min_tokens"


def test_beam_search_returns_no_more_than_it_holds():
    SamplingParams(n=4, beam_width=4)
    SamplingParams(n=4, beam_width=1)
    with pytest.raises(RequestError) as caught:
        SamplingParams(n=5, beam_width=4)
    assert caught.value.param == "n"


@pytest.mark.parametrize("token", [-1, 100, 10**30])
def test_a_biased_token_outside_the_vocabulary_is_refused(token):
    params = SamplingParams(logit_bias={0: 1, 99: 1, token: 1})
    with pytest.raises(RequestError, match=r"0 to 99") as caught:
        params.check_vocabulary(100)
    assert caught.value.param == "logit_bias"


def test_a_bias_inside_the_vocabulary_passes():
    SamplingParams(logit_bias={0: 1, 99: 1}).check_vocabulary(100)
    SamplingParams().check_vocabulary(1)
