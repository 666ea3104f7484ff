"""Structured answers and calls of tools over HTTP, asked for by the openai client of a real process. The models are
random, so nothing but the constraint makes them answer in form; jsonschema and re judge what comes."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Literal

import jsonschema
import mistral_common
import openai
import pytest
from live import Live
from pydantic import BaseModel, ConfigDict
from tiny import DENSE, make_folder, write_tekken

from maestrale import LLM, SamplingParams

V3 = Path(mistral_common.__file__).parent / "data" / "mistral_instruct_tokenizer_240323.model.v3"
PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Trieste", "São Paulo", "東京"]},
        "knots": {"type": "integer", "minimum": -9, "maximum": 99},
        "gusts": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["city", "knots"],
    "additionalProperties": False,
}
WIND = {"type": "function", "function": {"name": "wind", "description": "How it blows", "parameters": PARAMETERS}}
NOW = {"type": "function", "function": {"name": "now"}}
ASK = [{"role": "user", "content": "Which wind?"}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Random models with tokenizers of three kinds of calls: a list after SentencePiece's space (v3), a list (a tekken
    of version 7), and marks (one of version 11)."""
    root = tmp_path_factory.mktemp("tools")
    tall = replace(DENSE, vocab_size=32768, max_position_embeddings=2048)
    shutil.copy(V3, make_folder(root / "v3", tall) / V3.name)
    for name in ("v7", "v11"):
        folder = make_folder(root / name, replace(tall, vocab_size=288))
        write_tekken(folder)
    tekken = json.loads((folder / "tekken.json").read_text())
    tekken["config"]["version"] = "v11"
    for token, mark in zip(tekken["special_tokens"][-2:], ("[ARGS]", "[CALL_ID]"), strict=True):
        token["token_str"] = mark
    (folder / "tekken.json").write_text(json.dumps(tekken))
    return {name: root / name for name in ("v3", "v7", "v11")}


@pytest.fixture(scope="module", params=["v3", "v7", "v11"])
def served(request, folders):
    server = Live(folders[request.param], "--dtype", "float32")
    yield server
    server.close()


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        client.name = client.models.list().data[0].id
        yield client


def ask(client, messages=ASK, seed=1, **fields):
    asked = {"temperature": 1.2, "max_tokens": 300, "seed": seed, "model": client.name} | fields
    return client.chat.completions.create(messages=messages, **asked)


def whole(client, **fields):
    """Text, (name, arguments) of each call, and finish_reason, by the client's plain answer."""
    (choice,) = ask(client, **fields).choices
    calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or []]
    return choice.message.content or "", calls, choice.finish_reason


def streamed(client, **fields):
    """The same, put together from the deltas; id and name of a call must come once, first."""
    text, calls, reason = "", [], None
    for chunk in ask(client, stream=True, **fields):
        for choice in chunk.choices:
            assert reason is None, "a chunk after the end"
            reason = choice.finish_reason
            text += choice.delta.content or ""
            for call in choice.delta.tool_calls or []:
                if call.index == len(calls):
                    assert re.fullmatch("[A-Za-z0-9]{9}", call.id)
                    assert call.type == "function"
                    calls.append([call.function.name, call.function.arguments])
                    continue
                assert (call.id, call.function.name, call.index) == (None, None, len(calls) - 1)
                calls[-1][1] += call.function.arguments
    return text, [tuple(call) for call in calls], reason


def check(calls):
    for name, arguments in calls:
        schema = PARAMETERS if name == "wind" else {"type": "object", "maxProperties": 0}
        assert name in ("wind", "now")
        jsonschema.validate(json.loads(arguments), schema)


# Calls


@pytest.mark.parametrize("seed", range(4))
def test_a_required_call_fits_its_schema_and_the_stream_adds_up_to_it(client, seed):
    asked = {"tools": [WIND, NOW], "tool_choice": "required", "parallel_tool_calls": False, "seed": seed}
    text, calls, reason = whole(client, **asked)
    assert (text, len(calls), reason) == ("", 1, "tool_calls")
    check(calls)
    assert streamed(client, **asked) == (text, calls, reason)


def test_a_named_function_is_called_once(client):
    named = {"type": "function", "function": {"name": "wind"}}
    for seed in range(3):
        text, calls, reason = whole(client, tools=[NOW, WIND], tool_choice=named, seed=seed)
        assert (text, [name for name, _ in calls], reason) == ("", ["wind"], "tool_calls")
        check(calls)


