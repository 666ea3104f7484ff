"""LLM, the Python face: what goes in, what comes out, and what is refused before any weight is read."""

import json
import signal
import sys
import threading
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import DENSE, hf_greedy, hf_logits, hf_model, make_folder, native_weights, tokens, write_native, write_tekken

from maestrale import LLM, Completion, SamplingParams, choices, engine
from maestrale.errors import CheckpointError, ConfigError, MemoryLimitError, RequestError, UsageError

CONFIG = replace(DENSE, vocab_size=288, sliding_window=(None, None), max_position_embeddings=96)
GREEDY = SamplingParams(max_tokens=8, temperature=0)


@pytest.fixture(scope="module")
def model():
    return hf_model(CONFIG)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = write_native(tmp_path_factory.mktemp("llm"), CONFIG, native_weights(model, CONFIG))
    write_tekken(folder)
    return folder


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder)


def ids_of(text):
    return [1, *(32 + byte for byte in text.encode())]


def text_of(ids):
    return bytes(i - 32 for i in ids if i >= 32).decode(errors="replace")


def true_greedy(model, ids, count=8):
    found = hf_greedy(model, ids, count)
    return found[: found.index(2)] if 2 in found else found


# What goes in


def test_text_ids_and_lists_of_both_are_continued_in_order(llm, model):
    prompts = ["hello", [1, 50, 60], "naïve é", np.array([1, 70]), ""]
    expected = [true_greedy(model, ids) for ids in (ids_of("hello"), [1, 50, 60], ids_of("naïve é"), [1, 70], [1])]
    found = llm.generate(prompts, GREEDY)
    assert [c.token_ids for c in found] == expected
    assert [c.text for c in found] == [text_of(ids) for ids in expected]
    for prompt, ids in zip(prompts, expected, strict=True):
        (alone,) = llm.generate(prompt, GREEDY)
        assert alone.token_ids == ids
    assert llm.generate([], GREEDY) == []


def test_one_params_for_each_prompt_or_one_for_all(llm, model):
    params = [SamplingParams(max_tokens=n, temperature=0) for n in (1, 5, 3)]
    found = llm.generate([[1, 50]] * 3, params)
    assert [c.token_ids for c in found] == [true_greedy(model, [1, 50], n) for n in (1, 5, 3)]
    with pytest.raises(RequestError, match="2 prompts and 3 SamplingParams"):
        llm.generate(["a", "b"], params)


def test_n_completions_a_prompt_come_in_order(llm):
    params = SamplingParams(max_tokens=4, n=3, seed=1)
    found = llm.generate(["a", "b"], params)
    assert [c.index for c in found] == [0, 1, 2, 0, 1, 2]
    assert [c.token_ids for c in found[3:]] == [c.token_ids for c in llm.generate("b", params)]


def test_a_request_that_cannot_be_served_leaves_nothing_behind(llm, model):
    for prompts, param in ((["a", []], "prompt"), (["a", [288]], "prompt"), (["a", "x" * 96], "prompt")):
        with pytest.raises(RequestError) as error:
            llm.generate(prompts, GREEDY)
        assert error.value.param == param
        assert not llm._engine.has_work
    assert llm.generate([[1, 50]], GREEDY)[0].token_ids == true_greedy(model, [1, 50])


def test_too_long_a_prompt_is_refused_with_both_numbers(llm):
    with pytest.raises(RequestError, match="97 tokens and the context holds 96"):
        llm.generate("x" * 96, GREEDY)
    assert llm.max_len == 96


# Streams


def test_a_stream_adds_up_to_what_generate_gives(llm):
    params = SamplingParams(max_tokens=8, seed=3, n=2, logprobs=1)
    whole = llm.generate(["ab", "c"], params)
    pieces = list(llm.stream(["ab", "c"], params))
    for i, completion in enumerate(whole):
        mine = [piece for piece in pieces if piece.index == i]
        assert "".join(piece.text for piece in mine) == completion.text
        assert [token for piece in mine for token in piece.token_ids] == completion.token_ids
        assert [x for piece in mine for x in piece.logprobs or []] == completion.logprobs
        assert [piece.finish_reason for piece in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1].finish_reason == completion.finish_reason


