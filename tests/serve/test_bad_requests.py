"""Faults 41 to 59: each is a 4xx that names the field, and the next request succeeds."""

import json
import time

import pytest

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "Hello"}
ASKED = {CHAT: {"messages": [USER], "max_tokens": 4}, TEXT: {"prompt": "Once", "max_tokens": 4}}


@pytest.fixture(autouse=True)
def goes_on(stories):
    """However bad a request was, the next is answered, and nothing of the bad one is left."""
    yield
    assert stories.complete("Once upon a time").status == 200
    assert stories.pages_used() == 0


def wrong(route, **fields):
    return route, ASKED[route] | fields


WRONG = [
    # field(s), the param that is named
    (wrong(CHAT, messages=[]), "messages"),  # 46
    (wrong(CHAT, messages=[USER, {"role": "assistant", "content": "Hi"}]), "messages"),
    (wrong(CHAT, messages=[{"role": "narrator", "content": "Hi"}]), "messages"),
    (wrong(CHAT, messages="Hello"), "messages"),
    (wrong(CHAT, messages=[{"role": "user", "content": "half: \ud800"}]), None),  # 41: the JSON itself is wrong
    (wrong(CHAT, max_tokens=0), "max_tokens"),  # 47
    (wrong(CHAT, max_tokens=None, max_completion_tokens=-1), "max_completion_tokens"),
    (wrong(CHAT, max_tokens=3, max_completion_tokens=4), "max_tokens"),
    (wrong(TEXT, max_tokens=-1), "max_tokens"),
    (wrong(TEXT, temperature=-0.1), "temperature"),  # 48
    (wrong(TEXT, temperature=2.1), "temperature"),
    (wrong(TEXT, temperature="1"), "temperature"),
    (wrong(TEXT, temperature=True), "temperature"),
    (wrong(TEXT, top_p=0), "top_p"),  # 49
    (wrong(TEXT, top_p=1.1), "top_p"),
    (wrong(TEXT, min_p=-0.1), "min_p"),
    (wrong(TEXT, min_p=1.5), "min_p"),
    (wrong(TEXT, top_k=-2), "top_k"),
    (wrong(TEXT, n=0), "n"),  # 50
    (wrong(TEXT, n=129), "n"),
    (wrong(TEXT, n="3"), "n"),
    (wrong(TEXT, n=True), "n"),
    (wrong(TEXT, n=1.0), "n"),
    (wrong(TEXT, best_of=2), "best_of"),
    (wrong(TEXT, logprobs=21), "logprobs"),
    (wrong(TEXT, logprobs=-1), "logprobs"),
    (wrong(CHAT, logprobs=True, top_logprobs=21), "top_logprobs"),
    (wrong(CHAT, top_logprobs=2), "top_logprobs"),
    (wrong(CHAT, logprobs=1), "logprobs"),
    (wrong(TEXT, prompt=[]), "prompt"),
    (wrong(TEXT, prompt=[[]]), "prompt"),
    (wrong(TEXT, prompt=["a", 3]), "prompt"),
    (wrong(TEXT, prompt=[1, 4096]), "prompt"),  # 52
    (wrong(TEXT, prompt=[1, -1]), "prompt"),
    (wrong(TEXT, prompt=[1, 10**30]), "prompt"),
    (wrong(TEXT, prompt=[1, True]), "prompt"),
    (wrong(TEXT, prompt=["a"] * 1025), "prompt"),
    (wrong(TEXT, logit_bias={"4096": 1}), "logit_bias"),
    (wrong(TEXT, logit_bias={"-1": 1}), "logit_bias"),
    (wrong(TEXT, logit_bias={"x": 1}), "logit_bias"),
    (wrong(TEXT, logit_bias={"5": 101}), "logit_bias"),
    (wrong(TEXT, stop=[7]), "stop"),
    (wrong(TEXT, stop=""), "stop"),  # 53
    (wrong(TEXT, stop=["a"] * 17), "stop"),
    (wrong(TEXT, stop="a" * 1001), "stop"),
    (wrong(CHAT, messages=[{"role": "tool", "content": "3", "tool_call_id": "nobody"}]), "messages"),  # 56
    (wrong(CHAT, tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}]), "tools"),
    (wrong(CHAT, tool_choice="perhaps"), "tool_choice"),
    (
        wrong(CHAT, messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]),
        "messages",
    ),
    (wrong(TEXT, seed=2**63), "seed"),  # 58
    (wrong(TEXT, seed=1, random_seed=2), "seed"),
    (wrong(TEXT, presence_penalty=2.5), "presence_penalty"),
    (wrong(TEXT, frequency_penalty=-2.5), "frequency_penalty"),
    (wrong(TEXT, repetition_penalty=1e-300), "repetition_penalty"),
    (wrong(TEXT, min_tokens=5), "min_tokens"),
    (wrong(TEXT, stream="yes"), "stream"),
    (wrong(TEXT, stream_options={"include_usage": True}), "stream_options"),
    (wrong(TEXT, suffix="the end"), "suffix"),
    (("/v1/fim/completions", {"prompt": "a", "suffix": "b"}), "model"),
    (("/tokenize", {}), "prompt"),
    (("/tokenize", {"prompt": "a", "messages": [USER]}), "prompt"),
    (("/detokenize", {"tokens": [4096]}), "tokens"),
    (("/detokenize", {"tokens": "abc"}), "tokens"),
]