def test_calls_after_text_stream_as_they_are_answered(client):
    """The model is talked into calling by a bias on the token that begins a call."""
    begin, called = {"v3": 5, "v7": 9, "v11": 9}[client.name], 0
    for seed in range(4):
        asked = {"tools": [WIND, NOW], "seed": seed, "logit_bias": {str(begin): 6}, "max_tokens": 100}
        text, calls, reason = whole(client, **asked)
        assert streamed(client, **asked) == (text, calls, reason)
        assert reason in ("length", "tool_calls" if calls else "stop")
        called += bool(text and calls)
        if reason == "tool_calls":
            check(calls)
    assert called > 0


def test_parallel_calls_stream_as_they_are_answered(client):
    several = 0
    for seed in range(4):
        asked = {"tools": [NOW], "tool_choice": "required", "seed": seed, "temperature": 2, "max_tokens": 150}
        text, calls, reason = whole(client, **asked)
        assert streamed(client, **asked) == (text, calls, reason)
        assert text == ""
        several += len(calls) > 1
        if reason == "tool_calls":
            check(calls)
    assert several > 0


def test_each_of_n_has_calls_of_its_own(client):
    answer = ask(client, tools=[WIND], tool_choice="required", parallel_tool_calls=False, n=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    made = [call for choice in answer.choices for call in choice.message.tool_calls]
    check([(call.function.name, call.function.arguments) for call in made])
    assert len({call.id for call in made}) == len(made) == 3


def test_an_answer_that_is_cut_off_says_so(client):
    text, calls, reason = whole(client, tools=[WIND], tool_choice="required", max_tokens=20)
    assert (text, reason) == ("", "length")
    assert streamed(client, tools=[WIND], tool_choice="required", max_tokens=20) == (text, calls, reason)


def test_no_stop_string_cuts_a_call(client):
    text, calls, reason = whole(
        client, tools=[WIND], tool_choice="required", parallel_tool_calls=False, stop=["it", '"']
    )
    assert (text, len(calls), reason) == ("", 1, "tool_calls")
    check(calls)


def test_none_forbids_calls_and_changes_no_prompt(client):
    answers = [ask(client, tools=[WIND], tool_choice=choice, max_tokens=30) for choice in ("none", "auto")]
    assert answers[0].choices[0].message.tool_calls is None
    assert answers[0].usage.prompt_tokens == answers[1].usage.prompt_tokens > 100


def test_a_call_and_its_result_go_back_into_the_chat_under_any_id(client):
    message = ask(client, tools=[WIND], tool_choice="required", parallel_tool_calls=False).choices[0].message
    assert message.tool_calls
    for call_id in (message.tool_calls[0].id, "call_0123456789abcdefghijklmn", "é"):
        said = message.model_dump(exclude_none=True)
        said["tool_calls"][0]["id"] = call_id
        result = {"role": "tool", "tool_call_id": call_id, "content": '{"knots": 12}'}
        assert ask(client, messages=[*ASK, said, result], tools=[WIND], max_tokens=5).choices[0].finish_reason


def test_the_server_answers_as_the_library_does(client, folders):
    llm = LLM(folders[client.name], dtype="float32")
    for choice in ("auto", "required"):
        ours = llm.chat(ASK, SamplingParams(max_tokens=60, temperature=0), [WIND, NOW], choice)
        text, calls, reason = whole(client, tools=[WIND, NOW], tool_choice=choice, temperature=0, max_tokens=60)
        assert (text, reason) == (ours.text, ours.finish_reason)
        assert calls == [(call.name, call.arguments) for call in ours.tool_calls]


# Structured text


@pytest.mark.parametrize("seed", range(3))
def test_a_json_schema_is_kept_to_and_the_stream_adds_up_to_it(client, seed):
    form = {"type": "json_schema", "json_schema": {"name": "wind", "strict": True, "schema": PARAMETERS}}
    text, calls, reason = whole(client, response_format=form, seed=seed)
    assert (calls, reason) == ([], "stop")
    jsonschema.validate(json.loads(text), PARAMETERS)
    assert streamed(client, response_format=form, seed=seed) == (text, calls, reason)


class Wind(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: Literal["bora", "maestrale"]
    strong: bool


def test_the_clients_own_parsing_of_models_and_tools_works(client):
    asked = {"model": client.name, "messages": ASK, "max_tokens": 200, "temperature": 1, "seed": 3}
    parsed = client.chat.completions.parse(**asked, response_format=Wind).choices[0].message.parsed
    assert isinstance(parsed, Wind)
    tool = openai.pydantic_function_tool(Wind)
    message = client.chat.completions.parse(**asked, tools=[tool], tool_choice="required").choices[0].message
    assert all(isinstance(call.function.parsed_arguments, Wind) for call in message.tool_calls)


def test_a_json_object_is_an_object(client, served):
    end = served.post("/tokenize", {"prompt": "}", "add_special_tokens": False}).json["tokens"][-1]
    text, _, reason = whole(client, response_format={"type": "json_object"}, logit_bias={str(end): 100})
    assert (json.loads(text), reason) == ({}, "stop")
    assert whole(client, response_format={"type": "json_object"}, max_tokens=9)[0].startswith("{")


def test_a_regex_and_a_grammar_are_kept_to(client):
    for seed in range(3):
        text, _, reason = whole(client, response_format={"type": "regex", "regex": r"\d{3}-[a-f]+\."}, seed=seed)
        assert reason == "length" or re.fullmatch(r"[0-9]{3}-[a-f]+\.", text)
        text, _, reason = whole(client, response_format={"type": "grammar", "grammar": 'start: "a" start "b" | "c"'})
        assert reason == "length" or re.fullmatch(r"a*cb*", text)
        assert text.count("a") == text.count("b") or reason == "length"


def test_with_tools_the_answer_is_in_form_or_a_call(client):
    form = {"type": "json_schema", "json_schema": {"name": "wind", "schema": {"enum": ["bora", ["no wind"]]}}}
    for seed in range(4):
        text, calls, _ = whole(client, response_format=form, tools=[NOW], parallel_tool_calls=False, seed=seed)
        assert not calls if text else len(calls) == 1
        assert not text or json.loads(text) in ("bora", ["no wind"])


def test_text_is_no_constraint(client):
    asked = {"temperature": 0, "max_tokens": 20}
    assert whole(client, **asked) == whole(client, **asked, response_format={"type": "text"})


# What cannot be served


def schema(schema, **more):
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema} | more}}