def test_streams_may_be_read_in_turns_and_with_a_generate_between(llm):
    expected = [c.token_ids for c in llm.generate(["ab", "c", "d"], GREEDY)]
    first, second, found = llm.stream("ab", GREEDY), llm.stream("c", GREEDY), ([], [])
    for _ in range(9):
        for stream, ids in ((first, found[0]), (second, found[1])):
            ids += next(stream, Completion()).token_ids
            assert llm.generate("d", GREEDY)[0].token_ids == expected[2]
    assert list(found) == expected[:2]


def test_a_stream_that_is_left_frees_its_pages(llm):
    stream = llm.stream("ab", SamplingParams(max_tokens=50, temperature=0, ignore_eos=True))
    next(stream)
    assert llm._engine.has_work
    stream.close()
    assert not llm._engine.has_work
    assert llm._engine.pages.available == list(llm._engine.pages.layout.pages)


WIND = {
    "type": "function",
    "function": {
        "name": "wind",
        "parameters": {
            "type": "object",
            "properties": {"from": {"enum": ["NE", "NW"]}, "knots": {"type": "integer", "minimum": 0, "maximum": 60}},
            "required": ["from", "knots"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def long(model, tmp_path_factory):
    """The same model where a chat with tools fits."""
    folder = tmp_path_factory.mktemp("long")
    write_native(folder, CONFIG, native_weights(model, CONFIG), max_position_embeddings=1024)
    write_tekken(folder)
    return LLM(folder)


ASK = [{"role": "user", "content": "Which wind?"}]


@pytest.mark.parametrize("seed", range(6))
def test_calls_of_a_chat_fit_their_schema_whatever_the_model_says(long, seed):
    params = SamplingParams(max_tokens=100, temperature=1.5, seed=seed)
    answer = long.chat(ASK, params, tools=[WIND], tool_choice="required", parallel_tool_calls=False)
    assert (answer.finish_reason, answer.text) == ("tool_calls", "")
    (call,) = answer.tool_calls
    arguments = json.loads(call.arguments)
    assert (call.index, call.name, arguments["from"] in ("NE", "NW")) == (0, "wind", True)
    assert arguments["knots"] in range(61)
    history = [*ASK, {"role": "assistant", "tool_calls": [{"id": call.id, "function": {**vars(call)}}]}]
    long.tokenizer.encode_chat([*history, {"role": "tool", "tool_call_id": call.id, "content": "ok"}], [WIND])


def test_a_chat_with_tools_may_be_answered_in_words(long):
    answer = long.chat(ASK, GREEDY, tools=[WIND], tool_choice="none")
    assert (answer.tool_calls, len(answer.text) > 0, answer.finish_reason) == ([], True, "length")
    assert long.chat(ASK, GREEDY).tool_calls is None


def test_the_words_of_a_chat_with_tools_keep_to_their_constraint(long):
    params = replace(GREEDY, max_tokens=40, constraint={"regex": "It blows from (NE|NW)[.]"})
    answer = long.chat(ASK, params, tools=[WIND], tool_choice="none")
    assert answer.text in ("It blows from NE.", "It blows from NW.")
    both = long.chat(ASK, replace(params, logit_bias={long.tokenizer.encode("I")[1]: 50.0}), tools=[WIND])
    assert (both.text, both.finish_reason) == (answer.text, "stop")


def test_a_wrong_constraint_beside_tools_is_called_by_its_own_name(long):
    with pytest.raises(RequestError, match="constraint") as error:
        long.chat(ASK, replace(GREEDY, constraint={"regex": "("}), tools=[WIND])
    assert error.value.param == "constraint"


def test_a_chat_has_one_answer(llm):
    with pytest.raises(RequestError, match="n = 2: a chat has one answer"):
        llm.chat(ASK, SamplingParams(n=2))


def test_what_is_no_list_of_prompts_is_refused_by_name(llm):
    with pytest.raises(RequestError, match="expected texts or lists of token ids, got 1"):
        llm.logits([1, 2, 3])
    with pytest.raises(RequestError, match="expected texts or lists of token ids, got None"):
        llm.generate(["a", None])


def test_a_chat_without_tools_cannot_require_one(llm):
    with pytest.raises(RequestError) as error:
        llm.chat(ASK, GREEDY, tool_choice="required")
    assert error.value.param == "tool_choice"


def test_chat_continues_the_chat_form(llm):
    messages = [{"role": "user", "content": "hi"}]
    ids = llm.tokenizer.encode_chat(messages)
    assert ids[0] == 1
    answer = llm.chat(messages, GREEDY)
    assert answer.token_ids == llm.generate([ids], GREEDY)[0].token_ids
    assert answer.text == llm.tokenizer.decode(answer.token_ids)  # not a continuation of the prompt's text
    assert "".join(piece.text for piece in llm.stream([ids], GREEDY, reply=True)) == answer.text


# Logits


def test_logits_are_float32_rows_for_every_token(llm, model):
    asked = [tokens(n, 288, seed=n) for n in (1, 40, 96)]
    for found, ids in zip(llm.logits(asked), asked, strict=True):
        assert (found.dtype, found.shape) == (np.float32, (len(ids), 288))
        np.testing.assert_allclose(found, hf_logits(model, ids), atol=1e-4, rtol=0)
    assert llm.logits([]) == []
    with pytest.raises(RequestError, match="chunk_size = 0"):
        llm.logits(asked, chunk_size=0)


# Options


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, torch.float32),
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": "float16"}, torch.float16),
        ({"weights": "bf16"}, torch.bfloat16),
        ({"weights": "bf16", "dtype": "bfloat16"}, torch.bfloat16),
    ],
)
def test_it_computes_in_the_dtype_that_is_asked_for(folder, options, dtype):
    llm = LLM(folder, backend="torch", **options)
    assert llm._engine.runner.model.norm.weight.dtype == dtype
    assert all(pool.dtype == dtype for pool in llm._engine.runner.cache.pools)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"dtype": "int3"}, UsageError, "dtype 'int3': expected auto"),
        ({"weights": "int3"}, UsageError, "weights 'int3': expected auto, bf16, fp8, int8 or int4"),
        ({"weights": "fp8", "backend": "native"}, UsageError, "weights fp8: only the torch backend's Triton kernels"),
        ({"weights": "fp8", "cache": "int8"}, UsageError, "weights fp8: only the torch backend's Triton kernels"),
        ({"weights": "fp8", "device": "cpu"}, UsageError, "weights fp8: only Triton's kernels have it"),
        ({"cache": "int3"}, UsageError, "cache 'int3': expected auto, int8 or fp8"),
        ({"cache": "fp8", "backend": "native"}, UsageError, "cache fp8: only the torch backend has it; take int8"),
        ({"cache": "fp8", "weights": "int4"}, UsageError, "cache fp8: only the torch backend has it; take int8"),
        ({"weights": "bf16", "dtype": "float32"}, UsageError, "contradict each other"),
        ({"backend": "abacus"}, UsageError, "backend 'abacus': expected"),
        ({"device": "abacus"}, UsageError, "device 'abacus': expected"),
        ({"device": "cuda:99"}, UsageError, "device 'cuda:99' cannot be used"),
        ({"max_len": 0}, UsageError, "max_len = 0"),
        ({"max_batch_tokens": -1}, UsageError, "max_batch_tokens = -1"),
        ({"max_sequences": 0}, UsageError, "max_sequences = 0"),
        ({"max_len": 1.5}, UsageError, "max_len = 1.5: expected a whole number"),
        ({"threads": True}, UsageError, "threads = True: expected a whole number"),
        ({"device": torch.device("cpu")}, UsageError, "device = .*: expected a text"),
        ({"max_len": (1 << 31) - 1}, MemoryLimitError, "the longest context that fits is"),
    ],
)
def test_wrong_options_are_refused_in_one_line_before_a_weight_is_read(folder, options, error, words, monkeypatch):
    monkeypatch.setattr("maestrale.checkpoint.reader.Checkpoint.tensor", lambda *_: pytest.fail("read a weight"))
    monkeypatch.setattr(choices, "available_memory", lambda: 1 << 30)
    with pytest.raises(error, match=words) as caught:
        LLM(folder, **options)
    assert "\n" not in str(caught.value)


