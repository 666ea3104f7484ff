"""Calls of tools: what each version's grammar allows is what mistral-common writes, and it is read back."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_samples import tiny_tekken

from maestrale.errors import RequestError
from maestrale.text.tokenizer import load_tokenizer

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "array", "items": {"type": "object"}}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
ARGUMENTS = '{"city": "Tri\\"e}ste\\\\", "days": [{}, {"a": "]é日"}]}'
MADE = [
    {"id": "abcDEF123", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}},
    {"id": "zyxWVU987", "type": "function", "function": {"name": "now", "arguments": "{}"}},
]
FILE_VERSIONS = ["v2", "v3", "v7", "tekken"]
TINY_VERSIONS = ["tiny-v3", "tiny-v7", "tiny-v11", "tiny-v13"]


@pytest.fixture(scope="module")
def tokenizers(ours, tmp_path_factory):
    made = {}

    def get(name):
        if not name.startswith("tiny-"):
            return ours(name)
        if name not in made:
            data = tiny_tekken(name.removeprefix("tiny-"))
            folder = tmp_path_factory.mktemp(name)
            (folder / "tekken.json").write_text(json.dumps(data))
            made[name] = load_tokenizer(folder, data["config"]["default_vocab_size"])
        return made[name]

    return get


def control(tokenizer, name):
    return tokenizer._vocabulary.controls[name]


def said_by(tokenizer, calls, text=""):
    """Ids of an assistant's answer with `calls`, cut out of a chat that mistral-common's template has written."""
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "{}"} for call in calls]
    if tokenizer.kind == "v2":
        results = results[:1]
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": None, "tool_calls": calls}, *results]
    ids = tokenizer.encode_chat(chat, [WEATHER, NOW])
    begin = ids.index(control(tokenizer, "[TOOL_CALLS]"))
    spoken = tokenizer.encode(text, bos=False) if text else []
    return spoken + ids[begin : ids.index(tokenizer.eos_id, begin)]


def matcher(tokenizer, *asked):
    constraint = tokenizer.tool_constraint([WEATHER, NOW], *asked)
    return tokenizer.grammars.matcher(constraint, tokenizer.stream().drops_space)


def first_refused(matcher, ids):
    """How many of `ids` the matcher allows, one after the other."""
    for i, token in enumerate(ids):
        if token not in matcher:
            return i
        matcher.consume(token)
    return len(ids)


def may(matcher):
    return set(np.unpackbits(np.frombuffer(matcher.mask().bits, np.uint8), bitorder="little").nonzero()[0].tolist())


def read(tokenizer, ids):
    """Text and calls of an answer that comes one id at a time."""
    reader, decoder = tokenizer.read_calls("request"), tokenizer.stream()
    pieces = [reader.push([token], decoder.push(token)) for token in ids]
    return "".join(text for text, _ in pieces), [call for _, calls in pieces for call in calls]


def joined(pieces):
    """The whole calls of an answer, from their pieces."""
    whole = {}
    for piece in pieces:
        before = whole.get(piece.index)
        whole[piece.index] = replace(before, arguments=before.arguments + piece.arguments) if before else piece
    return list(whole.values())


@pytest.mark.parametrize("text", ["", "Let me look."])
@pytest.mark.parametrize("name", FILE_VERSIONS + TINY_VERSIONS)
def test_what_mistral_common_writes_is_allowed_and_read_back(name, text, tokenizers):
    tokenizer = tokenizers(name)
    ids = said_by(tokenizer, MADE, text)
    for choice in ("auto",) if text else ("auto", "required"):
        way = matcher(tokenizer, choice)
        assert first_refused(way, ids) == len(ids)
        assert tokenizer.eos_id in way
    said, pieces = read(tokenizer, ids)
    assert said == text
    assert [(call.name, call.arguments) for call in joined(pieces)] == [("weather", ARGUMENTS), ("now", "{}")]


@pytest.mark.parametrize("name", FILE_VERSIONS + TINY_VERSIONS)
def test_a_stream_gives_index_id_and_name_once_and_then_only_arguments(name, tokenizers):
    tokenizer = tokenizers(name)
    ids = said_by(tokenizer, MADE)
    _, pieces = read(tokenizer, ids)
    assert [call.index for call in pieces] == sorted(call.index for call in pieces)
    opening = [call for call in pieces if call.name is not None]
    assert [call.index for call in opening] == [0, 1]
    assert all((call.id is None) == (call.name is None) for call in pieces)
    assert sum(call.index == 0 for call in pieces) > 3, "arguments come in pieces"
    all_at_once = tokenizer.read_calls("request").push(ids, tokenizer.decode(ids))
    assert all_at_once == ("", joined(pieces))


# SentencePiece writes a space as U+2581, so this one comes back as a space.
WRITTEN = st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")


@settings(max_examples=30)
@given(
    calls=st.lists(
        st.tuples(
            st.text(WRITTEN, min_size=1, max_size=8),
            st.dictionaries(
                st.text(WRITTEN, max_size=5),
                st.recursive(
                    st.none()
                    | st.booleans()
                    | st.floats(allow_nan=False, allow_infinity=False)
                    | st.text(WRITTEN, max_size=5),
                    lambda inner: (
                        st.lists(inner, max_size=3) | st.dictionaries(st.text(WRITTEN, max_size=3), inner, max_size=3)
                    ),
                    max_leaves=6,
                ),
                max_size=3,
            ),
        ),
        min_size=1,
        max_size=3,
    ),
    data=st.data(),
)
@pytest.mark.parametrize("name", ["v3", "tiny-v11", "tiny-v13"])
def test_any_names_and_arguments_are_read_back_however_the_ids_come(name, calls, data, tokenizers):
    tokenizer = tokenizers(name)
    if name != "v3":  # there the name stands bare: what is shown of it must be what was meant
        calls = [(re.sub(r"[^a-z]", "", called) or "f", arguments) for called, arguments in calls]
    made = [
        {"id": f"{i:09}", "function": {"name": called, "arguments": json.dumps(arguments, ensure_ascii=False)}}
        for i, (called, arguments) in enumerate(calls)
    ]
    ids = said_by(tokenizer, made)
    reader, decoder, pieces = tokenizer.read_calls(""), tokenizer.stream(), []
    while ids:
        count = data.draw(st.integers(1, len(ids)))
        text, found = reader.push(ids[:count], "".join(map(decoder.push, ids[:count])))
        pieces, ids = pieces + found, ids[count:]
        assert text == ""
    assert [(call.name, json.loads(call.arguments)) for call in joined(pieces)] == calls


def test_ids_of_calls_are_nine_letters_or_digits_the_same_for_a_request(tokenizers):
    tokenizer = tokenizers("v3")
    ids = said_by(tokenizer, MADE)
    first, again, other = (tokenizer.read_calls(salt).push(ids, "")[1] for salt in ("a", "a", "b"))
    assert all(re.fullmatch(r"[A-Za-z0-9]{9}", call.id) for call in first)
    assert first == again
    assert len({call.id for call in first + other}) == 4


def test_text_that_a_stop_string_held_back_comes_before_the_calls(tokenizers):
    """The engine gives such text together with the token that ends the holding."""
    tokenizer = tokenizers("v3")
    spoken, call = tokenizer.encode("Let me", bos=False), said_by(tokenizer, MADE[1:])
    reader = tokenizer.read_calls("")
    assert reader.push(spoken, "Let") == ("Let", [])
    text, calls = reader.push(call, " me" + tokenizer.decode_continuation(spoken, call))
    assert (text, [(c.name, c.arguments) for c in calls]) == (" me", [("now", "{}")])


# What may be chosen


@pytest.mark.parametrize("name", ["v3", "tekken", "tiny-v11"])
def test_tool_choice_decides_whether_and_what_may_be_called(name, tokenizers):
    tokenizer = tokenizers(name)
    both, now, begin = said_by(tokenizer, MADE), said_by(tokenizer, MADE[1:]), control(tokenizer, "[TOOL_CALLS]")
    word = tokenizer.encode("Hello", bos=False)[0]
    assert {begin, word} <= may(matcher(tokenizer))
    assert {begin, word} & may(matcher(tokenizer, "none")) == {word}
    for required in ("required", "any"):
        assert may(matcher(tokenizer, required)) == {begin}
    named = {"type": "function", "function": {"name": "now"}}
    way = matcher(tokenizer, named)
    assert first_refused(way, now) == len(now)
    assert way.finished, "a named function is called once"
    said = tokenizer.decode(both[: first_refused(matcher(tokenizer, named), both)])
    assert "weather" not in said
    assert "now" not in said


@pytest.mark.parametrize("name", ["v3", "tekken", "tiny-v11"])
def test_without_parallel_calls_the_answer_ends_after_one(name, tokenizers):
    tokenizer = tokenizers(name)
    way = matcher(tokenizer, "auto", False)
    one = said_by(tokenizer, MADE[:1])
    assert first_refused(way, one) == len(one)
    assert way.finished
    both = said_by(tokenizer, MADE)
    assert first_refused(matcher(tokenizer, "auto", False), both) < len(both)


def test_arguments_are_held_to_the_schema(tokenizers):
    tokenizer = tokenizers("v3")
    for arguments in ('{"city": 3}', "{}", '{"town": "Bari"}', '"city"', '{"city": "Bari", "wind": 1}'):
        call = {"id": "abcDEF123", "function": {"name": "weather", "arguments": arguments}}
        ids = said_by(tokenizer, [call])
        assert first_refused(matcher(tokenizer), ids) < len(ids)


def test_a_function_without_parameters_takes_an_empty_object_only(tokenizers):
    tokenizer = tokenizers("v3")
    ids = said_by(tokenizer, [{"id": "abcDEF123", "function": {"name": "now", "arguments": '{"city": "Bari"}'}}])
    assert first_refused(matcher(tokenizer), ids) < len(ids)


def test_strict_refuses_a_keyword_that_cannot_be_held_and_otherwise_it_is_left_out(tokenizers):
    tokenizer = tokenizers("v3")
    function = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"not": {"const": 3}}}}}
    for strict in (None, False):
        constraint = tokenizer.tool_constraint([{"type": "function", "function": function | {"strict": strict}}])
        tokenizer.grammars.matcher(constraint, True)
    constraint = tokenizer.tool_constraint([{"type": "function", "function": function | {"strict": True}}])
    with pytest.raises(RequestError, match="not") as error:
        tokenizer.grammars.matcher(constraint, True)
    assert error.value.param == "tools"


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        (("sometimes",), "tool_choice"),
        ((3,), "tool_choice"),
        (({"type": "function"},), "tool_choice"),
        (({"type": "function", "function": {"name": "absent"}},), "tool_choice"),
        (("auto", "no"), "parallel_tool_calls"),
        (("auto", 0), "parallel_tool_calls"),
    ],
)
def test_an_unknown_choice_is_refused_and_named(asked, param, tokenizers):
    with pytest.raises(RequestError) as error:
        matcher(tokenizers("v3"), *asked)
    assert error.value.param == param
    assert "\n" not in str(error.value)


def test_a_choice_without_tools_is_refused_and_no_choice_is_no_constraint(tokenizers):
    tokenizer = tokenizers("v3")
    assert tokenizer.tool_constraint(None) is None
    assert tokenizer.tool_constraint([], "auto") is None
    for choice in ("required", {"type": "function", "function": {"name": "now"}}):
        with pytest.raises(RequestError) as error:
            tokenizer.tool_constraint([], choice)
        assert error.value.param == "tool_choice"


@pytest.mark.parametrize("parameters", [{"type": "string"}, {"type": ["array", "null"]}])
def test_parameters_that_are_no_object_are_refused(parameters, tokenizers):
    with pytest.raises(RequestError, match="expected object") as error:
        tokenizers("v3").tool_constraint([{"type": "function", "function": {"name": "f", "parameters": parameters}}])
    assert error.value.param == "tools"


def test_tools_on_v1_are_refused(tokenizers):
    with pytest.raises(RequestError, match="v1 tokenizer has no tokens for them") as error:
        tokenizers("v1").tool_constraint([NOW])
    assert error.value.param == "tools"


def test_names_that_look_like_grammar_are_names(tokenizers):
    tokenizer = tokenizers("v3")
    name = 'a" | /.*/ "\\n%json {} é'
    tools = [{"type": "function", "function": {"name": name}}]
    way = tokenizer.grammars.matcher(tokenizer.tool_constraint(tools, "required"), True)
    ids = said_by(tokenizer, [{"id": "abcDEF123", "function": {"name": name, "arguments": "{}"}}])
    assert first_refused(way, ids) == len(ids)
    assert way.finished
    assert first_refused(matcher(tokenizer), ids) < len(ids)
