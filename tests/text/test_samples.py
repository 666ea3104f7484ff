"""Training data: ids are mistral-common's, the assistant's words alone are learnt, bad lines are told all at once."""

import json

import numpy as np
import pytest
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from test_chat import ALL, CALL, RESULT, TOOL, USER, WITH_TOOLS, say

from maestrale.errors import DataError, RequestError, UsageError
from maestrale.text.samples import read_samples, require_samples

CHAT = [say("system", "Be brief."), USER, say("assistant", "Windy."), say("user", "And?"), say("assistant", "Bora.")]


def written(tmp_path, *lines, name="data.jsonl"):
    path = tmp_path / name
    path.write_bytes(b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines))
    return path


def learnt(tokenizer, sample) -> list[str]:
    """The texts of the runs of learnt tokens, each of which must end with an end-of-sequence token."""
    texts, run = [], []
    for token, weight in zip(sample.ids.tolist(), sample.weights.tolist(), strict=True):
        if weight:
            run.append(token)
        if token == tokenizer.eos_id and run:
            assert run[-1] == tokenizer.eos_id
            texts.append(tokenizer.decode(run))
            run = []
    assert not run
    return texts


@pytest.mark.parametrize("name", ALL)
def test_only_the_assistants_words_and_its_ends_are_learnt(name, ours, tmp_path):
    path = written(tmp_path, {"messages": CHAT})
    (sample,) = require_samples(path, ours(name), "lm")
    assert [text.strip() for text in learnt(ours(name), sample)] == ["Windy.", "Bora."]


@pytest.mark.parametrize("name", ALL)
def test_what_stands_before_the_last_answer_is_what_is_sent_when_it_is_asked_for(name, ours, theirs, tmp_path):
    (sample,) = require_samples(written(tmp_path, {"messages": CHAT}), ours(name), "lm")
    asked = theirs(name).encode_chat_completion(ChatCompletionRequest.from_openai(CHAT[:-1])).tokens
    assert sample.ids[: len(asked)].tolist() == asked
    assert sample.weights[len(asked) :].all()
    assert sample.ids[-1] == ours(name).eos_id


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_calls_are_learnt_and_their_results_are_not(name, ours, theirs, tmp_path):
    messages = [USER, CALL, RESULT, say("assistant", "45 knots.")]
    (sample,) = require_samples(written(tmp_path, {"messages": messages, "tools": [TOOL]}), ours(name), "lm")
    texts = learnt(ours(name), sample)
    assert "weather" in texts[0]
    assert "Trieste" in texts[0]
    assert texts[1].strip() == "45 knots."
    request = ChatCompletionRequest.from_openai(messages[:-1], [TOOL])
    asked = theirs(name).encode_chat_completion(request).tokens
    assert sample.ids[: len(asked)].tolist() == asked


def test_weights_of_messages_are_those_of_their_tokens(ours, tmp_path):
    tokenizer = ours("v3")
    messages = [USER, say("assistant", "one", weight=0), USER, say("assistant", "two", weight=0.5), USER]
    (sample,) = require_samples(
        written(tmp_path, {"messages": [*messages, say("assistant", "three")]}), tokenizer, "lm"
    )
    two, three = (len(tokenizer.encode(word, bos=False)) + 1 for word in ("two", "three"))
    assert sample.weights[sample.weights > 0].tolist() == [0.5] * two + [1.0] * three


def test_a_weight_is_nothing_to_a_chat_that_is_asked(ours):
    chat = [USER, say("assistant", "one", weight=0.5), say("assistant", "two", weight=7), USER]
    plain = [{key: value for key, value in message.items() if key != "weight"} for message in chat]
    assert ours("v3").encode_chat(chat) == ours("v3").encode_chat(plain)


def test_a_text_is_learnt_from_its_first_word_to_its_end(ours, tmp_path):
    tokenizer = ours("v3")
    (sample,) = require_samples(written(tmp_path, {"text": "The bora blows."}), tokenizer, "lm")
    assert sample.ids.tolist() == [*tokenizer.encode("The bora blows."), tokenizer.eos_id]
    assert sample.weights.tolist() == [0.0] + [1.0] * (len(sample.ids) - 1)


@pytest.mark.parametrize(
    "line",
    [
        {"prompt": "Ciao", "chosen": "Salve", "rejected": "No"},
        {
            "input": {"messages": [say("user", "Ciao")]},
            "preferred_output": [say("assistant", "Salve")],
            "non_preferred_output": [say("assistant", "No")],
        },
        {"prompt": [say("user", "Ciao")], "chosen": [say("assistant", "Salve")], "rejected": "No"},
    ],
)
def test_a_pair_is_one_prompt_and_two_answers(line, ours, tmp_path):
    (pair,) = require_samples(written(tmp_path, line), ours("v3"), "dpo")
    assert [learnt(ours("v3"), sample) for sample in (pair.chosen, pair.rejected)] == [["Salve"], ["No"]]
    given = int((pair.chosen.weights == 0).sum())
    np.testing.assert_array_equal(pair.chosen.ids[:given], pair.rejected.ids[:given])