def function(**fields):
    return {"tools": [{"type": "function", "function": {"name": "f"} | fields}]}


WRONG = [
    (schema({"type": "string", "minLength": 3, "maxLength": 2}), "response_format"),
    (schema({"type": "wind"}), "response_format"),
    (schema({"not": {}}, strict=True), "response_format"),
    (schema({}, strict="yes"), "response_format"),
    (schema("{}"), "response_format"),
    (schema({"$ref": "http://127.0.0.1:9/a.json"}), "response_format"),
    *(({"response_format": wrong}, "response_format") for wrong in ("json", {}, {"type": "xml"}, {"type": "regex"})),
    ({"response_format": {"type": "regex", "regex": "["}}, "response_format"),
    ({"response_format": {"type": "regex", "regex": r"[^\s\S]"}}, "response_format"),
    ({"response_format": {"type": "regex", "regex": "a" * 100_001}}, "response_format"),
    ({"response_format": {"type": "grammar", "grammar": "start: start"}}, "response_format"),
    ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
    ({"tools": "f"}, "tools"),
    ({"tools": [{"type": "retrieval"}]}, "tools"),
    (function(parameters={"type": "array"}), "tools"),
    (function(parameters={"properties": {"a": {"type": "wind"}}}), "tools"),
    (function(strict="yes"), "tools"),
    (function(strict=True, parameters={"properties": {"a": {"not": {}}}}), "tools"),
    (function() | schema(False), "response_format"),
    (function() | {"tool_choice": "perhaps"}, "tool_choice"),
    (function() | {"tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [], "tool_choice": "required"}, "tool_choice"),
    (function() | {"parallel_tool_calls": 1}, "parallel_tool_calls"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG, ids=lambda value: repr(value)[:60])
def test_what_cannot_be_served_is_a_400_that_names_its_field(served, fields, param):
    for streaming in (False, True):
        answer = served.chat("hello", **fields, stream=streaming)
        assert answer.status == 400
        assert answer.error["param"] == param
        assert "\n" not in answer.error["message"]
        assert answer.headers["x-should-retry"] == "false"
    assert served.chat("hello").status == 200


def test_a_grammar_that_leads_nowhere_fails_alone(served):
    lost = {"response_format": {"type": "grammar", "grammar": 'start: "ab" /[^\\s\\S]/'}}
    assert served.chat("hello", **lost).error["param"] == "response_format"
    (event,) = [event for event in served.chat("hello", **lost, stream=True).events if "error" in event]
    assert event["error"]["param"] == "response_format"
    assert served.chat("hello").status == 200
    assert served.pages_used() == 0