def test_a_model_that_does_not_fit_the_memory_is_refused(folder, monkeypatch):
    monkeypatch.setattr(choices, "available_memory", lambda: 1000)
    with pytest.raises(MemoryLimitError):
        LLM(folder)


def test_a_folder_without_a_tokenizer_runs_on_ids_and_says_so_when_text_is_needed(tmp_path):
    folder = make_folder(tmp_path, DENSE)
    llm = LLM(folder)
    completion = llm.generate([[3, 4]], GREEDY)[0]
    assert (len(completion.token_ids), completion.text) == (8, "")
    with pytest.raises(CheckpointError, match="no tokenizer"):
        llm.generate("text", GREEDY)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        _ = llm.tokenizer
    with pytest.raises(CheckpointError, match="no tokenizer"):
        LLM(folder, require_tokenizer=True)


def test_progress_counts_tensors(folder):
    seen = []
    LLM(folder, progress=lambda *progress: seen.append(progress))
    total = len(load_file(folder / "consolidated.safetensors"))
    assert seen == [(i, total) for i in range(1, total + 1)]


def test_bad_folders_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        LLM(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"storie: no such folder.* stories, stories-chat, stories-moe$"):
        LLM("storie")
    folder = make_folder(tmp_path / "bad", DENSE)
    params = (folder / "params.json").read_text()
    (folder / "params.json").write_text(params.replace('"n_kv_heads": 2', '"n_kv_heads": 3'))
    with pytest.raises(ConfigError, match="n_heads = 4 is not a multiple of n_kv_heads = 3"):
        LLM(folder)


