"""What the routes answer, held against the library, formulas and other people's code."""

import base64
import json
import math

import numpy as np
import pytest
import torch
from live import BYTES, Live
from tiny import CONTROLS, hf_model

import maestrale
from maestrale import LLM, SamplingParams

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
PROMPT = "Once upon a time there was a fox"


@pytest.fixture(scope="module")
def llm():
    return LLM(dtype="float32")


@pytest.fixture(scope="module")
def server(bytes_folder):
    """The tiny model of bytes. Left idle by every test."""
    live = Live(bytes_folder, "--dtype", "float32")
    yield live
    live.close()


def softmax_log(row):
    row = row.astype(np.float64)
    return row - row.max() - math.log(np.exp(row - row.max()).sum())


# Texts


def test_greedy_text_is_that_of_the_library(stories, llm):
    (alone,) = llm.generate(PROMPT, SamplingParams(max_tokens=60, temperature=0))
    plain = stories.complete(PROMPT, max_tokens=60).json
    assert plain["choices"] == [{"index": 0, "text": alone.text, "logprobs": None, "finish_reason": "length"}]
    assert plain["usage"]["completion_tokens"] == 60
    assert plain["usage"]["prompt_tokens"] == len(llm.tokenizer.encode(PROMPT))
    ids = stories.complete(llm.tokenizer.encode(PROMPT), max_tokens=60).json
    assert ids["choices"] == plain["choices"]
    streamed = stories.complete(PROMPT, max_tokens=60, stream=True).events
    assert "".join(event["choices"][0]["text"] for event in streamed) == alone.text