@pytest.mark.parametrize(("asked", "param"), WRONG, ids=[json.dumps(a[1])[:70] for a, _ in WRONG])
def test_a_wrong_field_is_a_400_that_names_it(stories, asked, param):
    answer = stories.post(*asked)
    assert (answer.status, answer.error["param"]) == (400, param), answer
    assert answer.headers["x-should-retry"] == "false"
    assert answer.error["type"] == "invalid_request_error"
    assert "\n" not in answer.error["message"]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none_are_refused(stories, number):
    answer = stories.post(TEXT, b'{"prompt": "a", "temperature": %s}' % number.encode())
    assert (answer.status, answer.error["param"]) == (400, "temperature")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"prompt": "a"',
        b"\xff\xfe",
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b"[" * 100_000,
        b"{}}",
    ],
)
def test_what_is_no_json_is_a_400(stories, body):
    answer = stories.post(TEXT, body)
    assert answer.status == 400
    assert "JSON" in answer.error["message"]


@pytest.mark.parametrize("body", [b"[]", b"3", b'"prompt"', b"null"])
def test_a_body_that_is_no_object_is_a_400(stories, body):
    answer = stories.post(TEXT, body)
    assert (answer.status, answer.error["message"]) == (400, "the body is no JSON object")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_another_content_type_is_a_415(stories, kind):
    answer = stories.post(TEXT, {"prompt": "a"}, {"content-type": kind})
    assert answer.status == 415
    assert "application/json" in answer.error["message"]


def test_a_charset_beside_the_content_type_is_no_other_type(stories):
    kind = {"content-type": "Application/JSON; charset=utf-8"}
    assert stories.post(TEXT, ASKED[TEXT], kind).status == 200


def test_a_body_too_large_is_a_413_announced_or_not(stories):
    assert stories.complete("a" * 2_000_000).error["code"] == "request_too_large"
    connection = stories.connect()
    connection.request(
        "POST", TEXT, iter([b"a" * 100_000] * 30), {"content-type": "application/json"}, encode_chunked=True
    )
    try:
        answer = connection.getresponse()
        assert answer.status == 413
    finally:
        connection.close()


def test_a_head_too_large_is_a_431(stories):
    answer = stories.get("/health", {"x-long": "a" * 40_000})
    assert answer.status == 431
    assert answer.json["error"]["type"] == "invalid_request_error"


def test_an_unknown_model_is_a_404(stories):
    for answer in (
        stories.complete("a", model="gpt-4"),
        stories.chat("a", model="gpt-4"),
        stories.get("/v1/models/gpt-4"),
        stories.post("/tokenize", {"prompt": "a", "model": "a\nb"}),
    ):
        assert answer.status == 404
        assert answer.error["code"] == "model_not_found"
        assert "stories" in answer.error["message"]


def test_an_unknown_route_is_a_404_and_a_wrong_method_a_405(stories):
    assert stories.get("/v1/nothing").error["type"] == "not_found_error"
    assert stories.get("/health/").status == 404
    assert stories.get(TEXT).status == 405
    assert stories.get(TEXT).headers["allow"] == "POST"
    assert stories.post("/health", {}).error["message"]


def test_a_prompt_over_the_context_is_a_400_with_both_numbers(stories):
    for answer, param in (
        (stories.complete([5] * 2048), "prompt"),
        (stories.complete("fox " * 3000), "prompt"),
        (stories.chat("fox " * 3000), "messages"),
    ):
        assert (answer.status, answer.error["param"]) == (400, param)
        assert answer.error["code"] == "context_length_exceeded"
        tokens, context = [int(word) for word in answer.error["message"].replace(",", "").split() if word.isdigit()]
        assert tokens >= context == 2048
    assert stories.complete([5] * 2047).json["usage"] == {
        "prompt_tokens": 2047,
        "completion_tokens": 1,
        "total_tokens": 2048,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_an_image_is_refused_at_once_and_nothing_is_fetched(stories):
    """An address that never answers would hold the request up, were it asked."""
    part = {"type": "image_url", "image_url": {"url": "http://10.255.255.1/cat.png"}}
    began = time.monotonic()
    answer = stories.post(CHAT, ASKED[CHAT] | {"messages": [{"role": "user", "content": [part]}]})
    assert "text only" in answer.error["message"]
    assert time.monotonic() - began < 5


def test_an_unknown_field_is_ignored_and_named_in_a_header(stories):
    plain = stories.complete("Once")
    answer = stories.complete("Once", **{"best-guess": 1, "zürich": {"a": [float(1)]}, "a\nb": None})
    assert answer.json["choices"] == plain.json["choices"]
    assert json.loads(f"[{answer.headers['x-ignored-fields']}]") == ["a\nb", "best-guess", "zürich"]
    assert "x-ignored-fields" not in plain.headers


def test_null_is_as_good_as_a_field_left_out(stories):
    names = ("stop", "n", "seed", "top_p", "top_k", "logit_bias", "logprobs", "stream", "stream_options", "user")
    plain = stories.complete("Once")
    assert stories.complete("Once", **dict.fromkeys(names)).json["choices"] == plain.json["choices"]