def test_a_reader_may_stop_a_stream_while_the_prompt_is_read(folder):
    llm = LLM(folder, max_batch_tokens=8)
    stream = llm.stream([[1, *([40] * 39)]], GREEDY)
    assert [next(stream).token_ids for _ in range(4)] == [[]] * 4  # 32 of 40 tokens
    stream.close()
    assert llm._engine.pages.available == list(llm._engine.runner.layout.pages)


def test_progress_counts_tokens_up_to_all_there_can_be(folder):
    steps = []
    LLM(folder, max_batch_tokens=8).generate([[1] * 20, [1] * 5], GREEDY, progress=lambda *step: steps.append(step))
    assert {total for _, total in steps} == {20 + 8 + 5 + 8}
    assert sorted(steps) == steps
    assert steps[-1] == (41, 41)


def test_ctrl_c_at_any_line_of_the_engine_harms_no_other_stream(llm, model):
    inside = str(Path(engine.__file__).parent)

    def interrupted_at(line):
        """Whether a Ctrl-C came; it is pressed at that line of all that the engine runs through."""
        count = 0

        def trace(frame, event, argument):
            nonlocal count
            if not frame.f_code.co_filename.startswith(inside):
                return None
            if event == "line":
                count += 1
                if count == line:
                    signal.raise_signal(signal.SIGINT)
            return trace

        other = llm.stream([1, 50, 60], GREEDY)
        said = next(other).token_ids
        before = sys.gettrace()
        try:
            sys.settrace(trace)
            with pytest.raises(KeyboardInterrupt) if line else nullcontext():
                llm.generate([[1, 70, 71], "hello"], GREEDY)
        finally:
            sys.settrace(before)
        for piece in islice(other, 100):
            said = [*said, *piece.token_ids]
        assert said == true_greedy(model, [1, 50, 60])
        counters = llm.counters()
        assert counters.running == counters.waiting == 0
        assert all(pool.free + pool.cached == pool.total for pool in counters.pools)
        return count

    lines = interrupted_at(0)
    assert lines > 500
    for line in range(1, lines, lines // 60):
        interrupted_at(line)


def test_several_threads_may_share_a_model(llm, model):
    prompts = [[1, 50 + i, 60] for i in range(6)]
    found = {}

    def run(i):
        for _ in range(3):
            found.setdefault(i, []).append(llm.generate([prompts[i]], GREEDY)[0].token_ids)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {i: [true_greedy(model, ids)] * 3 for i, ids in enumerate(prompts)}


def test_after_a_fork_it_is_refused_and_does_not_wait_for_ever(llm, monkeypatch):
    monkeypatch.setattr("os.getpid", lambda: 1)  # as in the child
    with pytest.raises(UsageError, match="opened before a fork"):
        llm.generate("a", GREEDY)