def test_a_chat_is_that_of_the_library(stories, llm):
    said = [{"role": "user", "content": "Tell me of a fox."}]
    alone = llm.chat(said, SamplingParams(max_tokens=20, temperature=0))
    (choice,) = stories.chat("Tell me of a fox.", max_tokens=20).json["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] == alone.text
    assert choice["finish_reason"] == alone.finish_reason


def test_a_seeded_text_is_that_of_the_library(stories, llm):
    found = llm.generate(PROMPT, SamplingParams(max_tokens=12, temperature=1.1, top_p=0.9, seed=-5, n=3))
    for name in ("seed", "random_seed"):
        asked = {"max_tokens": 12, "temperature": 1.1, "top_p": 0.9, "n": 3, name: -5}
        choices = stories.complete(PROMPT, **asked).json["choices"]
        assert [choice["text"] for choice in choices] == [completion.text for completion in found]
    events = stories.complete(PROMPT, **asked, stream=True).events
    for i, completion in enumerate(found):
        texts = [c["text"] for event in events for c in event["choices"] if c["index"] == i]
        assert "".join(texts) == completion.text


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_a_chat_without_a_limit_goes_on_to_the_end_of_the_context(server, field):
    whole = server.chat("a", ignore_eos=True, max_tokens=None)
    assert whole.json["usage"]["total_tokens"] == 2048
    assert whole.json["choices"][0]["finish_reason"] == "length"
    assert server.chat("a", ignore_eos=True, **{"max_tokens": None, field: 5}).json["usage"]["completion_tokens"] == 5


def test_a_stop_string_spread_over_tokens_ends_the_text_before_it(server):
    """Each byte is a token of its own here."""
    free = server.complete("ab", max_tokens=40, ignore_eos=True)
    text = free.json["choices"][0]["text"]
    place = next(i for i in range(5, 30) if text[i : i + 3].isascii() and text.find(text[i : i + 3]) == i)
    for stop in (text[place : place + 3], ["never there", text[place : place + 3]]):
        for answer in (
            server.complete("ab", max_tokens=40, ignore_eos=True, stop=stop).json["choices"],
            [
                {
                    "text": "".join(e["choices"][0]["text"] for e in events),
                    "finish_reason": events[-1]["choices"][0]["finish_reason"],
                }
                for events in [server.complete("ab", max_tokens=40, ignore_eos=True, stop=stop, stream=True).events]
            ],
        ):
            assert answer[0]["text"] == text[:place]
            assert answer[0]["finish_reason"] == "stop"


def test_many_prompts_are_answered_in_order(stories, llm):
    prompts = ["A fox", "The old king", "Two hens"]
    found = llm.generate(prompts, SamplingParams(max_tokens=6, temperature=0))
    answer = stories.complete(prompts, max_tokens=6).json
    assert [c["text"] for c in answer["choices"]] == [c.text for c in found]
    encoded = [llm.tokenizer.encode(prompt) for prompt in prompts]
    assert stories.complete(encoded, max_tokens=6).json["choices"] == answer["choices"]
    two = stories.complete(prompts, max_tokens=6, n=2).json["choices"]
    assert [c["index"] for c in two] == list(range(6))
    assert [c["text"] for c in two] == [c.text for c in found for _ in range(2)]


# Streams


def test_a_chat_stream_begins_with_the_role_and_ends_with_the_reason(server):
    events = server.chat("a", max_tokens=5, ignore_eos=True, stream=True, stream_options={"include_usage": True}).events
    *chunks, last = events
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert {chunk["object"] for chunk in events} == {"chat.completion.chunk"}
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 5
    assert len({chunk["id"] for chunk in events}) == 1


def test_without_include_usage_no_chunk_has_any(server):
    for events in (server.chat("a", stream=True).events, server.complete("a", stream=True).events):
        assert all("usage" not in event and event["choices"] for event in events)


# Logprobs


def test_logprobs_of_a_text_are_the_log_softmax_of_the_logits(server, bytes_folder):
    rows = LLM(bytes_folder, dtype="float32", backend="torch").logits
    choice = server.complete("ab", max_tokens=6, ignore_eos=True, logprobs=3, echo=True).json["choices"][0]
    table = choice["logprobs"]
    ids = [1, *(32 + byte for byte in b"ab")]
    assert table["tokens"][:3] == ["<s>", "a", "b"]
    assert table["token_logprobs"][0] is table["top_logprobs"][0] is None
    scored = [softmax_log(row) for row in rows([ids])[0]]
    for i in (1, 2):
        assert table["token_logprobs"][i] == pytest.approx(scored[i - 1][ids[i]], abs=1e-4)
        best = np.sort(scored[i - 1])[::-1][:3]
        assert sorted(table["top_logprobs"][i].values(), reverse=True)[:3] == pytest.approx(best, abs=1e-4)
    assert len(table["tokens"]) == len(table["text_offset"]) == len(table["token_logprobs"]) == 9
    assert table["text_offset"][:3] == [0, 0, 1]


def test_an_echo_in_a_stream_is_the_plain_one(server):
    asked = {"max_tokens": 5, "ignore_eos": True, "logprobs": 2, "echo": True, "n": 2}
    plain = server.complete("hello", **asked).json["choices"]
    events = server.complete("hello", **asked, stream=True).events
    for choice in plain:
        pieces = [c for event in events for c in event["choices"] if c["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        for column, values in choice["logprobs"].items():
            assert [x for piece in pieces for x in (piece["logprobs"] or {column: []})[column]] == values


def test_chat_logprobs_spell_the_text(stories):
    choice = stories.chat("Tell me of a fox.", logprobs=True, top_logprobs=3).json["choices"][0]
    entries = choice["logprobs"]["content"]
    assert b"".join(bytes(e["bytes"]) for e in entries).decode().strip() == choice["message"]["content"].strip()
    for entry in entries:
        assert len(entry["top_logprobs"]) == 3
        assert entry["top_logprobs"][0]["token"] == entry["token"]  # greedy
        assert entry["top_logprobs"][0]["logprob"] == entry["logprob"] <= 0
    bare = stories.chat("Tell me of a fox.", logprobs=True).json["choices"][0]["logprobs"]["content"]
    assert [e["top_logprobs"] for e in bare] == [[]] * len(entries)


# Embeddings


def test_an_embedding_is_the_mean_of_the_last_hidden_states(server):
    model = hf_model(BYTES)
    for text in ("hello", "x" * 700):  # one chunk and two
        ids = [1, *(32 + byte for byte in text.encode())]
        with torch.no_grad():
            expected = model.model(torch.tensor([ids])).last_hidden_state[0].mean(0).numpy()
        for given in (text, ids, [text], [ids]):
            answer = server.post("/v1/embeddings", {"input": given}).json
            np.testing.assert_allclose(answer["data"][0]["embedding"], expected, atol=1e-5)
    packed = server.post("/v1/embeddings", {"input": ["a", text], "encoding_format": "base64", "dimensions": 32}).json
    assert [entry["index"] for entry in packed["data"]] == [0, 1]
    found = np.frombuffer(base64.b64decode(packed["data"][1]["embedding"]), "<f4")
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert packed["usage"]["prompt_tokens"] == 2 + 701
    assert "mean" in packed["pooling"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": [288]}, "input"),
        ({"input": "x" * 2048}, "input"),
        ({"input": "x", "dimensions": 16}, "dimensions"),
        ({"input": "x", "encoding_format": "hex"}, "encoding_format"),
        ({"input": 3}, "input"),
    ],
)
def test_a_wrong_embedding_is_a_400(server, fields, param):
    answer = server.post("/v1/embeddings", fields)
    assert (answer.status, answer.error["param"]) == (400, param)


# Fill in the middle, tokens


def test_the_middle_is_filled_in_between_prompt_and_suffix(server, bytes_folder):
    suffix, prefix = (3 + CONTROLS.index(name) for name in ("[SUFFIX]", "[PREFIX]"))
    ids = [1, suffix, *(32 + byte for byte in "return é".encode()), prefix, *(32 + byte for byte in b"def f(")]
    greedy = LLM(bytes_folder, dtype="float32").generate(ids, SamplingParams(max_tokens=9, temperature=0))
    body = {"prompt": "def f(", "suffix": "return é", "max_tokens": 9, "temperature": 0}
    answer = server.post("/v1/fim/completions", body).json
    assert answer["choices"][0]["message"]["content"] == greedy[0].text
    assert answer["usage"]["prompt_tokens"] == len(ids)
    events = server.post("/v1/fim/completions", body | {"stream": True}).events
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == greedy[0].text
    assert server.get("/v1/models").json["data"][0]["capabilities"]["completion_fim"] is True


def test_texts_become_tokens_and_tokens_texts(stories, llm):
    for text in ("Once upon a time", "naïve 🦊", "", "[INST] is text </s>"):
        for special in (True, False):
            answer = stories.post("/tokenize", {"prompt": text, "add_special_tokens": special}).json
            assert answer["tokens"] == llm.tokenizer.encode(text, bos=special)
            assert answer["count"] == len(answer["tokens"])
        assert stories.post("/detokenize", {"tokens": answer["tokens"]}).json == {"prompt": text}
    talk = [{"role": "user", "content": "Hi"}]
    assert stories.post("/tokenize", {"messages": talk}).json["tokens"] == llm.tokenizer.encode_chat(talk)
    spelled = stories.post("/tokenize", {"prompt": "A fox", "return_token_strs": True}).json
    assert spelled["token_strs"] == ["<s>", " A", " fox"]


def test_the_end_token_is_found_as_lm_eval_looks_for_it(stories, llm):
    info = stories.get("/tokenizer_info").json
    for name, expected in (("bos", llm.tokenizer.bos_id), ("eos", llm.tokenizer.eos_id)):
        asked = {"prompt": info[f"{name}_token"], "add_special_tokens": False}
        assert stories.post("/tokenize", asked).json["tokens"] == [expected] == [info[f"{name}_token_id"]]


# Cards and counts


def test_the_small_routes(stories):
    assert stories.get("/health").json == {"status": "ok"}
    assert stories.get("/ready").json == {"status": "ready"}
    assert stories.get("/version").json == {"version": maestrale.__version__}
    (card,) = stories.get("/v1/models").json["data"]
    assert (card["id"], card["max_model_len"]) == ("stories", 2048)
    assert stories.get("/v1/models/stories").json == card
    described = stories.get("/openapi.json").json
    assert {CHAT, TEXT, "/v1/embeddings", "/tokenize"} <= described["paths"].keys()


def test_metrics_count_what_was_done(server):
    before = {name: server.metric(f"maestrale_{name}_total") for name in ("prompt_tokens", "generated_tokens")}
    seen = server.metric("maestrale_time_to_first_token_seconds_count")
    server.complete("abc", max_tokens=7, ignore_eos=True)
    assert server.metric("maestrale_prompt_tokens_total") == before["prompt_tokens"] + 4
    assert server.metric("maestrale_generated_tokens_total") == before["generated_tokens"] + 7
    assert server.metric("maestrale_time_to_first_token_seconds_count") == seen + 1
    assert server.metric("maestrale_cache_pages") > 0


# Options


def test_a_flag_goes_before_the_environment_and_that_before_the_file(start, tmp_path):
    config = tmp_path / "serve.toml"
    config.write_text('name = "of-file"\nmax-queue = 7\nlog_json = true\n')
    args = ("--config", config)
    assert start(*args).get("/v1/models").json["data"][0]["id"] == "of-file"
    by_env = start(*args, env={"MAESTRALE_NAME": "of-env"})
    assert by_env.get("/v1/models").json["data"][0]["id"] == "of-env"
    assert json.loads(by_env.log[-1])["message"]
    by_flag = start(*args, "--name", "of-flag", env={"MAESTRALE_NAME": "of-env"})
    assert by_flag.get("/v1/models").json["data"][0]["id"] == "of-flag"