def test_labels_are_words_or_numbers(ours, tmp_path):
    lines = [{"text": "good", "label": "yes"}, {"messages": [USER], "label": 3}]
    samples = require_samples(written(tmp_path, *lines), ours("v3"), "classify")
    assert [sample.label for sample in samples] == ["yes", "3"]
    assert samples[0].ids.tolist() == ours("v3").encode("good")


BAD = [  # with a part of the cause that must be told
    (b"{\n", "not JSON"),
    (b'{"text": "\xff"}\n', "not UTF-8"),
    (b'{"text": "a", "text": "b"}\n', "duplicate key 'text'"),
    (b'{"text": NaN}\n', "NaN is not JSON"),
    (b"[" * 5000 + b"\n", "nested"),
    (b"3\n", "expected a JSON object, got int"),
    ({}, 'expected either "text" or "messages", found no key'),
    ({"text": "a", "messages": []}, 'expected either "text" or "messages"'),
    ({"text": " "}, "text: is empty"),
    ({"text": 3}, "text: expected text, got int"),
    (b'{"text": "\\ud800"}\n', "half of a surrogate pair"),
    ({"messages": []}, "expected a list of at least one message"),
    ({"messages": [USER]}, "the last one must be a finished answer"),
    ({"messages": [USER, say("assistant", "")]}, "the last one must be a finished answer"),
    ({"messages": [USER, say("assistant", "x", prefix=True)]}, "the last one must be a finished answer"),
    ({"messages": [say("wizard", "x"), say("assistant", "x")]}, "role = 'wizard'"),
    ({"messages": [USER, say("assistant", "x", weight=-1)]}, "weight = -1"),
    ({"messages": [USER, say("assistant", "x", weight="1")]}, "weight = '1'"),
    ({"messages": [USER | {"weight": 1}, say("assistant", "x")]}, "only an assistant's message"),
    ({"messages": [USER, say("assistant", "x", weight=0)]}, "nothing to learn"),
    ({"messages": [USER, RESULT, say("assistant", "x")]}, "answers no call"),
]


def test_every_bad_line_is_told_at_once_with_its_number(ours, tmp_path):
    good = {"text": "fine"}
    lines = [line for bad, _ in BAD for line in (good, b"\n", bad)]  # an empty line is nothing, but it counts
    samples, faults = read_samples(written(tmp_path, *lines), ours("v3"), "lm")
    assert len(samples) == len(BAD)
    assert [fault.line for fault in faults] == [3 * i + 3 for i in range(len(BAD))]
    for fault, (_, cause) in zip(faults, BAD, strict=True):
        assert cause in fault.cause
        assert "\n" not in fault.cause
    with pytest.raises(DataError) as caught:
        require_samples(tmp_path / "data.jsonl", ours("v3"), "lm")
    assert caught.value.exit_code == 3
    assert "data.jsonl:3: not JSON" in str(caught.value)
    assert "data.jsonl:60: " in str(caught.value)
    assert "and 1 more" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_pairs_and_labels_are_told(ours, tmp_path):
    pairs = [{"prompt": "a", "chosen": "b"}, {"prompt": "a", "chosen": "b", "rejected": "b"}, {"chosen": "b"}]
    _, faults = read_samples(written(tmp_path, *pairs), ours("v3"), "dpo")
    assert [f.cause.split(":")[0] for f in faults] == ["rejected", "chosen and rejected are the same", "prompt"]
    _, faults = read_samples(written(tmp_path, {"text": "a", "label": True}, {"text": "a"}), ours("v3"), "classify")
    assert ["label = True" in faults[0].cause, "label = None" in faults[1].cause] == [True, True]


def test_a_file_that_is_absent_or_empty_is_refused(ours, tmp_path):
    with pytest.raises(UsageError, match="cannot read the data: No such file"):
        require_samples(tmp_path / "absent.jsonl", ours("v3"), "lm")
    with pytest.raises(DataError, match="holds no sample"):
        require_samples(written(tmp_path, b"\n"), ours("v3"), "lm")


def test_a_byte_order_mark_and_windows_line_ends_are_nothing(ours, tmp_path):
    path = written(tmp_path, b'\xef\xbb\xbf{"text": "a"}\r\n', b'{"text": "b"}')
    assert len(require_samples(path, ours("v3"), "lm")) == 2


def test_v1_without_words_for_tools_says_so(ours):
    with pytest.raises(RequestError, match="no tokens for them"):
        ours("v1").encode_conversation([USER, CALL, RESULT, say("assistant", "x")])


def test_parquet_rows_are_lines(ours, tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"messages": [USER, say("assistant", "Windy.")]}, {"messages": [USER]}]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "data.parquet")
    samples, faults = read_samples(tmp_path / "data.parquet", ours("v3"), "lm")
    (expected,) = require_samples(written(tmp_path, rows[0]), ours("v3"), "lm")
    np.testing.assert_array_equal(samples[0].ids, expected.ids)
    assert [fault.line for fault in faults] == [2]
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UsageError, match="cannot read the data"):
        read_samples(tmp_path / "bad.parquet", ours("v3"), "lm")
